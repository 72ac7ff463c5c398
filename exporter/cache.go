package exporter

import (
	"context"
	"maps"

	"github.com/moby/buildkit/cache/remotecache"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Cache makes an exporter of caches write lazy layers, as New does with one of images. The name is that of its type. The worker that has
// the layers must get them by [GetRemotes]. Bases returns the layers of the images that the builds of some sessions are FROM.
func Cache(name string, resolve remotecache.ResolveCacheExporterFunc, lists *Lists, bases func(sessions []string) map[digest.Digest]bool) remotecache.ResolveCacheExporterFunc {
	resolve = reading(aCache, resolve)
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Exporter, error) {
		attrs = maps.Clone(attrs)
		chunked, err := takeZstdChunked(name+" cache exporter", true, attrs)
		if err != nil {
			return nil, err
		}
		if err := checkCache(name, attrs, chunked != nil); err != nil {
			return nil, err
		}
		e, err := resolve(ctx, g, attrs)
		if err != nil || chunked == nil && !isEStargz(attrs) {
			return e, err
		}
		c := &cacheExporter{Exporter: e, ref: attrs[keyRef], chunked: chunked, stayed: stayed{of: "the " + name + " cache"}}
		c.bases = func() map[digest.Digest]bool { return bases(session.AllSessionIDs(g)) }
		if chunked != nil {
			return c, nil
		}
		opt, err := writeOptions(attrs)
		if err != nil {
			return nil, err
		}
		c.estargz = newEStargz(opt).forCache(func(desc ocispecs.Descriptor) bool { return c.bases()[desc.Digest] })
		if list, given := attrs[keyPrioritize]; given {
			if c.estargz.order, err = lists.read(ctx, g, list); err != nil {
				return nil, err
			}
		}
		return c, nil
	}
}

// keyRef is BuildKit's attribute for where a cache of the type registry goes.
const keyRef = "ref"

type cacheExporter struct {
	remotecache.Exporter
	ref string // where it goes; "" unless it's a registry's
	// One of them is what it writes.
	estargz *eStargz
	chunked *zstdChunked

	bases   func() map[digest.Digest]bool // layers of the images that the build is FROM
	results []*solver.Remote
	stayed  stayed
}

// Add implements solver.CacheExporterTarget.
func (c *cacheExporter) Add(dgst digest.Digest, deps [][]solver.CacheLink, results []solver.CacheExportResult) (solver.CacheExporterRecord, bool, error) {
	if len(results) > 0 {
		c.results = append(c.results, results[0].Result) // the others are ways to have the same, of which the first is exported
	}
	return c.Exporter.Add(dgst, deps, results)
}

// Finalize implements remotecache.Exporter.
func (c *cacheExporter) Finalize(ctx context.Context) (map[string]string, error) {
	resp, err := c.Exporter.Finalize(ctx)
	if err != nil {
		return resp, refused(err, c.ref)
	}
	comp, bases := c.Config().Compression, c.bases()
	for _, r := range c.results {
		c.stayed.note(ctx, r, comp, func(i int) bool { return bases[r.Descriptors[i].Digest] })
	}
	return resp, c.stayed.warn(ctx)
}

// Config implements remotecache.Exporter.
func (c *cacheExporter) Config() remotecache.Config {
	cfg := c.Exporter.Config()
	cfg.Compression = c.chunked.replace(c.estargz.replace(cfg.Compression))
	return cfg
}
