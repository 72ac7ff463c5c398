package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Usage implements snapshots.Snapshotter. A lazy layer takes what has arrived of it and what is known of it, also if
// it shares that with another snapshot.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	usage, err := s.Snapshotter.Usage(ctx, key)
	if err != nil {
		return usage, err
	}
	info, err := s.Stat(ctx, key)
	if err != nil {
		return usage, err
	}
	if want, ok := storeKey(info); ok {
		for _, u := range s.door.store.Usage() {
			if u.Key == want {
				usage.Size += u.Bytes
			}
		}
	}
	return usage, nil
}

// Layers returns the bytes on disk of all lazy layers, by the digests of their blobs.
func (s *Snapshotter) Layers() map[digest.Digest]int64 {
	sizes := map[digest.Digest]int64{}
	for _, u := range s.door.store.Usage() {
		sizes[u.Key.Blob] += u.Bytes
	}
	return sizes
}

// sweep frees what the store has of layers that no snapshot has any more.
func (s *Snapshotter) sweep(ctx context.Context) error {
	list := s.door.store.Usage() // first: what comes afterwards isn't judged
	used := map[store.Key]bool{}
	if err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if key, ok := storeKey(info); ok {
			used[key] = true
		}
		return nil
	}); err != nil && !cerrdefs.IsNotFound(err) {
		return err
	}
	var errs []error
	for _, u := range list {
		if u.Refs > 0 || used[u.Key] {
			continue
		}
		// Somebody may have begun to use it, or have removed it.
		if err := s.door.store.Remove(u.Key); err != nil && !errors.Is(err, store.ErrInUse) && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("free what lazy layers have left: %w", errors.Join(errs...))
	}
	return nil
}

// storeKey returns what the store knows a snapshot's layer by, false for one that isn't lazy.
func storeKey(info snapshots.Info) (store.Key, bool) {
	if _, remote := info.Labels[labelRemote]; !remote {
		return store.Key{}, false
	}
	key := store.Key{Blob: digest.Digest(info.Labels[LabelDigest]), TOC: digest.Digest(info.Labels[estargz.TOCJSONDigestAnnotation])}
	return key, true
}
