// Package zstd compresses what is in memory to frames of zstd (RFC 8878): files of layers, or chunks of them, of which there are tens of
// thousands, most of them of a few KiB, and most bytes in chunks of 4 MiB.
//
// There is one level. Of Debian's layers, file by file, it makes 1 percent less than klauspost's default level, which is zstd's 3, in two thirds of the
// time. It knows the whole input before it begins, and so copies nothing, and has tables that are as large as the input is worth: each frame begins with
// empty ones, and depends on its input alone.
//
//	search, parse    positions -> sequences of literals and a match      match.go
//	joins            a new block, where symbols begin to be others       split.go
//	literals         in a Huffman code                                   block.go, huffman.go
//	sequences        in FSE codes of their own, or usual ones            sequences.go, fse.go
//
// Places where bytes were are found by two hashes, of 8 bytes far away and of 5 nearby, or 4 where the input is small. A place says some bits of the second,
// too, so that hardly any is looked at, which may be far from all caches, that has other bytes.
//
// Functions are safe for concurrent use. Nothing fails: what can't be compressed is stored, and has 3 bytes more for each block: at most two for 8 KiB.
package zstd

import (
	"encoding/binary"
	"math/bits"
	"sync"
)

const (
	magic = 0xFD2FB528
	// window is how far back matches lead. Where the input isn't larger, decoders are told to keep all of it and no more.
	windowLog = 23
	window    = 1 << windowLog
	// maxHeader is the largest header of a frame.
	maxHeader = 4 + 2 + 4
	// maxBlock is what a block decompresses to at most.
	maxBlock = 128 << 10
	// leastRepeated is the shortest block that is written as one byte, repeated.
	leastRepeated = 4
)

// MaxSize returns the size of the largest frame that Append makes of n bytes.
func MaxSize(n int) int { return maxHeader + n + blockHeader*2*(n/segmentSize+1) }

// Append appends a frame of p, of up to 4 GiB, to dst, and returns the extended buffer. The frame has the size of p in its header, and no
// checksum.
func Append(dst, p []byte) []byte {
	e := encoders.Get().(*encoder)
	defer encoders.Put(e)
	return e.frame(dst, p)
}

// encoders are those that nobody uses. One takes 1.5 MB.
var encoders = sync.Pool{New: func() any {
	return &encoder{lits: make([]byte, 0, maxBlock+lookahead), packed: make([]byte, 0, maxPacked)}
}}

// An encoder is what one frame takes in the making.
type encoder struct {
	finder finder
	recent [3]uint32 // offsets, the last one first

	// Of a block, and behind it of the segment that is to be in it or in the next:
	lits           []byte
	seqs           []sequence
	whole, segment histogram
	cost           int // of whole

	packed  []byte
	huffman literalCoder
	coder   coder
}

func (e *encoder) frame(out, p []byte) []byte {
	out = appendFrameHeader(out, len(p))
	if len(p) == 0 {
		return appendBlockHeader(out, blockRaw, 0, true)
	}
	e.finder.reset(len(p))
	e.recent = [3]uint32{1, 4, 8}
	e.huffman.last = false
	e.coder.last = [3]*table{}
	e.drop(len(e.lits), len(e.seqs), 0)
	begin, before := 0, e.recent // of the block at hand
	for pos := 0; pos < len(p); {
		src := p[:min(begin+maxBlock, len(p))]
		end := len(src)
		if end-pos > segmentSize+segmentSize/2 {
			end = pos + segmentSize
		}
		lits, seqs, recent := len(e.lits), len(e.seqs), e.recent
		next := e.parse(src, pos, end)
		if next > pos {
			e.segment.count(e.lits[lits:])
			if (pos > begin || end < len(src)) && !e.joins() {
				var packed bool
				if out, packed = e.block(out, p[begin:pos], lits, seqs, false); packed {
					segment := e.segment
					e.drop(lits, seqs, e.cost)
					e.segment = segment
					e.join()
					before, begin, pos = recent, pos, next
				} else {
					// The segment was parsed as if it were.
					e.drop(len(e.lits), len(e.seqs), 0)
					e.recent, begin = before, pos
				}
				if pos < len(p) {
					continue
				}
			} else {
				e.join()
				pos = next
			}
		}
		if next >= end && pos < len(src) {
			continue
		}
		// There are none but literals behind, which are a block of their own if they are many.
		if tail := src[pos:]; len(tail) < segmentSize || pos == begin {
			e.lits = append(e.lits, tail...)
			e.whole.count(tail)
			pos = len(src)
		}
		var packed bool
		out, packed = e.block(out, p[begin:pos], len(e.lits), len(e.seqs), pos == len(p))
		e.drop(len(e.lits), len(e.seqs), 0)
		if !packed {
			e.recent = before
		}
		before, begin = e.recent, pos
	}
	return out
}

// drop forgets the block, and that much of what is behind it.
func (e *encoder) drop(lits, seqs, cost int) {
	e.lits = e.lits[:copy(e.lits, e.lits[lits:])]
	e.seqs = e.seqs[:copy(e.seqs, e.seqs[seqs:])]
	e.whole, e.segment, e.cost = histogram{}, histogram{}, cost
}

// appendFrameHeader appends the header of a frame of so many bytes.
func appendFrameHeader(out []byte, n int) []byte {
	const single = 1 << 5
	out = binary.LittleEndian.AppendUint32(out, magic)
	switch {
	case n < 256:
		return append(out, single, byte(n))
	case n < 256+1<<16:
		return binary.LittleEndian.AppendUint16(append(out, 1<<6|single), uint16(n-256))
	case n <= window:
		return binary.LittleEndian.AppendUint32(append(out, 2<<6|single), uint32(n))
	}
	return binary.LittleEndian.AppendUint32(append(out, 2<<6, (windowLog-10)<<3), uint32(n))
}

// logOf returns the largest power of two that v, which isn't 0, isn't below.
func logOf(v uint32) uint32 { return uint32(bits.Len32(v)) - 1 }
