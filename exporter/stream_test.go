package exporter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/cache/remotecache"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// registryBlobs has lazy blobs in a registry.
type registryBlobs struct {
	lazy   map[digest.Digest]bool
	repos  map[digest.Digest][]string
	pushed []string
}

var errStreamed = errors.New("streamed")

func (b *registryBlobs) Stream(_ context.Context, desc ocispecs.Descriptor, _ session.Group) (content.ReaderAt, error) {
	if b.lazy[desc.Digest] {
		return nil, errStreamed
	}
	return nil, cerrdefs.ErrNotFound
}

func (b *registryBlobs) Repositories(dgst digest.Digest) []string { return b.repos[dgst] }

func (b *registryBlobs) Pushed(_ context.Context, _ cache.ImmutableRef, repository string) error {
	b.pushed = append(b.pushed, repository)
	return nil
}

// remoteRef is a ref of two layers, of which BuildKit has only the second.
type remoteRef struct {
	cache.ImmutableRef
	remote solver.Remote
}

func (r *remoteRef) GetRemotes(context.Context, bool, cacheconfig.RefConfig, bool, session.Group) ([]*solver.Remote, error) {
	return []*solver.Remote{&r.remote}, nil
}

// pushes is an image exporter that asks for layers when it exports, and again when it pushes.
type pushes struct {
	bkexporter.ExporterInstance
	name        string
	early, late *solver.Remote // late is for the last name
	fails       error
	withoutPush bool
}

func (p *pushes) Resolve(context.Context, int, map[string]string) (bkexporter.ExporterInstance, error) {
	return p, nil
}

func (p *pushes) Export(ctx context.Context, src *bkexporter.Source, _ bkexporter.ExportBuildInfo) (map[string]string, bkexporter.FinalizeFunc, bkexporter.DescriptorReference, error) {
	get := func(ctx context.Context) *solver.Remote {
		r, err := src.Ref.GetRemotes(ctx, false, cacheconfig.RefConfig{}, false, nil)
		if err != nil {
			return nil
		}
		return r[0]
	}
	p.early = get(ctx)
	resp := map[string]string{exptypes.ExporterImageNameKey: p.name}
	if p.withoutPush {
		return resp, nil, nil, nil
	}
	return resp, func(ctx context.Context) error {
		for range strings.SplitSeq(p.name, ",") {
			p.late = get(ctx)
		}
		return p.fails
	}, nil, nil
}

