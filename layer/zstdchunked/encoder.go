package zstdchunked

import (
	"fmt"
	"sync"

	klauspost "github.com/klauspost/compress/zstd"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstd"
)

const (
	// maxFrameHeader is what a zstd frame has in front of its first block and that in front of itself, in bytes.
	maxFrameHeader = 18 + 3
	// window is twice the usual chunk: a frame has its file's chunk within reach, and what is kept of it in memory is bounded for
	// the levels that by themselves would take four times as much.
	window = 8 << 20
)

// An encoder appends a frame of p to dst. The same bytes make the same frame, whatever it has compressed before.
type encoder func(dst, p []byte) ([]byte, error)

// encoderOf returns the encoder of a level. It is safe for concurrent use.
func encoderOf(level klauspost.EncoderLevel) encoder {
	if level == klauspost.SpeedDefault {
		return func(dst, p []byte) ([]byte, error) { return zstd.Append(dst, p), nil }
	}
	return encodersOf[level-klauspost.SpeedFastest].append
}

// encoders are klauspost's of a level that nobody uses.
type encoders struct {
	level klauspost.EncoderLevel
	free  sync.Pool
}

func (es *encoders) append(dst, p []byte) ([]byte, error) {
	e, ok := es.free.Get().(*klauspost.Encoder)
	if !ok {
		var err error
		// The digests of chunks and layers say more than checksums of frames would.
		if e, err = klauspost.NewWriter(nil, klauspost.WithEncoderLevel(es.level), klauspost.WithWindowSize(window), klauspost.WithEncoderConcurrency(1),
			klauspost.WithEncoderCRC(false), klauspost.WithZeroFrames(true)); err != nil {
			return nil, fmt.Errorf("zstd encoder of level %d: %w", es.level, err)
		}
	}
	defer es.free.Put(e)
	return e.EncodeAll(p, dst), nil
}

// encodersOf are there for every level.
var encodersOf = [...]encoders{
	{level: klauspost.SpeedFastest}, {level: klauspost.SpeedDefault}, {level: klauspost.SpeedBetterCompression}, {level: klauspost.SpeedBestCompression},
}
