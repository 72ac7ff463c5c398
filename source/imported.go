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
// of an image that the build is FROM, they are what they are for FROM: lazy, from the image's registry. Of a cache they would be
// pulled whole, as few kinds of cache keep the digests of tables of contents.
//
// Only the build's own images count. To take a table of contents for a blob because some other build has an image that says so
// would let that image change what this build reads.
func (s *Snapshotter) FromRemote(ctx context.Context, remote *solver.Remote, next func(context.Context, *solver.Remote) (cache.ImmutableRef, error)) (cache.ImmutableRef, error) {
	p, n := s.base(ctx, remote.Descriptors)
	if n == 0 {
		return next(ctx, remote)
	}
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
	ref, err := next(ctx, &solver.Remote{Descriptors: descs, Provider: from})
	if err != nil {
		return nil, err
	}
	if err := s.rememberBase(ctx, p.layers[:n], ref); err != nil {
		bklog.G(ctx).WithError(err).Warn("lazy layers won't outlive this daemon")
	}
	return ref, nil
}

// base returns the image below the layers, of those that the build is FROM, and how many of the layers up to the topmost lazy one
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
		if n := p.lazyBelow(layers); n > most {
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

// rememberBase keeps the origins of the lowest layers of a ref.
func (s *Snapshotter) rememberBase(ctx context.Context, layers []layer, ref cache.ImmutableRef) (err error) {
	chain := ref.LayerChain()
	defer func() { err = errors.Join(err, chain.Release(context.WithoutCancel(ctx))) }()
	if len(chain) < len(layers) {
		return nil
	}
	return s.remember(layers, chain[:len(layers)])
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
