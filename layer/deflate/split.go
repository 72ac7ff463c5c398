package deflate

import (
	"math"
	"math/bits"
)

// A histogram is how often each symbol occurs.
type histogram struct {
	litLen [usedLitLen]uint32
	offset [usedOffset]uint32
}

func (h *histogram) add(o *histogram) {
	for i := range h.litLen {
		h.litLen[i] += o.litLen[i]
	}
	for i := range h.offset {
		h.offset[i] += o.offset[i]
	}
}

// Costs are in parts of a bit.
const (
	bit = 256
	// headerCost is what a block takes by itself: its codes, and that they are of whole bits.
	headerCost = 600 * bit
)

// costs are what the symbols of a segment take, by their entropy.
type costs struct {
	alone    int // in a block of their own
	together int // in one block with what is in it already, and that, too
	literal  int // one of the literals, on average
}

// costs returns those of a segment, beside a block: all at once, as it's done for each segment.
func (h *histogram) costs(block *histogram) costs {
	var literals, litLen, offset sum
	literals.add(h.litLen[:endOfBlock], block.litLen[:endOfBlock])
	litLen.add(h.litLen[endOfBlock:], block.litLen[endOfBlock:])
	offset.add(h.offset[:], block.offset[:])
	n := literals.n
	litLen.join(&literals)
	c := costs{alone: litLen.alone() + offset.alone(), together: litLen.together() + offset.together(), literal: usualLiteral}
	if n > 0 {
		c.literal = weighted(litLen.n)/litLen.n - literals.weight/n
	}
	return c
}

// A sum is of symbols of one alphabet: how often they occur, and their weights, in a segment, and in that and a block.
type sum struct{ n, weight, nBoth, weightBoth int }

func (s *sum) add(segment, block []uint32) {
	block = block[:len(segment)]
	for i, f := range segment {
		both := int(f + block[i])
		s.n += int(f)
		s.weight += weighted(int(f))
		s.nBoth += both
		s.weightBoth += weighted(both)
	}
}

func (s *sum) join(o *sum) {
	s.n += o.n
	s.weight += o.weight
	s.nBoth += o.nBoth
	s.weightBoth += o.weightBoth
}

func (s *sum) alone() int    { return weighted(s.n) - s.weight }
func (s *sum) together() int { return weighted(s.nBoth) - s.weightBoth }

// weights are what weighted returns of what occurs in a segment, as a rule.
var weights = func() (w [8192]uint32) {
	for f := 2; f < len(w); f++ {
		w[f] = uint32(bit * float64(f) * math.Log2(float64(f)))
	}
	return w
}()

// weighted returns f times its binary logarithm, in parts of a bit.
func weighted(f int) int {
	if f < len(weights) {
		return int(weights[f])
	}
	// Twice f has one more for each of them.
	s := bits.Len(uint(f)) - bits.Len(uint(len(weights)-1))
	return int(weights[f>>s])<<s + f*s*bit
}
