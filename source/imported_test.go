package source

import (
	"context"
	"maps"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// cacheServer is an imported cache that has lost all blobs.
type cacheServer struct{}

func (cacheServer) Info(context.Context, digest.Digest) (content.Info, error) {
	return content.Info{}, cerrdefs.ErrNotFound
}

func (cacheServer) ReaderAt(context.Context, ocispecs.Descriptor) (content.ReaderAt, error) {
	return nil, cerrdefs.ErrNotFound
}

// A result of an imported cache has the layers of the build's own FROM as that has them, as far as they are the same, up to the
// last lazy one.
func TestImportedLayersOfFROM(t *testing.T) {
	for name, c := range map[string]struct {
		image  []string
		known  bool // whether the build is FROM the image
		cached []string
		change func(layers []ocispecs.Descriptor) // what is different in the cache
		want   int                                // layers that are FROM's
	}{
		"all of the image":        {[]string{"lazy0", "lazy1"}, true, []string{"lazy0", "lazy1", "step"}, nil, 2},
		"an eager one below":      {[]string{"eager", "lazy1"}, true, []string{"eager", "lazy1", "step"}, nil, 2},
		"an eager one on top":     {[]string{"lazy0", "eager"}, true, []string{"lazy0", "eager", "step"}, nil, 1},
		"nothing lazy":            {[]string{"eager", "other"}, true, []string{"eager", "other", "step"}, nil, 0},
		"another image's":         {[]string{"lazy0", "lazy1"}, false, []string{"lazy0", "lazy1", "step"}, nil, 0},
		"an image with less":      {[]string{"lazy0", "lazy1"}, true, []string{"lazy0", "step"}, nil, 1},
		"in another order":        {[]string{"lazy0", "lazy1"}, true, []string{"lazy1", "lazy0"}, nil, 0},
		"other table of contents": {[]string{"lazy0", "lazy1"}, true, []string{"lazy0", "lazy1"}, func(l []ocispecs.Descriptor) { l[1].Annotations[tocAnnotation] = digest.FromString("other").String() }, 1},
		"other DiffID":            {[]string{"lazy0", "lazy1"}, true, []string{"lazy0", "lazy1"}, func(l []ocispecs.Descriptor) { l[0].Annotations[labels.LabelUncompressed] = "other" }, 0},
		"scratch":                 {[]string{"lazy0"}, true, nil, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, c.image...)
			opts := map[any]any{}
			for i := range b.plan.layers {
				l := &b.plan.layers[i]
				if toc := l.desc.Annotations[tocAnnotation]; toc != "" {
					l.handler.Annotations[tocAnnotation] = toc
				}
				l.handler.SnapshotLabels = b.plan.labels(i)
				if c.known {
					opts[cache.DescHandlerKey(l.desc.Digest)] = l.handler
				}
			}
			ctx := solver.WithCacheOptGetter(t.Context(), func(ancestors bool, keys ...any) map[any]any {
				found := map[any]any{}
				for _, k := range keys {
					if v, ok := opts[k]; ok && ancestors {
						found[k] = v
					}
				}
				return found
			})
			remote := &solver.Remote{Provider: cacheServer{}}
			for _, n := range c.cached {
				d := eager(n)
				d.Annotations = map[string]string{labels.LabelUncompressed: digest.FromString("unpacked " + n).String()}
				remote.Descriptors = append(remote.Descriptors, d)
			}
			if c.change != nil {
				c.change(remote.Descriptors)
			}
			_, top := records(t, b.plan)
			ref, err := b.FromRemote(ctx, remote, func(ctx context.Context, got *solver.Remote) (cache.ImmutableRef, error) {
				for i, d := range got.Descriptors {
					_, err := got.Provider.Info(ctx, d.Digest)
					if has := err == nil; has != (i < c.want) {
						t.Errorf("layer %d: %v, want it from FROM: %t", i, err, i < c.want)
					}
					if err != nil {
						continue
					}
					if want := b.plan.layers[i].desc.Annotations[tocAnnotation]; d.Annotations[tocAnnotation] != want {
						t.Errorf("layer %d: table of contents %q, want %q", i, d.Annotations[tocAnnotation], want)
					}
					l := got.Provider.(*contentutil.MultiProvider).SnapshotLabels(got.Descriptors, i)
					if !maps.Equal(l, b.plan.layers[i].handler.SnapshotLabels) {
						t.Errorf("layer %d: labels %v", i, l)
					}
					ra, err := contentutil.ProviderForSession(got.Provider, session.NewGroup("s")).ReaderAt(ctx, d)
					if err != nil {
						t.Errorf("layer %d: %v", i, err)
						continue
					}
					ra.Close()
				}
				return top, nil
			})
			if err != nil || ref != cache.ImmutableRef(top) {
				t.Errorf("ref %v, %v", ref, err)
			}
			for i := range b.plan.layers {
				if _, known := b.origins.get(b.plan.layers[i].desc.Digest); known != (i < c.want) {
					t.Errorf("the origin of layer %d is kept: %t", i, known)
				}
			}
			for _, d := range remote.Descriptors {
				if c.change == nil && d.Annotations[tocAnnotation] != "" {
					t.Error("the cache's own descriptor has changed")
				}
			}
		})
	}
}