// A push reads lazy layers from where they are, unless others of the build want them as well; nothing else of an export does. What one repository of a
// registry has got is mounted into the next.
func TestPushStreams(t *testing.T) {
	lazy, local := ocispecs.Descriptor{Digest: digest.FromString("lazy")}, ocispecs.Descriptor{Digest: digest.FromString("local")}
	for name, c := range map[string]struct {
		kind, name string
		cache      bool
		fails      error
		streams    bool
		pushed     []string
		sources    string // of registry r.test
	}{
		"one name":         {"image", "r.test/a:1", false, nil, true, []string{"r.test/a"}, "team/app,other"},
		"one registry":     {"image", "r.test/a:1,r.test/b,r.test/a:2", false, nil, true, []string{"r.test/a", "r.test/b"}, "team/app,other,a,b"},
		"two registries":   {"image", "r.test/a:1,s.test/a:1", false, nil, true, []string{"r.test/a", "s.test/a"}, "team/app,other,a"},
		"beside a cache":   {"image", "r.test/a:1", true, nil, false, []string{"r.test/a"}, "team/app,other"},
		"Docker Hub":       {"image", "busybox", false, nil, true, []string{"docker.io/library/busybox"}, "team/app,other"},
		"no name":          {"image", "r.test/a:1,/,r.test/b", false, nil, true, []string{"r.test/a", "r.test/b"}, "team/app,other,a"},
		"fails":            {"image", "r.test/a:1", false, errStopped, true, nil, "team/app,other"},
		"another exporter": {"oci", "r.test/a:1", false, nil, false, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			blobs := &registryBlobs{lazy: map[digest.Digest]bool{lazy.Digest: true}, repos: map[digest.Digest][]string{lazy.Digest: {"r.test:5000/team/app", "r.test/other"}}}
			next := &pushes{name: c.name, fails: c.fails}
			e := New(c.kind, next)
			e.Blobs = blobs
			ctx, end := context.WithCancelCause(t.Context())
			if c.cache {
				resolve := func(context.Context, session.Group, map[string]string) (remotecache.Exporter, error) {
					return &cacheTo{}, nil
				}
				if _, err := Cache("registry", resolve, nil, nil)(ctx, session.NewGroup(name), nil); err != nil {
					t.Fatal(err)
				}
			}
			inst, err := e.Resolve(ctx, 0, nil)
			if err != nil {
				t.Fatal(err)
			}
			ref := &remoteRef{remote: solver.Remote{Descriptors: []ocispecs.Descriptor{lazy, local}, Provider: contentutil.NewMultiProvider(contentStore(t))}}
			_, finalize, _, err := inst.Export(ctx, &bkexporter.Source{Ref: ref}, bkexporter.ExportBuildInfo{SessionID: name})
			if err != nil {
				t.Fatal(err)
			}
			if err := finalize(ctx); !errors.Is(err, c.fails) {
				t.Errorf("finalize: %v", err)
			}
			if _, err := next.early.Provider.ReaderAt(ctx, lazy); errors.Is(err, errStreamed) {
				t.Error("streamed before it was pushed")
			}
			if _, err := next.late.Provider.ReaderAt(ctx, lazy); errors.Is(err, errStreamed) != c.streams {
				t.Errorf("read for the push: %v, want it streamed: %t", err, c.streams)
			}
			if _, err := next.late.Provider.ReaderAt(ctx, local); !cerrdefs.IsNotFound(err) {
				t.Errorf("the other one: %v", err)
			}
			if !slices.Equal(blobs.pushed, c.pushed) {
				t.Errorf("pushed to %q, want %q", blobs.pushed, c.pushed)
			}
			if c.kind == "image" {
				if got, want := next.late.Descriptors[0].Annotations, map[string]string{"containerd.io/distribution.source.r.test": c.sources}; !maps.Equal(got, want) {
					t.Errorf("annotations %v, want %v", got, want)
				}
			}
			if ref.remote.Descriptors[0].Annotations != nil || next.early.Descriptors[0].Annotations != nil {
				t.Error("the manifest's annotations have changed")
			}
			end(io.EOF)
		})
	}
}

