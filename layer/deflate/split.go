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

// none is an empty one.
var none histogram

func (h *histogram) add(o *histogram) {
	for i := range h.litLen {
		h.litLen[i] += o.litLen[i]
	}
	for i := range h.offset {
		h.offset[i] += o.offset[i]
	}
}

// literals returns what one takes on average, in parts of a bit.
func (h *histogram) literals() int {
	sum, n := 0, 0
	for _, f := range h.litLen[:endOfBlock] {
		sum += weighted(int(f))
		n += int(f)
	}
	if n == 0 {
		return usualLiteral
	}
	all := n
	for _, f := range h.litLen[endOfBlock:] {
		all += int(f)
	}
	return weighted(all)/all - sum/n
}

// Costs are in parts of a bit.
const (
	bit = 256
	// headerCost is what a block takes by itself: its codes, and that they are of whole bits.
	headerCost = 600 * bit
)

// cost returns what the symbols of both take in one block, by their entropy.
func cost(a, b *histogram) int {
	sum, litLen, offset := 0, 0, 0
	for s, f := range a.litLen {
		f := int(f + b.litLen[s])
		sum += weighted(f)
		litLen += f
	}
	for s, f := range a.offset {
		f := int(f + b.offset[s])
		sum += weighted(f)
		offset += f
	}
	return weighted(litLen) + weighted(offset) - sum
}

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
