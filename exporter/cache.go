package exporter

import (
	"context"
	"maps"

	"github.com/moby/buildkit/cache/remotecache"
	"github.com/moby/buildkit/session"
)

// Cache makes an exporter of caches write lazy layers, as New does with one of images. The name is that of its type. The worker that has
// the layers must get them by [GetRemotes].
func Cache(name string, resolve remotecache.ResolveCacheExporterFunc, lists *Lists) remotecache.ResolveCacheExporterFunc {
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
		switch {
		case err != nil:
			return nil, err
		case chunked != nil:
			return &cacheExporter{Exporter: e, ref: attrs[keyRef], chunked: chunked}, nil
		case !isEStargz(attrs):
			return e, nil
		}
		opt, err := writeOptions(attrs)
		if err != nil {
			return nil, err
		}
		c := &cacheExporter{Exporter: e, ref: attrs[keyRef], estargz: newEStargz(opt)}
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
}

// Finalize implements remotecache.Exporter.
func (c *cacheExporter) Finalize(ctx context.Context) (map[string]string, error) {
	resp, err := c.Exporter.Finalize(ctx)
	return resp, refused(err, c.ref)
}

// Config implements remotecache.Exporter.
func (c *cacheExporter) Config() remotecache.Config {
	cfg := c.Exporter.Config()
	cfg.Compression = c.chunked.replace(c.estargz.replace(cfg.Compression))
	return cfg
}