// Who exports and doesn't push is left alone.
func TestNoPush(t *testing.T) {
	next := &pushes{name: "r.test/a", withoutPush: true}
	e := New("image", next)
	e.Blobs = &registryBlobs{}
	inst, err := e.Resolve(t.Context(), 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, finalize, _, err := inst.Export(t.Context(), &bkexporter.Source{Ref: &remoteRef{}}, bkexporter.ExportBuildInfo{})
	if err != nil || finalize != nil {
		t.Errorf("finalize %v, %v", finalize != nil, err)
	}
}

func TestReaders(t *testing.T) {
	var r readers
	ctx, end := context.WithCancelCause(t.Context())
	r.add(ctx, session.NewGroup("a", "b"), aCache)
	r.add(t.Context(), session.NewGroup("b"), aCache)
	r.add(t.Context(), session.NewGroup("d"), aSeekingCache)
	for id, want := range map[string]bool{"a": true, "b": false, "c": false, "d": false} {
		if r.alone(id, aCache) != want {
			t.Errorf("%s: %v, want one cache alone: %t", id, r.n[id], want)
		}
	}
	src := &bkexporter.Source{}
	done := r.addPush("a", src)
	if r.alone("a", aCache) || r.alone("a", aPush) {
		t.Errorf("a cache beside a push is alone: %v", r.n)
	}
	done()
	done()
	if !r.alone("a", aCache) {
		t.Errorf("pushed: %v", r.n)
	}
	end(io.EOF)
	for deadline := time.Now().Add(10 * time.Second); r.left("a") && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if r.left("a") {
		t.Errorf("the build is over: %v", r.n)
	}
	// Of what is never pushed, because another output fails, nothing is left.
	r.addPush("e", &bkexporter.Source{})
	for deadline := time.Now().Add(10 * time.Second); r.left("e") && time.Now().Before(deadline); {
		runtime.GC()
	}
	if r.left("e") {
		t.Errorf("not pushed: %v", r.n)
	}
	runtime.KeepAlive(src)
}

func (r *readers) left(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n[id] != nil
}

// The blobs of lazy layers are passed on to a cache, unless others want them.
func TestCacheStreams(t *testing.T) {
	lazy := ocispecs.Descriptor{Digest: digest.FromString("lazy")}
	blobs := &registryBlobs{lazy: map[digest.Digest]bool{lazy.Digest: true}}
	remote := &solver.Remote{Descriptors: []ocispecs.Descriptor{lazy}, Provider: contentutil.NewMultiProvider(contentStore(t))}
	resolve := func(context.Context, session.Group, map[string]string) (remotecache.Exporter, error) {
		return &cacheTo{}, nil
	}
	for name, c := range map[string]struct {
		caches  []remotecache.ResolveCacheExporterFunc
		pushes  bool
		streams bool
	}{
		"alone":              {[]remotecache.ResolveCacheExporterFunc{Cache("registry", resolve, nil, nil)}, false, true},
		"two":                {[]remotecache.ResolveCacheExporterFunc{Cache("registry", resolve, nil, nil), Cache("local", resolve, nil, nil)}, false, false},
		"beside a push":      {[]remotecache.ResolveCacheExporterFunc{Cache("registry", resolve, nil, nil)}, true, false},
		"one that seeks":     {[]remotecache.ResolveCacheExporterFunc{Shared(resolve)}, false, false},
		"beside one of them": {[]remotecache.ResolveCacheExporterFunc{Shared(resolve), Cache("local", resolve, nil, nil)}, false, false},
		"no cache":           {nil, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			g, src := session.NewGroup("cache "+name), &bkexporter.Source{}
			for _, resolve := range c.caches {
				if _, err := resolve(t.Context(), g, nil); err != nil {
					t.Fatal(err)
				}
			}
			if c.pushes {
				defer wanted.addPush("cache "+name, src)()
			}
			got := ToCache([]*solver.Remote{remote}, blobs, g)[0]
			if _, err := got.Provider.ReaderAt(t.Context(), lazy); errors.Is(err, errStreamed) != c.streams {
				t.Errorf("%v, want it streamed: %t", err, c.streams)
			}
			if _, ok := remote.Provider.(*streaming); ok {
				t.Error("BuildKit's own remote has changed")
			}
			runtime.KeepAlive(src)
		})
	}
}

// Two outputs that push have the layers from the content store.
func TestTwoPushes(t *testing.T) {
	lazy := ocispecs.Descriptor{Digest: digest.FromString("lazy")}
	ref := &remoteRef{remote: solver.Remote{Descriptors: []ocispecs.Descriptor{lazy}, Provider: contentutil.NewMultiProvider(contentStore(t))}}
	src := &bkexporter.Source{Ref: ref}
	var outputs [2]*pushes
	var finalize [2]bkexporter.FinalizeFunc
	for i := range outputs {
		outputs[i] = &pushes{name: fmt.Sprint("r.test/a:", i)}
		e := New("image", outputs[i])
		e.Blobs = &registryBlobs{lazy: map[digest.Digest]bool{lazy.Digest: true}}
		inst, err := e.Resolve(t.Context(), i, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, finalize[i], _, err = inst.Export(t.Context(), src, bkexporter.ExportBuildInfo{SessionID: "two pushes"}); err != nil {
			t.Fatal(err)
		}
	}
	for i, streams := range []bool{false, true} { // the second one is alone by then
		if err := finalize[i](t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := outputs[i].late.Provider.ReaderAt(t.Context(), lazy); errors.Is(err, errStreamed) != streams {
			t.Errorf("push %d: %v, want it streamed: %t", i, err, streams)
		}
	}
}
