package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/session"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// Tar returns the tar that a lazy layer was made of, out of what has arrived of it, where its format allows that: see [snapshot.Snapshotter.Tar]. Else,
// and if nothing has arrived, it is ErrNotFound: the tar is in the blob, which Convert reads. That it's the right one is for the DiffID to say.
func (s *Snapshotter) Tar(ctx context.Context, desc ocispecs.Descriptor, g session.Group) (io.ReadCloser, error) {
	l := s.known(desc.Digest)
	headers, err := zstdchunked.ParsePosition(l.annotations[zstdchunked.TarSplitAnnotation])
	if err != nil || l.refused != nil || s.opt.Tar == nil {
		return nil, fmt.Errorf("headers of the tar of layer %s: %w", desc.Digest, cerrdefs.ErrNotFound)
	}
	t, err := s.opt.Tar(ctx, l.labels, session.AllSessionIDs(g), headers)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("layer %s: %w: %w", desc.Digest, err, cerrdefs.ErrNotFound)
	} else if err != nil {
		return nil, err
	}
	return &shownTar{t, l.status(ctx, "converting")}, nil
}

// A shownTar is shown to the user until it is closed.
type shownTar struct {
	io.ReadCloser
	done func(error)
}

// Close implements io.Closer.
func (t *shownTar) Close() error {
	t.done(nil)
	return t.ReadCloser.Close()
}
