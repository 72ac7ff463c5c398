package exporter

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/cache/remotecache"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/progress"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// Layers that this build has made, and that are in the cache in another format, are told of, and so are those that can't be lazy; the base image's aren't
// if nobody wants them converted.
func TestStayed(t *testing.T) {
	cs := contentStore(t)
	base := put(t, cs, layerTar(t, "base"))
	base.Annotations = map[string]string{labels.LabelUncompressed: base.Digest.String()}
	plain := put(t, cs, layerTar(t, "a"))
	as := func(tar []byte, comp compression.Config) ocispecs.Descriptor {
		desc, err := convert(t.Context(), cs, put(t, cs, tar), comp)
		if err != nil {
			t.Fatal(err)
		}
		return *desc
	}
	stargz, chunked := ours(estargz.WriteOptions{}), oursChunked(zstdchunked.WriteOptions{})
	a, b, lossy, sparse := layerTar(t, "a"), layerTar(t, "b"), layerTar(t, "caf\xe9"), layertest.Sparse(t)["0.1"]
	forced := stargz
	forced.Force = true
	for name, c := range map[string]struct {
		comp   compression.Config
		layers []ocispecs.Descriptor
		want   string
	}{
		"as wanted":             {stargz, []ocispecs.Descriptor{base, as(a, stargz)}, ""},
		"chunked as wanted":     {chunked, []ocispecs.Descriptor{base, as(a, chunked)}, ""},
		"forced":                {forced, []ocispecs.Descriptor{base, as(a, stargz)}, ""},
		"not lazy":              {stargz, []ocispecs.Descriptor{base, as(a, stargz), as(lossy, stargz)}, `compression=estargz: a layer is not lazy, as a table of contents can't say what its tar says of "caf\xe9"`},
		"not lazy, sparse":      {forced, []ocispecs.Descriptor{as(sparse, stargz), as(lossy, stargz)}, `compression=estargz: 2 layers are not lazy, as a table of contents can't say what their tars say of "caf\xe9" and "hole"`},
		"chunked not lazy":      {chunked, []ocispecs.Descriptor{base, as(lossy, chunked), as(a, compression.New(compression.Zstd))}, "compression=zstdchunked: a layer that this build has made stays zstd, as it is in the cache; with force-compression=true all layers are converted\n" + `compression=zstdchunked: a layer is not lazy, as a table of contents can't say what its tar says of "caf\xe9"`},
		"not compressed":        {stargz, []ocispecs.Descriptor{base, plain}, "compression=estargz: a layer that this build has made stays uncompressed, as it is in the cache; with force-compression=true all layers are converted"},
		"gzip and zstd:chunked": {stargz, []ocispecs.Descriptor{base, as(a, compression.New(compression.Gzip)), as(b, chunked)}, "compression=estargz: 2 layers that this build has made stay gzip or zstdchunked, as they are in the cache; with force-compression=true all layers are converted"},
		"zstd":                  {chunked, []ocispecs.Descriptor{base, as(a, compression.New(compression.Zstd))}, "compression=zstdchunked: a layer that this build has made stays zstd, as it is in the cache; with force-compression=true all layers are converted"},
		"estargz":               {chunked, []ocispecs.Descriptor{as(a, stargz)}, "compression=zstdchunked: a layer that this build has made stays estargz, as it is in the cache; with force-compression=true all layers are converted"},
	} {
		t.Run(name, func(t *testing.T) {
			var s stayed
			s.noteImage(t.Context(), &solver.Remote{Descriptors: c.layers, Provider: cs}, []digest.Digest{base.Digest}, c.comp)
			if got := strings.Join(s.texts(), "\n"); got != c.want {
				t.Errorf("said %q, want %q", got, c.want)
			}
		})
	}
}

// addedTo is an exporter of a cache that keeps nothing.
type addedTo struct {
	cacheTo
	added int
	fails error
}

func (a *addedTo) Add(digest.Digest, [][]solver.CacheLink, []solver.CacheExportResult) (solver.CacheExporterRecord, bool, error) {
	a.added++
	return nil, false, nil
}

func (a *addedTo) Finalize(context.Context) (map[string]string, error) { return nil, a.fails }

