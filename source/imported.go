package source

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// FromRemote makes a ref of a result in an imported cache, by next, which is BuildKit's own way. Where its lowest layers are those
// of an image that the build is FROM, they are what they are for FROM: lazy, from the image's registry. The others are lazy if the cache is in
// a registry too, and says what their tables of contents are.
//
// Only the build's own images count, and the cache that the layer is imported from. To take a table of contents for a blob because some other
// build has an image that says so would let that image change what this build reads.
func (s *Snapshotter) FromRemote(ctx context.Context, remote *solver.Remote, next func(context.Context, *solver.Remote) (cache.ImmutableRef, error)) (cache.ImmutableRef, error) {
	if len(remote.Descriptors) == 0 {
		return next(ctx, remote)
	}
	p, n := s.base(ctx, remote.Descriptors)
	descs := slices.Clone(remote.Descriptors)
	from := contentutil.NewMultiProvider(remote.Provider)
	for i := range n {
		l := &p.layers[i]
		descs[i].Annotations = maps.Clone(descs[i].Annotations)
		for _, k := range lazyAnnotations {
			if v := l.handler.Annotations[k]; v != "" {
				descs[i].Annotations[k] = v
			}
		}
		from.Add(l.desc.Digest, &baseLayer{l})
	}
	c := s.planCache(ctx, remote, n)
	c.followWith(s.opt.Reporter, p, n)
	for i := n; i < len(descs); i++ {
		from.Add(descs[i].Digest, &cachedLayer{remote.Provider, &c.layers[i]})
	}
	ref, err := next(ctx, &solver.Remote{Descriptors: descs, Provider: from})
	if err != nil {
		return nil, err
	}
	if err := s.rememberImported(ctx, p, n, c, ref); err != nil {
		bklog.G(ctx).WithError(err).Warn("lazy layers won't outlive this daemon")
	}
	return ref, nil
}

// annotationCacheRef is where BuildKit's importer of registry caches says which cache a layer is of.
const annotationCacheRef = "containerd.io/distribution.source.ref"

// planCache plans the layers of a result of an imported cache, of which the lowest n are an image's.
func (s *Snapshotter) planCache(ctx context.Context, remote *solver.Remote, n int) *plan {
	descs := remote.Descriptors
	ref := descs[len(descs)-1].Annotations[annotationCacheRef]
	handlers := map[digest.Digest]*cache.DescHandler{}
	for _, d := range descs {
		handlers[d.Digest] = &cache.DescHandler{
			Ref:         ref,
			Annotations: d.Annotations,
			Provider:    func(g session.Group) content.Provider { return contentutil.ProviderForSession(remote.Provider, g) },
		}
	}
	eager := ""
	if ref == "" {
		eager = reasonCache
	}
	c := newPlan(ref, "", descs, handlers, eager)
	c.registry = ref != ""
	c.progress = solver.ProgressControllerFromContext(ctx)
	c.announced = true // what is shown of an image is in its report too
	for i := range c.layers {
		l := &c.layers[i]
		if i < n {
			l.handler = nil // the image's is the one to be found
			continue
		}
		l.handler.SnapshotLabels = c.labels(i)
		l.handler.Provider = l.provider(l.handler.Provider, s.opt.Reporter)
		if unlazySession(remote.Provider, l.desc) != nil {
			s.explain(ctx, c, i)(nil) // BuildKit pulls it at once
		}
	}
	s.plans.add(c)
	return c
}

// base returns the image below the layers, of those that the build is FROM, nil if there is none, and how many of the layers up to the topmost lazy one
// are the image's: 0 if none is.
func (s *Snapshotter) base(ctx context.Context, layers []ocispecs.Descriptor) (best *plan, most int) {
	get := solver.CacheOptGetterOf(ctx)
	if get == nil || len(layers) == 0 {
		return nil, 0
	}
	keys := make([]any, len(layers))
	for i, d := range layers {
		keys[i] = cache.DescHandlerKey(d.Digest)
	}
	for _, v := range get(true, keys...) {
		h, ok := v.(*cache.DescHandler)
		if !ok {
			continue
		}
		p := s.plans.get(h.SnapshotLabels[labelPlan])
		if p == nil {
			continue
		}
		if n := p.lazyBelow(layers); n > most || best == nil {
			best, most = p, n
		}
	}
	return best, most
}

