package layer

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/sha256s"
)

// A Verified is the bytes of a chunk, and the proof that they are: only [Layer.ReadChunk] makes one, which has compared their
// digest. So whoever takes one, as a store does, needs neither trust its caller nor hash again. The zero value is no chunk of
// any layer.
type Verified struct {
	of    *Chunk // the first one of the layer's, packed or not
	chunk int
	bytes []byte
}

// Of reports whether this is a chunk of l.
func (v Verified) Of(l *Layer) bool { return l != nil && len(l.Chunks) > 0 && v.of == &l.Chunks[0] }

// Chunk returns the index in Layer.Chunks.
func (v Verified) Chunk() int { return v.chunk }

// Bytes returns all bytes of the chunk. They are the buffer that ReadChunk was given, which nobody changes while the Verified is in
// use.
func (v Verified) Bytes() []byte { return v.bytes }

// A DigestError says that bytes aren't those of a chunk.
type DigestError struct {
	Chunk     int
	Want, Got [sha256.Size]byte
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("digest mismatch: want sha256:%x, got sha256:%x", e.Want, e.Got)
}

// step is how much of a chunk is hashed at a time: what stays in the processor's cache.
const step = 64 << 10

// ReadChunk reads a chunk from r into buf, which has room for it. If they are other bytes than the layer says, the error is a
// *DigestError; others are those of r, [io.ErrUnexpectedEOF], or [ErrUnreadable].
func (l *Layer) ReadChunk(chunk int, r io.Reader, buf []byte) (Verified, error) {
	p := buf[:l.Chunks[chunk].Size]
	h := newHasher()
	defer hashers.Put(h)
	for at := 0; at < len(p); at += step {
		part := p[at:min(at+step, len(p))]
		if _, err := io.ReadFull(r, part); err != nil {
			return Verified{}, short(err)
		}
		_, _ = h.Write(part)
	}
	if err := l.compare(chunk, h); err != nil {
		return Verified{}, err
	}
	return Verified{&l.Chunks[0], chunk, p}, nil
}

// CheckChunk is ReadChunk for who has no use for the bytes: buf, which they go through, may be smaller than the chunk.
func (l *Layer) CheckChunk(chunk int, r io.Reader, buf []byte) error {
	h := newHasher()
	defer hashers.Put(h)
	size := l.Chunks[chunk].Size
	switch n, err := io.CopyBuffer(h, io.LimitReader(r, size), buf); {
	case err != nil:
		return err
	case n < size:
		return io.ErrUnexpectedEOF
	}
	return l.compare(chunk, h)
}

func (l *Layer) compare(chunk int, h *hasher) error {
	want := l.Digest(chunk)
	if err := l.Err(); err != nil {
		return err
	}
	if h.Sum(h.sum[:0]); h.sum != want {
		return &DigestError{chunk, want, h.sum}
	}
	return nil
}

// short makes of the end of a stream that something was missing.
func short(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A hasher is a SHA-256 that is used again, with room for its sum.
type hasher struct {
	hash.Hash
	sum [sha256.Size]byte
}

// Write implements io.Writer.
func (h *hasher) Write(p []byte) (int, error) {
	sha256s.Write(p, h.Hash)
	return len(p), nil
}

var hashers = sync.Pool{New: func() any { return &hasher{Hash: sha256.New()} }}

func newHasher() *hasher {
	h, _ := hashers.Get().(*hasher)
	h.Reset()
	return h
}