// The cache manager asks for each layer's snapshot first. What nobody has told an image of isn't tried in vain.
func TestSnapshotOfNoImage(t *testing.T) {
	b := newBench(t, "lazy0")
	err := b.Prepare(t.Context(), "key", "parent", snapshots.WithLabels(map[string]string{snapshot.LabelTarget: "target"}))
	if err == nil || cerrdefs.IsAlreadyExists(err) {
		t.Errorf("error %v, want that it's pulled", err)
	}
	b.wantLog()
}

// unlazying is a cache that BuildKit reads as long as the client is there.
type unlazying struct{ cacheServer }

func (unlazying) UnlazySession(ocispecs.Descriptor) session.Group { return session.NewGroup("client") }

func (cacheAtHand) Info(_ context.Context, dgst digest.Digest) (content.Info, error) {
	return content.Info{Digest: dgst}, nil
}

// cacheAtHand is an imported cache in a registry.
type cacheAtHand struct{ cacheServer }

// A result of an imported cache is lazy above FROM's layers if the cache is in a registry, and says what its tables of contents are.
func TestImportedLayersOfCache(t *testing.T) {
	for name, c := range map[string]struct {
		provider content.InfoReaderProvider
		ref      string
		lazy     []bool
		lines    []string
	}{
		"registry":  {cacheAtHand{}, "registry.test/cache:1", []bool{true, false, true}, nil},
		"elsewhere": {cacheAtHand{}, "", []bool{false, false, false}, nil},
		"client":    {unlazying{}, "", []bool{false, false, false}, []string{"pulling layer lazy0 : its cache isn't in a registry", "pulling layer eager : its cache isn't in a registry", "pulling layer lazy1 : its cache isn't in a registry"}},
	} {
		t.Run(name, func(t *testing.T) {
			names := []string{"lazy0", "eager", "lazy1"}
			b := newBench(t, names...)
			b.plans = plans{} // nothing is known of an image
			ctx := solver.WithCacheOptGetter(t.Context(), func(_ bool, keys ...any) map[any]any {
				found := map[any]any{}
				for _, k := range keys {
					if _, ok := k.(cache.DescHandlerKey); !ok {
						found[k] = progressLog{b} // BuildKit's key for it is its own
					}
				}
				return found
			})
			remote := &solver.Remote{Provider: c.provider}
			for i := range b.plan.layers {
				d := b.plan.layers[i].desc
				d.Annotations = maps.Clone(d.Annotations)
				if d.Annotations == nil {
					d.Annotations = map[string]string{}
				}
				d.Annotations[labels.LabelUncompressed] = digest.FromString("unpacked " + names[i]).String()
				if c.ref != "" {
					d.Annotations[annotationCacheRef] = c.ref
				}
				remote.Descriptors = append(remote.Descriptors, d)
			}
			_, top := records(t, b.plan)
			_, err := b.FromRemote(ctx, remote, func(_ context.Context, got *solver.Remote) (cache.ImmutableRef, error) {
				p := got.Provider.(*contentutil.MultiProvider)
				for i := range got.Descriptors {
					l := p.SnapshotLabels(got.Descriptors, i)
					if (l[tocAnnotation] != "") != c.lazy[i] || l[snapshot.LabelRef] != c.ref {
						t.Errorf("layer %d: labels %v, want it lazy: %t", i, l, c.lazy[i])
					}
					if unlazy := p.UnlazySession(got.Descriptors[i]) != nil; unlazy != (name == "client") {
						t.Errorf("layer %d is pulled at once: %t", i, unlazy)
					}
				}
				return top, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			for i := range b.plan.layers {
				if _, known := b.origins.get(b.plan.layers[i].desc.Digest); known != (c.ref != "") {
					t.Errorf("the origin of layer %d is kept: %t", i, known)
				}
			}
			b.wantLines(names, c.lines...)
		})
	}
}