// lazyBelow returns how many of the layers are the image's, counted from the bottom up to the topmost one that can be lazy.
func (p *plan) lazyBelow(layers []ocispecs.Descriptor) int {
	n := 0
	for i := range min(len(layers), len(p.layers)) {
		l, d := &p.layers[i], layers[i]
		if l.handler == nil || l.desc.Digest != d.Digest || l.handler.Annotations[labels.LabelUncompressed] != d.Annotations[labels.LabelUncompressed] {
			break
		}
		if slices.ContainsFunc([]string{tocAnnotation, zstdchunked.ChecksumAnnotation}, func(k string) bool {
			return d.Annotations[k] != "" && d.Annotations[k] != l.handler.Annotations[k]
		}) {
			break
		}
		if l.eager() == "" {
			n = i + 1
		}
	}
	return n
}

// rememberImported keeps the origins of the layers of a ref, of which the lowest n are those of the image base, the others the cache's.
func (s *Snapshotter) rememberImported(ctx context.Context, base *plan, n int, c *plan, ref cache.ImmutableRef) (err error) {
	chain := ref.LayerChain()
	defer func() { err = errors.Join(err, chain.Release(context.WithoutCancel(ctx))) }()
	if n > 0 && len(chain) >= n {
		err = s.remember(base.layers[:n], chain[:n])
	}
	if c.registry && len(chain) == len(c.layers) { // one record per layer
		err = errors.Join(err, s.remember(c.layers[n:], chain[n:]))
	}
	return err
}

// cachedLayer provides a layer's blob as the cache does that has it.
type cachedLayer struct {
	content.InfoReaderProvider
	layer *layer
}

// ProviderForSession is what BuildKit asks for to read with the credentials of a build.
func (l *cachedLayer) ProviderForSession(g session.Group) content.Provider {
	return l.layer.handler.Provider(g)
}

// SnapshotLabels is what BuildKit asks for to make the layer's snapshot.
func (l *cachedLayer) SnapshotLabels([]ocispecs.Descriptor, int) map[string]string {
	return l.layer.handler.SnapshotLabels
}

// UnlazySession is what BuildKit asks for to know whether it must pull the layer while the client is there.
func (l *cachedLayer) UnlazySession(desc ocispecs.Descriptor) session.Group {
	return unlazySession(l.InfoReaderProvider, desc)
}

func unlazySession(p content.Provider, desc ocispecs.Descriptor) session.Group {
	if u, ok := p.(interface {
		UnlazySession(ocispecs.Descriptor) session.Group
	}); ok {
		return u.UnlazySession(desc)
	}
	return nil
}

// baseLayer provides a layer's blob as FROM does.
type baseLayer struct{ *layer }

var _ content.InfoReaderProvider = (*baseLayer)(nil)

// Info implements content.InfoProvider. That a cache no longer has the blob doesn't matter.
func (l *baseLayer) Info(context.Context, digest.Digest) (content.Info, error) {
	return content.Info{Digest: l.desc.Digest, Size: l.desc.Size}, nil
}

// ReaderAt implements content.Provider.
func (l *baseLayer) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	return l.handler.Provider(nil).ReaderAt(ctx, desc)
}

// ProviderForSession is what BuildKit asks for to read with the credentials of a build.
func (l *baseLayer) ProviderForSession(g session.Group) content.Provider {
	return l.handler.Provider(g)
}

// SnapshotLabels is what BuildKit asks for to make the layer's snapshot.
func (l *baseLayer) SnapshotLabels([]ocispecs.Descriptor, int) map[string]string {
	return l.handler.SnapshotLabels
}
