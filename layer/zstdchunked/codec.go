package zstdchunked

import (
	"io"
	"io/fs"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Codec decompresses zstd frames. It implements [layer.Codec].
type Codec struct{}

const (
	// maxRatio is that of a block of one byte repeated: 4 bytes for up to 128 KiB.
	maxRatio = 128 << 10 / 4
	// maxWindow is what zstd by itself decompresses, and what it writes with --long. Writers of layers stay below 32 MiB.
	maxWindow = 128 << 20
)

// Decompress implements [layer.Codec]. What follows in r may have been read, and if it is more frames, be read on. The reader must be
// closed.
func (Codec) Decompress(r io.Reader) (io.ReadCloser, error) {
	d, _ := decoders.Get().(*zstd.Decoder)
	if d == nil {
		var err error
		// One goroutine, the reader's: frames are decompressed beside each other. The checksums of frames would only say once
		// more what the digests of chunks do.
		if d, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.IgnoreChecksum(true)); err != nil {
			return nil, err
		}
	}
	if err := d.Reset(r); err != nil {
		decoders.Put(d)
		return nil, err
	}
	return &frameReader{d}, nil
}

// decoders holds those that nobody uses.
var decoders sync.Pool

// frameReader is what its user has of a decoder, until it's closed.
type frameReader struct{ d *zstd.Decoder }

func (r *frameReader) Read(p []byte) (int, error) {
	if r.d == nil {
		return 0, fs.ErrClosed
	}
	return r.d.Read(p)
}

func (r *frameReader) Close() error {
	if r.d != nil {
		// It forgets what it has read from; after an error it's of no use.
		if r.d.Reset(nil) == nil {
			decoders.Put(r.d)
		}
		r.d = nil
	}
	return nil
}
