// Package deflate compresses what is in memory to gzip streams (RFC 1951, RFC 1952): frames of layers, of which there are tens of thousands,
// most of them of 64 to 128 KiB.
//
// There is one level. Of Debian's layers it makes what klauspost's gzip makes on level 7, in half the time of that, which is less than that of its level 4;
// of text alone, 3 percent more than level 7. It knows the whole input before it begins, and so has neither a window to move nor a state
// between two calls; a stream depends on its input alone.
//
//	parse    positions -> literals and matches      match.go
//	split    where symbols begin to be others, a new block begins      split.go
//	write    codes of their own for a block, or fixed ones, or none      block.go, huffman.go
//
// Matches are looked for among the last four places with the same four bytes, all four at once, without a branch, and at a position before it's
// known what the one before has; that's what takes most of the time elsewhere, in branches that nobody can predict. A match waits for whether the next
// position has a better one, as in zlib. There are none of three bytes. Where nothing is found for long, positions are left out.
//
// Functions are safe for concurrent use. Nothing fails: what can't be compressed is stored, and has 5 bytes more for each 64 KiB.
package deflate

import (
	"encoding/binary"
	"hash/crc32"
	"sync"
)

const (
	// maxSeqs and maxBlock end blocks that go on and on: in sequences, which are kept in memory, and in bytes, of which there may not be more than
	// code.build can count.
	maxSeqs  = 50_000
	maxBlock = 1 << 20
)

// What literals are taken for that there are too few of to know.
const (
	leastLiteral = 3 * bit / 2
	usualLiteral = 6 * bit
	mostLiteral  = 9 * bit
)

const (
	gzipHeader  = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" // no name, no time, no system that it's from
	gzipTrailer = 8
)

// MaxSize returns the size of the largest gzip stream that AppendGzip makes of n bytes.
func MaxSize(n int) int { return len(gzipHeader) + storedSize(n) + gzipTrailer }

// storedSize is what n bytes take in blocks that aren't compressed.
func storedSize(n int) int { return n + 5*max(1, (n+maxStored-1)/maxStored) }

// AppendGzip appends a gzip stream of p to dst, and returns the extended buffer. It allocates if there's no room for the stream and some
// 100 bytes behind it.
func AppendGzip(dst, p []byte) []byte {
	e := encoders.Get().(*encoder)
	defer encoders.Put(e)
	return e.appendGzip(dst, p)
}

// encoders are those that nobody uses. One takes up to 600 KB.
var encoders = sync.Pool{New: func() any { return new(encoder) }}

// An encoder is what one stream takes in the making.
type encoder struct {
	finder  finder
	block   block
	segment histogram // of what parse has looked at last
	literal int       // what one takes there, on average, in parts of a bit
}

func (e *encoder) appendGzip(dst, p []byte) []byte {
	w := bitWriter{out: append(dst, gzipHeader...)}
	e.deflate(&w, p)
	w.out = binary.LittleEndian.AppendUint32(w.out, crc32.ChecksumIEEE(p))
	return binary.LittleEndian.AppendUint32(w.out, uint32(len(p)))
}

// deflate appends the blocks of a stream.
func (e *encoder) deflate(w *bitWriter, src []byte) {
	begin := len(w.out)
	e.finder.reset()
	e.literal = usualLiteral
	b := &e.block
	b.drop(len(b.seqs))
	start, soFar := 0, 0 // of the block: where it begins, and its cost
	for pos := 0; pos < len(src); {
		first := len(b.seqs)
		e.segment = histogram{}
		end := e.parse(src, pos)
		cost := e.segment.costs(&b.histogram)
		if first > 0 && (cost.together > soFar+cost.alone+headerCost || len(b.seqs) > maxSeqs || end-start > maxBlock) {
			b.write(w, first, src[start:pos], false)
			b.drop(first)
			start, cost.together = pos, cost.alone
		}
		b.add(&e.segment)
		e.literal = min(max(cost.literal, leastLiteral), mostLiteral)
		soFar, pos = cost.together, end
	}
	b.write(w, len(b.seqs), src[start:], true)
	w.align()
	// Blocks are stored one by one where that is better, which with several takes more headers than with one.
	if stored := storedSize(len(src)); len(w.out)-begin > stored {
		w.out = w.out[:begin]
		w.stored(src, 1)
	}
}
