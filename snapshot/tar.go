package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Tar returns the tar that a layer was made of, out of what has arrived of it: a layer that the store has, mounted or not. What hasn't is fetched, in
// few requests, and isn't kept. labels are those that Prepare gets. The caller closes the tar, until when the layer stays in the store.
//
// Podman's dialect of zstd:chunked says all that there is in a tar besides files: headers is where, as zstdchunked.TarSplitAnnotation has it. So only
// chunks are fetched that haven't arrived. Of eStargz, headers are in the blob alone, wherever a file ends: all of it is fetched but for the inside
// of large files. What decompresses to the DiffID is that tar with toc behind it, a gzip'ed tar itself, which is nil of zstd:chunked.
//
// The error is an fs.ErrNotExist if nothing would be gained by this. Nothing has verified the headers: the DiffID is for the caller to compare.
func (s *Snapshotter) Tar(ctx context.Context, labels map[string]string, sessions []string, headers zstdchunked.Position) (tar io.ReadCloser, toc []byte, err error) {
	opened, err := s.door.openStored(ctx, labels, sessions)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.door.release(opened))
		}
	}()
	if opened.format == FormatZstdChunked {
		tar, err = opened.splitTar(ctx, headers)
	} else {
		tar, toc, err = opened.gzipTar(ctx)
	}
	if err != nil {
		return nil, nil, err
	}
	return &heldTar{tar, opened}, toc, nil
}

// heldTar keeps its layer open.
type heldTar struct {
	io.ReadCloser
	served *served
}

// Close implements io.Closer.
func (t *heldTar) Close() error {
	return errors.Join(t.ReadCloser.Close(), t.served.engine.release(t.served))
}

// near is how many bytes of a blob are received and dropped rather than left out by another request: about what arrives in the time that one takes.
const near = 256 << 10

// openStored returns a layer that the store has, when it is open. The caller releases it.
func (e *engine) openStored(ctx context.Context, labels map[string]string, sessions []string) (*served, error) {
	src, err := parseLabels(labels)
	if err != nil {
		return nil, err
	}
	toc, err := digest.Parse(labels[estargz.TOCJSONDigestAnnotation])
	if err != nil {
		return nil, fmt.Errorf("label %s: %w", estargz.TOCJSONDigestAnnotation, err)
	}
	key := store.Key{Blob: src.digest, TOC: toc}
	s := e.hold(key)
	if s == nil {
		kept, err := e.store.Acquire(key)
		if err != nil {
			return nil, err
		}
		defer kept.Release()
		src.sessions = sessions
		if s, err = e.acquire(ctx, src, key); err != nil {
			return nil, err
		}
	}
	select {
	case <-s.ready:
		err = s.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(explainOpening(src.digest, err), e.release(s))
	}
	return s, nil
}

// hold returns a layer that is open or being opened, which the caller releases; nil if there is none. It's read from where it was.
func (e *engine) hold(key store.Key) *served {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.layers[key]
	if e.closed || s == nil || s.refs == 0 {
		return nil
	}
	s.refs++
	return s
}
