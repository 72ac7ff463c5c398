package snapshot

import (
	"context"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// localFirst reads a blob from the content store once it's there, e.g. after an
// export that needed all of it, and from the registry until then.
type localFirst struct {
	fill.Fetcher
	digest digest.Digest
	local  func() content.Provider // nil, or returns nil, if there is none
}

// Fetch implements fill.Fetcher.
func (l localFirst) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if l.local != nil {
		if store := l.local(); store != nil {
			ra, err := store.ReaderAt(ctx, ocispecs.Descriptor{Digest: l.digest})
			if err == nil && off+n <= ra.Size() {
				return localBody{io.NewSectionReader(ra, off, n), ra}, nil
			}
			if err == nil {
				ra.Close()
			}
		}
	}
	return l.Fetcher.Fetch(ctx, off, n)
}

// localBody didn't come over the link.
type localBody struct {
	io.Reader
	io.Closer
}

// Local tells package fill.
func (localBody) Local() bool { return true }
