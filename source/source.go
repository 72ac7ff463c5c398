package source

import (
	"cmp"
	"context"
	"fmt"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	bksource "github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/containerimage"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/imageutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// Options are what all sources of a worker share.
type Options struct {
	// Snapshotter carries out the plans. Without it all layers are pulled.
	Snapshotter *Snapshotter
	// Eager says why all layers are pulled, if they are.
	Eager string
	// ContentStore holds the manifests which the sources resolve. Required.
	ContentStore content.Store
	// Reporter is told which build uses which image. Required.
	Reporter *report.Reporter
}

// Source is a docker-image or oci-layout source with lazy layers.
type Source struct {
	*containerimage.Source
	opt Options
}

var _ bksource.Source = (*Source)(nil)

// New wraps one of BuildKit's image sources.
func New(src *containerimage.Source, opt Options) *Source {
	return &Source{Source: src, opt: opt}
}

// Resolve implements source.Source.
func (s *Source) Resolve(ctx context.Context, id bksource.Identifier, sm *session.Manager, vtx solver.Vertex) (bksource.SourceInstance, error) {
	inst, err := s.Source.Resolve(ctx, id, sm, vtx)
	if err != nil {
		return nil, err
	}
	i := &instance{SourceInstance: inst, src: s, platform: platforms.DefaultSpec(), eager: s.opt.Eager}
	var platform *ocispecs.Platform
	switch id := id.(type) {
	case *containerimage.ImageIdentifier:
		i.ref, platform, i.limit = id.Reference.String(), id.Platform, id.LayerLimit
		i.registry = true
		if id.RecordType == client.UsageRecordTypeFrontend {
			i.eager = cmp.Or(i.eager, reasonFrontend)
		}
	case *containerimage.OCIIdentifier:
		i.ref, platform, i.limit = id.Reference.String(), id.Platform, id.LayerLimit
		i.eager = cmp.Or(i.eager, reasonLayout)
	default:
		return nil, fmt.Errorf("image source: unexpected identifier %T", id)
	}
	if platform != nil {
		i.platform = *platform
	}
	return i, nil
}

// instance is one image of one build graph.
type instance struct {
	bksource.SourceInstance
	src      *Source
	ref      string
	platform ocispecs.Platform
	limit    *int
	registry bool   // whether its blobs come from a registry, not from a client
	eager    string // why no layer of it is lazy

	mu   sync.Mutex
	plan *plan
}

// CacheKey implements source.SourceInstance: BuildKit's key, and its descriptor
// handlers with our snapshot labels.
func (i *instance) CacheKey(ctx context.Context, jobCtx solver.JobContext, index int) (string, string, solver.CacheOpts, bool, error) {
	ctx, end := i.spanResolve(ctx)
	key, pin, opts, done, err := i.SourceInstance.CacheKey(ctx, jobCtx, index)
	if err != nil {
		end(nil, err)
		return key, pin, opts, done, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	defer func() { end(i.plan, nil) }()
	if i.plan == nil {
		p, err := i.newPlan(ctx, digest.Digest(pin), opts)
		if err != nil {
			return "", "", nil, false, fmt.Errorf("plan layers of %s: %w", i.ref, err)
		}
		i.plan = p
		if sn := i.src.opt.Snapshotter; sn != nil {
			sn.plans.add(p)
		}
	}
	i.reportKept(ctx)
	if jobCtx != nil {
		sessions := session.AllSessionIDs(jobCtx.Session())
		i.src.opt.Reporter.Use(sessions, i.plan.base())
		i.plan.follow(i.src.opt.Reporter, sessions)
	}
	return key, pin, opts, done, nil
}

// reportKept tells the reporter which of the layers that can't be lazy are there from before the daemon started.
func (i *instance) reportKept(ctx context.Context) {
	for n := range i.plan.layers {
		l := &i.plan.layers[n]
		if reason := l.eager(); reason != "" && l.refused() == nil {
			if _, err := i.src.opt.ContentStore.Info(ctx, l.desc.Digest); err == nil {
				i.src.opt.Reporter.Kept(l.desc.Digest, reason)
			}
		}
	}
}

// newPlan reads the manifest that BuildKit has just resolved.
func (i *instance) newPlan(ctx context.Context, root digest.Digest, opts solver.CacheOpts) (*plan, error) {
	handlers := map[digest.Digest]*cache.DescHandler{}
	for k, v := range opts {
		if dgst, ok := k.(cache.DescHandlerKey); ok {
			handlers[digest.Digest(dgst)] = v.(*cache.DescHandler)
		}
	}
	layers, err := i.layers(ctx, root)
	if err != nil {
		return nil, err
	}
	p := newPlan(i.ref, root, layers, handlers, i.eager)
	p.registry = i.registry
	p.platform = platforms.Format(platforms.Normalize(i.platform))
	for n := range p.layers {
		l := &p.layers[n]
		h := l.handler
		if h == nil {
			continue
		}
		p.progress = h.Progress
		if l.eager() != "" && l.eager() != reasonNoTOC {
			// BuildKit binds chain IDs to this annotation and fails on one that is
			// no digest. The map is the descriptor's own.
			if _, err := digest.Parse(h.Annotations[tocAnnotation]); err != nil {
				delete(h.Annotations, tocAnnotation)
			}
		}
		if i.src.opt.Snapshotter != nil {
			h.SnapshotLabels = p.labels(n)
		}
		h.Provider = l.provider(h.Provider, i.src.opt.Reporter)
	}
	return p, nil
}

// layers returns the layers of the image, bottom first.
func (i *instance) layers(ctx context.Context, root digest.Digest) ([]ocispecs.Descriptor, error) {
	cs := i.src.opt.ContentStore
	info, err := cs.Info(ctx, root)
	if err != nil {
		return nil, err
	}
	desc := ocispecs.Descriptor{Digest: root, Size: info.Size}
	ra, err := cs.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	if desc.MediaType, err = imageutil.DetectManifestMediaType(ra); err != nil {
		return nil, err
	}
	mfst, err := images.Manifest(ctx, cs, desc, platforms.Only(i.platform))
	if err != nil {
		return nil, err
	}
	layers := mfst.Layers
	if i.limit != nil && *i.limit < len(layers) {
		layers = layers[:*i.limit]
	}
	return layers, nil
}

// Snapshot implements source.SourceInstance.
func (i *instance) Snapshot(ctx context.Context, jobCtx solver.JobContext) (cache.ImmutableRef, error) {
	ref, err := i.SourceInstance.Snapshot(ctx, jobCtx)
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	p := i.plan
	i.mu.Unlock()
	if sn := i.src.opt.Snapshotter; sn != nil && p != nil {
		sn.announceKnown(ctx, p)
		if i.registry && ref != nil {
			if err := sn.rememberImage(ctx, p, ref); err != nil {
				// The build goes on; the layers are forgotten at a restart.
				bklog.G(ctx).WithError(err).Warn("lazy layers won't outlive this daemon")
			}
		}
	}
	return ref, nil
}
