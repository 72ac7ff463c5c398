package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/fs/remote"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// reader gives the file system the blob of one layer.
type reader struct {
	digest digest.Digest
	local  func() content.Provider
	// generation counts how often kept bytes were found corrupt. See door.refetch.
	generation *atomic.Int64

	mu       sync.Mutex
	blob     *blob.Reader // where new fetchers read
	fetchers []*fetcher
}

// from makes r read from the repository of ref. Fetchers that read the same
// repository go on with the new credentials, others as they are.
func (r *reader) from(ref reference.Spec, size int64, hosts blob.Hosts, opt blob.Options) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.blob != nil && r.blob.Repository() == ref.Locator {
		r.blob.SetHosts(hosts)
		return
	}
	r.blob = blob.New(ref, r.digest, size, hosts, opt)
}

// open returns a fetcher, which lives until Close, and the blob's size in bytes.
func (r *reader) open(ctx context.Context) (*fetcher, int64, error) {
	r.mu.Lock()
	b := r.blob
	r.mu.Unlock()
	size, err := b.Size(ctx)
	if err != nil {
		return nil, 0, err
	}
	f := &fetcher{Readahead: fill.New(localFirst{b, r.digest, r.local}, size, fill.Options{}), digest: r.digest, generation: r.generation}
	f.lifetime, f.end = context.WithCancelCause(context.Background())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fetchers = append(r.fetchers, f)
	return f, size, nil
}

// forget drops what the fetchers hold in memory.
func (r *reader) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.fetchers {
		f.Forget()
	}
}

// Close ends all reads.
func (r *reader) Close() error {
	r.mu.Lock()
	fetchers := r.fetchers
	r.fetchers = nil
	r.mu.Unlock()
	var errs []error
	for _, f := range fetchers {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// fetcher is what the file system reads a blob by.
type fetcher struct {
	*fill.Readahead
	digest     digest.Digest
	generation *atomic.Int64
	lifetime   context.Context //nolint:containedctx // of reads that the file system bounds by minutes
	end        context.CancelCauseFunc
}

var _ remote.Fetcher = (*fetcher)(nil)

// Fetch implements remote.Fetcher.
func (f *fetcher) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(f.lifetime, func() { cancel(context.Cause(f.lifetime)) })
	body, err := f.Readahead.Fetch(ctx, off, n)
	if err != nil {
		stop()
		cancel(err)
		return nil, err
	}
	return &bounded{body, func() { stop(); cancel(context.Canceled) }}, nil
}

// Close ends the fetcher's reads and waits for those ahead.
func (f *fetcher) Close() error {
	f.end(errUnmounted)
	return f.Readahead.Close()
}

// bounded is a body whose context ends with it.
type bounded struct {
	io.ReadCloser
	end func()
}

// Close implements io.Closer.
func (b *bounded) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}

// Check implements remote.Fetcher. Whether the registry answers shows when a byte
// is missing, and then it is retried: only a fetcher that has ended is of no use.
func (f *fetcher) Check() error { return f.Err() }

// GenID implements remote.Fetcher: the key of a range in the file system's cache.
func (f *fetcher) GenID(off, size int64) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s-%d-%d-%d", f.digest, f.generation.Load(), off, size))
	return hex.EncodeToString(sum[:])
}
