package worker

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// manifests is the content store that manifests of images are written to when their configuration is asked for. That is the round trip
// after: what is known of the layers by then is told before.
type manifests struct{ content.Store }

// arrived is called with the digest of a manifest that has been written where the context has it, and mustn't wait.
type arrived func(ctx context.Context, manifest digest.Digest)

type arrivedKey struct{}

// Writer implements content.Ingester.
func (m manifests) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := m.Store.Writer(ctx, opts...)
	if err != nil {
		return nil, err
	}
	tell, ok := ctx.Value(arrivedKey{}).(arrived)
	if !ok {
		return w, nil
	}
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return w, nil //nolint:nilerr // the store has taken it
		}
	}
	if !images.IsManifestType(o.Desc.MediaType) {
		return w, nil
	}
	return manifestWriter{w, tell}, nil
}

type manifestWriter struct {
	content.Writer
	tell arrived
}

// Commit implements content.Writer.
func (w manifestWriter) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	err := w.Writer.Commit(ctx, size, expected, opts...)
	if err == nil || cerrdefs.IsAlreadyExists(err) {
		w.tell(ctx, expected)
	}
	return err
}
