package source

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// accountKey is where a context has the sizes of lazy layers.
type accountKey struct{}

// WithSizes returns a context in which BuildKit's cache manager counts lazy layers: sizes are the bytes that each record
// of a blob takes, by the blob's digest.
//
// The cache manager counts a lazy record by what the content store has of its blob, and can't even load one without
// a handler. So in this context a lazy layer is local, and its blob has that size; which is a lie about a blob, so the
// context is for counting alone.
func WithSizes(ctx context.Context, sizes map[digest.Digest]int64) context.Context {
	return context.WithValue(ctx, accountKey{}, sizes)
}

func sizesOf(ctx context.Context) map[digest.Digest]int64 {
	sizes, _ := ctx.Value(accountKey{}).(map[digest.Digest]int64)
	return sizes
}

// Unpacked returns the bytes of the files that a layer was unpacked to, as a snapshot: 0 if that's lazy, or there is none.
func (s *Snapshotter) Unpacked(ctx context.Context, key string) (int64, error) {
	info, err := s.Snapshotter.Stat(ctx, key)
	var usage snapshots.Usage
	if _, lazy := info.Labels[labelRemote]; err == nil && !lazy {
		usage, err = s.Usage(ctx, key)
	}
	if cerrdefs.IsNotFound(err) {
		return 0, nil
	}
	return usage.Size, err
}

// ContentStore wraps the content store that the cache manager gets.
func (s *Snapshotter) ContentStore(next content.Store) content.Store { return &contentStore{next, s} }

type contentStore struct {
	content.Store
	s *Snapshotter
}

// Info implements content.InfoProvider.
func (c *contentStore) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	info, err := c.Store.Info(ctx, dgst)
	if sizes := sizesOf(ctx); sizes != nil {
		if size, ok := sizes[dgst]; ok && (err == nil || cerrdefs.IsNotFound(err)) {
			info.Digest, info.Size = dgst, info.Size+size
			return info, nil
		}
	}
	if cerrdefs.IsNotFound(err) && c.s.restoring.Load() {
		if from, ok := c.s.origins.get(dgst); ok {
			return content.Info{Digest: dgst, Size: from.Desc.Size}, nil
		}
	}
	return info, err
}

// local reports whether the cache manager is to take the lazy layer with that blob for a local one, whatever is
// missing.
func (s *Snapshotter) local(ctx context.Context, dgst digest.Digest) bool {
	if _, ok := sizesOf(ctx)[dgst]; ok {
		return true
	}
	if !s.restoring.Load() {
		return false
	}
	_, ok := s.origins.get(dgst)
	return ok
}
