package estargz

import (
	"bufio"
	"io"
	"io/fs"
	"sync"

	"github.com/klauspost/compress/gzip"
)

// Codec decompresses gzip streams, a frame being one. It implements [layer.Codec].
type Codec struct{}

// maxRatio is deflate's: a match of 258 bytes takes at least 2 bits.
const maxRatio = 1032

// Decompress implements [layer.Codec]. The reader ends where the stream does; what follows in r may have been read.
// It must be closed.
func (Codec) Decompress(r io.Reader) (io.ReadCloser, error) {
	s, _ := streams.Get().(*stream)
	if s == nil {
		s = &stream{in: bufio.NewReaderSize(nil, 32<<10)}
	}
	s.in.Reset(r)
	if err := s.gz.Reset(s.in); err != nil {
		s.release()
		return nil, err
	}
	s.gz.Multistream(false)
	return &streamReader{s}, nil
}

// streams holds streams that nobody reads: one takes 40 KB, most of them zeros that had to be made.
var streams sync.Pool

type stream struct {
	// in stands between the decompressor, which remembers what it reads from, and a frame, which is to be
	// forgotten when it has been read.
	in *bufio.Reader
	gz gzip.Reader
}

func (s *stream) release() {
	s.in.Reset(nil)
	streams.Put(s)
}

// streamReader is what its user has of a stream, until it's closed.
type streamReader struct{ s *stream }

func (r *streamReader) Read(p []byte) (int, error) {
	if r.s == nil {
		return 0, fs.ErrClosed
	}
	return r.s.gz.Read(p)
}

func (r *streamReader) Close() error {
	if r.s != nil {
		r.s.release()
		r.s = nil
	}
	return nil
}
