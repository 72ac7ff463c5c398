package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// splitTar returns the tar of a layer of zstd:chunked.
func (s *served) splitTar(ctx context.Context, headers zstdchunked.Position) (io.ReadCloser, error) {
	if headers == (zstdchunked.Position{}) {
		return nil, fmt.Errorf("headers of the tar: %w", fs.ErrNotExist)
	}
	if headers.Offset < 0 || headers.Size <= 0 || headers.Size > toc.MaxCompressed {
		return nil, fmt.Errorf("headers of the tar at %s: %w", headers, fs.ErrInvalid)
	}
	body, err := s.Fetch(ctx, headers.Offset, headers.Size)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	split := make([]byte, headers.Size)
	if _, err := io.ReadFull(body, split); err != nil {
		return nil, fmt.Errorf("read the headers of the tar: %w", err)
	}
	t := &splitTar{ctx: ctx, served: s, layer: s.held.Model(), frame: -1}
	if t.Tar, err = zstdchunked.OpenTar(bytes.NewReader(split), t.layer, t.chunk); err != nil {
		return nil, err
	}
	return t, nil
}

// A splitTar is a tar whose headers are known, and whose files come chunk by chunk, about in the order of the blob.
type splitTar struct {
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
func (t *splitTar) chunk(i int) ([]byte, error) {
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
func (t *splitTar) open(frame int) error {
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
func (t *splitTar) run(first int) (end int64) {
	end = t.layer.Frames[first].End()
	for i := first + 1; i < len(t.layer.Frames) && t.layer.Frames[i].Offset-end <= near; i++ {
		if f := &t.layer.Frames[i]; t.misses(f) {
			end = f.End()
		}
	}
	return end
}

// misses reports whether a chunk of the frame isn't there, as far as that is known without reading it.
func (t *splitTar) misses(f *layer.Frame) bool {
	for i := range f.NumChunks {
		if !t.served.held.Have(int(f.FirstChunk + i)) {
			return true
		}
	}
	return false
}

// shut ends the frame at hand.
func (t *splitTar) shut() {
	if t.frame < 0 {
		return
	}
	t.plain.Close()
	t.at += t.layer.Frames[t.frame].Size - t.packed.N
	t.frame = -1
}

func (t *splitTar) hangUp() {
	t.shut()
	if t.body != nil {
		t.body.Close()
		t.body = nil
	}
}

// Close implements io.Closer.
func (t *splitTar) Close() error {
	t.hangUp()
	return t.Tar.Close()
}
