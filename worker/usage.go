package worker

import (
	"context"
	"fmt"
	"sync"

	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/exporter"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
	"github.com/buildkitd-lazy/buildkitd-lazy/source"
)

// What BuildKit's cache manager calls things in its records.
const (
	recordsWithBlob = "blobchainid:" // index of all records that have a blob
	recordBlob      = "cache.blob"
	recordBlobOnly  = "cache.blobonly"
	recordSize      = "snapshot.size"
)

// accounts are what was last said of the sizes of lazy records, by their ids.
type accounts struct {
	mu   sync.Mutex
	said map[string]int64 // bytes
}

// DiskUsage implements worker.Worker: lazy layers count with what has arrived of them.
func (w *Worker) DiskUsage(ctx context.Context, opt client.DiskUsageInfo) ([]*client.UsageInfo, error) {
	ctx, err := w.account(ctx)
	if err != nil {
		return nil, err
	}
	return w.Worker.DiskUsage(ctx, opt)
}

// Prune implements worker.Worker. By the sizes of lazy layers it knows what it has to remove to keep to a policy.
func (w *Worker) Prune(ctx context.Context, ch chan client.UsageInfo, opts ...client.PruneInfo) error {
	return w.prunes.do(ctx, func(ctx context.Context) error {
		ctx, err := w.account(ctx)
		if err != nil {
			return err
		}
		return w.Worker.Prune(ctx, ch, opts...)
	})
}

// account returns a context in which the cache manager counts lazy layers, and what forced exports have made of them, and makes it forget the
// sizes that it took note of when they had other ones: to it, a record's size never changes. Records of the same blob share what that takes.
func (w *Worker) account(ctx context.Context) (context.Context, error) {
	lazy, ok := w.snapshotter.(*snapshot.Snapshotter)
	if !ok {
		return ctx, nil
	}
	sizes := lazy.Layers()
	records, err := w.CacheMgr.Search(ctx, recordsWithBlob, true)
	if err != nil {
		return nil, fmt.Errorf("size of lazy layers: %w", err)
	}
	of := map[digest.Digest][]cache.RefMetadata{}
	counted := map[digest.Digest]bool{}
	for _, r := range records {
		blob := digest.Digest(r.GetString(recordBlob))
		made := exporter.ConvertedOf(r)
		if _, ok := sizes[blob]; ok && blobOnly(r) || len(made) > 0 {
			of[blob] = append(of[blob], r)
		}
		for _, m := range made {
			if counted[m] {
				continue
			}
			if info, err := w.ContentStore().Info(ctx, m); err == nil {
				counted[m] = true
				sizes[blob] += info.Size
			}
		}
	}
	w.accounts.mu.Lock()
	defer w.accounts.mu.Unlock()
	said := map[string]int64{}
	for blob := range sizes {
		n := int64(len(of[blob]))
		if n == 0 {
			delete(sizes, blob)
			continue
		}
		sizes[blob] /= n
		for _, r := range of[blob] {
			said[r.ID()] = sizes[blob]
			if last, ok := w.accounts.said[r.ID()]; ok && last == sizes[blob] {
				continue
			}
			if err := r.ClearValueAndIndex(recordSize, ""); err != nil {
				return nil, fmt.Errorf("size of lazy layer %s: %w", blob, err)
			}
		}
	}
	w.accounts.said = said
	return source.WithSizes(ctx, sizes), nil
}

// blobOnly reports whether nothing has been unpacked for the record.
func blobOnly(r cache.RefMetadata) bool {
	var only bool
	v := r.Get(recordBlobOnly)
	return v != nil && v.Unmarshal(&only) == nil && only
}
