package worker

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/exporter"
)

// GetRemotes says where the blobs of a ref's layers are; cache export asks it.
//
// Asked for all compression variants, BuildKit takes the content store for the
// provider of every layer, lazy ones too, whose blobs are not there; a cache export
// then drops such a chain without a word. Here the variants fall back to the
// provider of the first remote, which fetches lazy blobs when they are read. Those
// are passed on without being kept, where they are read once.
func (w *Worker) GetRemotes(ctx context.Context, ref cache.ImmutableRef, createIfNeeded bool, cfg cacheconfig.RefConfig, all bool, g session.Group) ([]*solver.Remote, error) {
	if ref == nil {
		return nil, nil
	}
	remotes, err := exporter.GetRemotes(ctx, w.ContentStore(), w.conversions, ref, createIfNeeded, cfg, all, g)
	if err != nil || len(remotes) == 0 {
		return remotes, err
	}
	for _, r := range remotes[1:] {
		r.Provider = fallbackProvider{r.Provider, remotes[0].Provider}
	}
	if w.planner != nil {
		remotes = exporter.ToCache(remotes, w.planner, g)
	}
	return remotes, nil
}

// fallbackProvider asks its second provider for what the first has not got.
type fallbackProvider [2]content.InfoReaderProvider

// Info implements content.InfoProvider.
func (p fallbackProvider) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	info, err := p[0].Info(ctx, dgst)
	if cerrdefs.IsNotFound(err) {
		return p[1].Info(ctx, dgst)
	}
	return info, err
}

// ReaderAt implements content.Provider.
func (p fallbackProvider) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	r, err := p[0].ReaderAt(ctx, desc)
	if cerrdefs.IsNotFound(err) {
		return p[1].ReaderAt(ctx, desc)
	}
	return r, err
}

// LoadRef implements worker.Worker.
//
// A ref on lazy layers can only be loaded with handlers that say how to fetch
// them. Where BuildKit looks a step's result up - to see whether it is cached, to
// export it - it has those of the build's own vertices at best, takes the error
// for a lost result, and drops the record. So the handlers of images resolved
// since the daemon's start are kept, and used here.
func (w *Worker) LoadRef(ctx context.Context, id string, hidden bool) (cache.ImmutableRef, error) {
	ref, err := w.Worker.LoadRef(ctx, id, hidden)
	needs, ok := errors.AsType[cache.NeedsRemoteProviderError](err)
	if !ok || w.planner == nil {
		return ref, err
	}
	handlers, known := w.planner.Handlers(needs)
	if !known {
		return nil, err
	}
	opts := []cache.RefOption{handlers}
	if hidden {
		opts = append(opts, cache.NoUpdateLastUsed)
	}
	ref, err = w.CacheMgr.Get(ctx, id, solver.ProgressControllerFromContext(ctx), opts...)
	if err != nil {
		return nil, fmt.Errorf("load ref: %w", err)
	}
	return ref, nil
}
