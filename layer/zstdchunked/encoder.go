package zstdchunked

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
)

const (
	// maxFrameHeader is what a zstd frame has in front of its first block and that in front of itself, in bytes.
	maxFrameHeader = 18 + 3
	// window is twice the usual chunk: a frame has its file's chunk within reach, and what is kept of it in memory is bounded for
	// the levels that by themselves would take four times as much.
	window = 8 << 20
)

// encoders are those of a level that nobody uses. The same bytes make the same frame with each of them, whatever it has compressed before.
type encoders struct {
	level zstd.EncoderLevel
	free  sync.Pool
}

// get returns an encoder, for EncodeAll.
func (es *encoders) get() (*zstd.Encoder, error) {
	if e, ok := es.free.Get().(*zstd.Encoder); ok {
		return e, nil
	}
	// The digests of chunks and layers say more than checksums of frames would.
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(es.level), zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithZeroFrames(true))
	if err != nil {
		return nil, fmt.Errorf("zstd encoder of level %d: %w", es.level, err)
	}
	return e, nil
}

func (es *encoders) put(e *zstd.Encoder) { es.free.Put(e) }

// encodersOf are there for every level.
var encodersOf = [...]encoders{
	{level: zstd.SpeedFastest}, {level: zstd.SpeedDefault}, {level: zstd.SpeedBetterCompression}, {level: zstd.SpeedBestCompression},
}
