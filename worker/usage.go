package worker

import (
	"context"
	"fmt"

	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/exporter"
	"github.com/buildkitd-lazy/buildkitd-lazy/source"
)

// What BuildKit's cache manager calls things in its records.
const (
	recordsWithBlob = "blobchainid:" // index of all records that have a blob
	recordBlob      = "cache.blob"
	recordBlobOnly  = "cache.blobonly"
	recordSize      = "snapshot.size"
	recordSnapshot  = "cache.snapshot"
)

// holder is a snapshotter that has lazy layers.
type holder interface {
	// Layers returns the bytes on disk of all lazy layers, by the digests of their blobs.
	Layers() map[digest.Digest]int64
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

// account returns a context in which the cache manager counts what records take beside their blobs, and makes it forget the sizes that it took note of
// when that was something else: to it, a record's size never changes. The notes are looked at, not what was said the last time: an account that takes
// long leaves a note of what was said when it began.
func (w *Worker) account(ctx context.Context) (context.Context, error) {
	lazy, ok := w.snapshotter.(holder)
	if !ok {
		return ctx, nil
	}
	held := lazy.Layers()
	records, err := w.CacheMgr.Search(ctx, recordsWithBlob, true)
	if err != nil {
		return nil, fmt.Errorf("size of lazy layers: %w", err)
	}
	sizes, of, err := w.share(ctx, held, records)
	if err != nil {
		return nil, err
	}
	for blob, sharing := range of {
		size := sizes[blob]
		if info, err := w.ContentStore().Info(ctx, blob); err == nil {
			size += info.Size
		}
		for _, r := range sharing {
			// Where BuildKit itself has unpacked the layer, or made other blobs of it, the note is of more, and made anew each time.
			if last, ok := noted(r); !ok || last == size {
				continue
			}
			if err := r.ClearValueAndIndex(recordSize, ""); err != nil {
				return nil, fmt.Errorf("size of lazy layer %s: %w", blob, err)
			}
		}
	}
	return source.WithSizes(ctx, sizes), nil
}

// share returns, by blobs, what a record takes beside its blob, and the records that do: of a lazy layer what the store has of it, which may be nothing
// any more, and what forced exports have made of it; of one that was unpacked below lazy ones, of which BuildKit isn't told, the files. Records of the
// same blob take the same.
func (w *Worker) share(ctx context.Context, held map[digest.Digest]int64, records []cache.RefMetadata) (sizes map[digest.Digest]int64, of map[digest.Digest][]cache.RefMetadata, err error) {
	sizes, of = map[digest.Digest]int64{}, map[digest.Digest][]cache.RefMetadata{}
	converted := map[digest.Digest]bool{} // that are counted
	unpacked := map[string]bool{}         // snapshots that are
	for _, r := range records {
		if !blobOnly(r) {
			unpacked[r.GetString(recordSnapshot)] = true // by BuildKit
		}
	}
	for _, r := range records {
		blob, snapshot := digest.Digest(r.GetString(recordBlob)), r.GetString(recordSnapshot)
		made := exporter.ConvertedOf(r)
		if !blobOnly(r) && len(made) == 0 {
			continue
		}
		if of[blob] == nil {
			sizes[blob] = held[blob]
		}
		of[blob] = append(of[blob], r)
		for _, m := range made {
			if converted[m] {
				continue
			}
			if info, err := w.ContentStore().Info(ctx, m); err == nil {
				converted[m] = true
				sizes[blob] += info.Size
			}
		}
		if !unpacked[snapshot] {
			unpacked[snapshot] = true
			files, err := w.planner.Unpacked(ctx, snapshot)
			if err != nil {
				return nil, nil, fmt.Errorf("size of layer %s, unpacked: %w", blob, err)
			}
			sizes[blob] += files
		}
	}
	for blob, sharing := range of {
		sizes[blob] /= int64(len(sharing))
	}
	return sizes, of, nil
}

// noted returns the size of a record that the cache manager has taken note of, false if it hasn't.
func noted(r cache.RefMetadata) (size int64, ok bool) {
	v := r.Get(recordSize)
	ok = v != nil && v.Unmarshal(&size) == nil
	return size, ok
}

// blobOnly reports whether nothing has been unpacked for the record.
func blobOnly(r cache.RefMetadata) bool {
	var only bool
	v := r.Get(recordBlobOnly)
	return v != nil && v.Unmarshal(&only) == nil && only
}
