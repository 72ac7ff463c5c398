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

// Tar returns the tar of a lazy layer out of what has arrived of that, and of eStargz the table of contents behind it, as [snapshot.Snapshotter.Tar]
// does. Where nothing would be gained by it, it is ErrNotFound: the tar is in the blob, which Convert reads. That it's the right one is for the
// DiffID to say.
func (s *Snapshotter) Tar(ctx context.Context, desc ocispecs.Descriptor, g session.Group) (io.ReadCloser, []byte, error) {
	l := s.known(desc.Digest)
	if l.refused != nil || l.labels == nil || s.opt.Tar == nil {
		return nil, nil, fmt.Errorf("what has arrived of layer %s: %w", desc.Digest, cerrdefs.ErrNotFound)
	}
	var headers zstdchunked.Position
	if at, ok := l.annotations[zstdchunked.TarSplitAnnotation]; ok {
		var err error
		if headers, err = zstdchunked.ParsePosition(at); err != nil {
			return nil, nil, fmt.Errorf("layer %s: annotation %s: %w", desc.Digest, zstdchunked.TarSplitAnnotation, err)
		}
	}
	t, toc, err := s.opt.Tar(ctx, l.labels, session.AllSessionIDs(g), headers)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("layer %s: %w: %w", desc.Digest, err, cerrdefs.ErrNotFound)
	} else if err != nil {
		return nil, nil, err
	}
	return &shownTar{t, l.status(ctx, "converting")}, toc, nil
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
