package zstd

import "math"

// A histogram is how often each literal occurs, and each symbol of the fields of sequences.
type histogram struct {
	literals [256]uint32
	fields   [3][64]uint32
}

// count counts literals.
func (h *histogram) count(p []byte) {
	for _, s := range p {
		h.literals[s]++
	}
}

func (h *histogram) add(o *histogram) {
	for s, n := range o.literals {
		h.literals[s] += n
	}
	for of := range h.fields {
		for s, n := range o.fields[of] {
			h.fields[of][s] += n
		}
	}
}

const (
	// segmentSize is how many bytes, at least, are parsed before it's asked whether they still belong together.
	segmentSize = 8 << 10
	// headerCost is what a block takes by itself: its codes, and that they are what they are.
	headerCost = 1000 * bit
)

// joins reports whether the segment takes no more in the block than in one of its own.
func (e *encoder) joins() bool {
	alone, together := 0, 0
	add := func(segment, block []uint32) {
		var n, nBoth, sum, sumBoth int
		block = block[:len(segment)]
		for s, f := range segment {
			both := f + block[s]
			n += int(f)
			nBoth += int(both)
			sum += weighted(f)
			sumBoth += weighted(both)
		}
		alone += weighted(uint32(n)) - sum
		together += weighted(uint32(nBoth)) - sumBoth
	}
	add(e.segment.literals[:], e.whole.literals[:])
	for of := range e.segment.fields {
		add(e.segment.fields[of][:maxSymbols], e.whole.fields[of][:maxSymbols])
	}
	if e.cost+alone+headerCost < together {
		e.cost = alone
		return false
	}
	e.cost = together
	return true
}

// join adds the segment to the block.
func (e *encoder) join() {
	e.whole.add(&e.segment)
	e.segment = histogram{}
}

// bit is one, where parts of bits are counted.
const bit = 256

// weighted returns f times its binary logarithm, in parts of a bit.
func weighted(f uint32) int { return int(f) * int(log2Of(f)) }

// log2Of returns the binary logarithm of v, which isn't 0, in parts of a bit.
func log2Of(v uint32) uint32 {
	n := logOf(v)
	return n*bit + uint32(fractions[v<<((31-n)&31)>>23&255])
}

// fractions are the logarithms of 1 to 2.
var fractions = func() (f [256]uint8) {
	for i := range f {
		f[i] = uint8(bit * math.Log2(1+(float64(i)+0.5)/256))
	}
	return f
}()
