package zstd

import "bytes"

// Kinds of blocks, and of literals in one.
const (
	blockRaw        = 0
	blockRepeated   = 1
	blockCompressed = 2
	blockHeader     = 3

	literalsRaw      = 0
	literalsRepeated = 1
	literalsHuffman  = 2
	literalsLast     = 3 // in the code of a block before
)

const (
	// maxPacked is more than a block can take, whatever it is: no match takes more than the bytes that it stands for, less than 2 bits apart,
	// and the states of three codes.
	maxPacked = 2*maxBlock + 1024
	// leastHuffman is how many literals are worth a code, and leastStreams how many are in four streams, which decoders read at once.
	leastHuffman = 32
	leastStreams = 1024
)

// block appends the block at hand, which is p, and reports whether it is compressed: with all but the last so many literals and sequences that there are, which are the segment's.
func (e *encoder) block(out, p []byte, lits, seqs int, last bool) ([]byte, bool) {
	if len(p) >= leastRepeated && bytes.Equal(p[1:], p[:len(p)-1]) {
		return append(appendBlockHeader(out, blockRepeated, len(p), last), p[0]), false
	}
	packed := e.appendLiterals(e.packed[:0], e.lits[:lits])
	packed = e.coder.append(packed, e.seqs[:seqs], &e.whole.fields)
	if len(packed) < len(p) {
		return append(appendBlockHeader(out, blockCompressed, len(packed), last), packed...), true
	}
	// Who decompresses doesn't see what this one would have left to the next.
	e.huffman.last = false
	e.coder.last = [3]*table{}
	return append(appendBlockHeader(out, blockRaw, len(p), last), p...), false
}

func appendBlockHeader(out []byte, kind, size int, last bool) []byte {
	h := kind<<1 | size<<3
	if last {
		h |= 1
	}
	return append(out, byte(h), byte(h>>8), byte(h>>16))
}

// appendLiterals appends the literals of a block.
func (e *encoder) appendLiterals(out, lits []byte) []byte {
	n := len(lits)
	if n < leastHuffman {
		return append(appendLiteralsHeader(out, literalsRaw, n), lits...)
	}
	if bytes.Equal(lits[1:], lits[:n-1]) {
		return append(appendLiteralsHeader(out, literalsRepeated, n), lits[0])
	}
	// The kind, what is to follow, and both sizes, of which the second isn't known yet.
	size := 3
	switch {
	case n >= 1<<14:
		size = 5
	case n >= leastStreams:
		size = 4
	}
	begin := len(out) + size
	packed, last := e.huffman.append(out[:begin], lits, &e.whole.literals)
	if packed == nil {
		return append(appendLiteralsHeader(out, literalsRaw, n), lits...)
	}
	h := uint64(literalsHuffman)
	if last {
		h = literalsLast
	}
	switch most := uint64(len(packed) - begin); size {
	case 3:
		h |= uint64(n)<<4 | most<<14
	case 4:
		h |= 2<<2 | uint64(n)<<4 | most<<18
	default:
		h |= 3<<2 | uint64(n)<<4 | most<<22
	}
	for i := len(out); i < begin; i++ {
		packed[i] = byte(h)
		h >>= 8
	}
	return packed
}

// appendLiteralsHeader appends the header of literals that are in no code.
func appendLiteralsHeader(out []byte, kind, n int) []byte {
	switch {
	case n < 1<<5:
		return append(out, byte(kind|n<<3))
	case n < 1<<12:
		h := kind | 1<<2 | n<<4
		return append(out, byte(h), byte(h>>8))
	}
	h := kind | 3<<2 | n<<4
	return append(out, byte(h), byte(h>>8), byte(h>>16))
}
