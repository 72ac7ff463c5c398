package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Tar returns the tar that a layer was made of, out of what has arrived of it. What hasn't is fetched, in as few requests as it takes, and isn't kept.
// The layer is one that the store has, mounted or not, in Podman's dialect of zstd:chunked, the only format that says all that there is in the tar
// besides files: headers is where, as zstdchunked.TarSplitAnnotation has it. labels are those that Prepare gets. The caller closes the tar, until when
// the layer stays in the store.
//
// The error is an fs.ErrNotExist if the store hasn't got the layer. Chunks are verified, headers aren't: the DiffID is for the caller to compare.
func (s *Snapshotter) Tar(ctx context.Context, labels map[string]string, sessions []string, headers zstdchunked.Position) (_ io.ReadCloser, err error) {
	if headers.Offset < 0 || headers.Size <= 0 || headers.Size > toc.MaxCompressed {
		return nil, fmt.Errorf("headers of the tar at %s: %w", headers, fs.ErrInvalid)
	}
	opened, err := s.door.openStored(ctx, labels, sessions)
	if err != nil {
		return nil, err
	}
	t := &layerTar{ctx: ctx, served: opened, layer: opened.held.Model(), frame: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	body, err := opened.Fetch(ctx, headers.Offset, headers.Size)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	split := make([]byte, headers.Size)
	if _, err := io.ReadFull(body, split); err != nil {
		return nil, fmt.Errorf("read the headers of the tar: %w", err)
	}
	t.Tar, err = zstdchunked.OpenTar(bytes.NewReader(split), t.layer, t.chunk)
	return t, err
}

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

// near is how many bytes of a blob are received and dropped rather than left out by another request: about what arrives in the time that one takes.
const near = 256 << 10

// A layerTar is a tar whose files come chunk by chunk, about in the order of the blob.
type layerTar struct {
	*zstdchunked.Tar
	ctx    context.Context //nolint:containedctx // an io.Reader has no other way to be cancelled
	served *served
	layer  *layer.Layer
	buf    []byte // of a chunk

	body    io.ReadCloser // of several frames
	at, end int64         // of body in the blob

	frame  int // that is being decompressed; -1 for none
	packed *io.LimitedReader
	plain  io.ReadCloser
	pos    int64 // of plain
}

// chunk returns a chunk, in bytes that the next one overwrites.
func (t *layerTar) chunk(i int) ([]byte, error) {
	ch := &t.layer.Chunks[i]
	if int64(cap(t.buf)) < ch.Size {
		t.buf = make([]byte, ch.Size)
	}
	p := t.buf[:ch.Size]
	if n, err := t.served.held.ReadAt(p, ch.Data); n == len(p) {
		return p, nil
	} else if !errors.Is(err, store.ErrMissing) {
		return nil, fmt.Errorf("read chunk %d: %w", i, err)
	}
	if t.frame != int(ch.Frame) || t.pos > int64(ch.Inner) {
		if err := t.open(int(ch.Frame)); err != nil {
			return nil, err
		}
	}
	if _, err := io.CopyN(io.Discard, t.plain, int64(ch.Inner)-t.pos); err != nil {
		return nil, fmt.Errorf("decompress chunk %d: %w", i, err)
	}
	v, err := t.layer.ReadChunk(i, t.plain, p)
	if err != nil {
		return nil, fmt.Errorf("chunk %d: %w", i, err)
	}
	t.pos = int64(ch.Inner) + ch.Size
	return v.Bytes(), nil
}

// open begins to decompress a frame.
func (t *layerTar) open(frame int) error {
	t.shut()
	f := &t.layer.Frames[frame]
	if t.body == nil || f.Offset < t.at || f.Offset-t.at > near || f.End() > t.end {
		t.hangUp()
		end := t.run(frame)
		body, err := t.served.Fetch(t.ctx, f.Offset, end-f.Offset)
		if err != nil {
			return err
		}
		t.body, t.at, t.end = body, f.Offset, end
	}
	n, err := io.CopyN(io.Discard, t.body, f.Offset-t.at)
	if t.at += n; err != nil {
		return err
	}
	t.packed = &io.LimitedReader{R: t.body, N: f.Size}
	if t.plain, err = t.layer.Codec.Decompress(t.packed); err != nil {
		return err
	}
	t.frame, t.pos = frame, 0
	return nil
}

// run returns where the frames end that are fetched in one request, from the first on.
func (t *layerTar) run(first int) (end int64) {
	end = t.layer.Frames[first].End()
	for i := first + 1; i < len(t.layer.Frames) && t.layer.Frames[i].Offset-end <= near; i++ {
		if f := &t.layer.Frames[i]; t.misses(f) {
			end = f.End()
		}
	}
	return end
}

// misses reports whether a chunk of the frame isn't there, as far as that is known without reading it.
func (t *layerTar) misses(f *layer.Frame) bool {
	for i := range f.NumChunks {
		if !t.served.held.Have(int(f.FirstChunk + i)) {
			return true
		}
	}
	return false
}

// shut ends the frame at hand.
func (t *layerTar) shut() {
	if t.frame < 0 {
		return
	}
	t.plain.Close()
	t.at += t.layer.Frames[t.frame].Size - t.packed.N
	t.frame = -1
}

func (t *layerTar) hangUp() {
	t.shut()
	if t.body != nil {
		t.body.Close()
		t.body = nil
	}
}

// Close implements io.Closer.
func (t *layerTar) Close() error {
	var err error
	if t.Tar != nil {
		err = t.Tar.Close()
	}
	t.hangUp()
	return errors.Join(err, t.served.engine.release(t.served))
}
