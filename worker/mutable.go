package worker

import (
	"context"
	"errors"
	"slices"

	"github.com/moby/buildkit/cache"
	"github.com/opencontainers/go-digest"
)

// mutables is a cache manager that finds the mutable refs on lazy layers again: those of cache mounts that were made `from` an image. BuildKit asks
// for them without the handlers that say how to fetch the layers, which no step has resolved, takes the error for a ref that can't be used, and
// begins with an empty cache. As with [Worker.LoadRef], the handlers that are known are used here.
type mutables struct {
	cache.Manager
	handlers func(blobs []digest.Digest) (cache.DescHandlers, bool)
}

// GetMutable implements cache.Accessor.
func (m *mutables) GetMutable(ctx context.Context, id string, opts ...cache.RefOption) (cache.MutableRef, error) {
	ref, err := m.Manager.GetMutable(ctx, id, opts...)
	needs, ok := errors.AsType[cache.NeedsRemoteProviderError](err)
	if !ok {
		return ref, err
	}
	handlers, known := m.handlers(needs)
	if !known {
		return nil, err
	}
	return m.Manager.GetMutable(ctx, id, append(slices.Clone(opts), handlers)...)
}