// warnings are those that something shows the user.
func warnings(t *testing.T, do func(ctx context.Context)) (shown []string) {
	t.Helper()
	r, ctx, end := progress.NewContext(t.Context())
	do(ctx)
	end(nil)
	waiting, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		ps, err := r.Read(waiting)
		for _, p := range ps {
			if w, ok := p.Sys.(client.VertexWarning); ok {
				shown = append(shown, string(w.Short))
			}
		}
		if errors.Is(err, io.EOF) {
			return shown
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// The export of a cache tells of what is exported in another format, once, and not of the layers of the images that the build is FROM, nor of the
// ways to have a result that aren't exported.
func TestCacheStayed(t *testing.T) {
	cs := contentStore(t)
	as := func(name string, comp compression.Config) ocispecs.Descriptor {
		desc, err := convert(t.Context(), cs, put(t, cs, layerTar(t, name)), comp)
		if err != nil {
			t.Fatal(err)
		}
		return *desc
	}
	base, a, b, lazy := as("base", compression.New(compression.Gzip)), as("a", compression.New(compression.Gzip)), as("b", compression.New(compression.Gzip)), as("c", ours(estargz.WriteOptions{}))
	result := func(layers ...ocispecs.Descriptor) solver.CacheExportResult {
		return solver.CacheExportResult{Result: &solver.Remote{Descriptors: layers, Provider: cs}}
	}
	for name, c := range map[string]struct {
		attrs   map[string]string
		results [][]solver.CacheExportResult
		fails   error
		want    []string
	}{
		"as wanted": {map[string]string{"compression": "estargz"}, [][]solver.CacheExportResult{nil, {result(base, lazy)}}, nil, nil},
		"gzip": {
			map[string]string{"compression": "estargz"}, [][]solver.CacheExportResult{{result(base, a)}, {result(base, a, b)}, {result(base, a, lazy)}}, nil,
			[]string{"compression=estargz of the local cache: 2 layers that this build has made stay gzip, as they are in the cache; with force-compression=true all layers are converted"},
		},
		"zstdchunked": {
			map[string]string{"compression": "zstdchunked"}, [][]solver.CacheExportResult{{result(base, lazy)}}, nil,
			[]string{"compression=zstdchunked of the local cache: a layer that this build has made stays estargz, as it is in the cache; with force-compression=true all layers are converted"},
		},
		"the second of two": {map[string]string{"compression": "estargz"}, [][]solver.CacheExportResult{{result(base, lazy), result(base, a)}}, nil, nil},
		"forced":            {map[string]string{"compression": "estargz", "force-compression": "true"}, [][]solver.CacheExportResult{{result(base, a)}}, nil, nil},
		"another format":    {map[string]string{"compression": "zstd"}, [][]solver.CacheExportResult{{result(base, a)}}, nil, nil},
		"fails":             {map[string]string{"compression": "estargz"}, [][]solver.CacheExportResult{{result(base, a)}}, errStopped, nil},
	} {
		t.Run(name, func(t *testing.T) {
			next := &addedTo{fails: c.fails}
			resolve := func(_ context.Context, _ session.Group, attrs map[string]string) (_ remotecache.Exporter, err error) {
				next.comp, err = compression.ParseAttributes(attrs)
				return next, err
			}
			bases := func(sessions []string) map[digest.Digest]bool {
				return map[digest.Digest]bool{base.Digest: slices.Equal(sessions, []string{"stayed " + name})}
			}
			e, err := Cache("local", resolve, nil, bases)(t.Context(), session.NewGroup("stayed "+name), c.attrs)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range c.results {
				if _, _, err := e.Add("", nil, r); err != nil {
					t.Fatal(err)
				}
			}
			if next.added != len(c.results) {
				t.Errorf("%d records were added, want %d", next.added, len(c.results))
			}
			got := warnings(t, func(ctx context.Context) {
				if _, err := e.Finalize(ctx); !errors.Is(err, c.fails) {
					t.Errorf("finalize: %v", err)
				}
			})
			if !slices.Equal(got, c.want) {
				t.Errorf("warnings %q, want %q", got, c.want)
			}
		})
	}
}
