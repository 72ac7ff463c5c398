package source

import (
	"context"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// provider wraps the provider of a layer's blob: it counts what is pulled, and
// refuses to pull what must not be used.
func (l *layer) provider(next func(session.Group) content.Provider, rep *report.Reporter) func(session.Group) content.Provider {
	return func(g session.Group) content.Provider {
		return countingProvider{next(g), l, rep}
	}
}

type countingProvider struct {
	content.Provider
	layer *layer
	rep   *report.Reporter
}

// ReaderAt implements content.Provider.
func (p countingProvider) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if err := p.layer.refused(); err != nil {
		return nil, err
	}
	if reason := p.layer.eager(); reason != "" {
		p.rep.Pulled(desc.Digest, reason)
	}
	ra, err := p.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	return &countingReader{ReaderAt: ra, digest: desc.Digest, rep: p.rep}, nil
}

type countingReader struct {
	content.ReaderAt
	digest digest.Digest
	rep    *report.Reporter
}

// ReadAt implements io.ReaderAt.
func (r *countingReader) ReadAt(p []byte, off int64) (int, error) {
	start := time.Now()
	n, err := r.ReaderAt.ReadAt(p, off)
	r.rep.Fetched(r.digest, int64(n), time.Since(start))
	return n, err
}
