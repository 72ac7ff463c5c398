package deflate

import (
	"math/bits"
	"slices"
)

// A code is a prefix code. Its codewords are reversed, as DEFLATE writes them from their last bit on.
type code struct {
	word [numLitLen]uint16
	size [numLitLen]uint8 // in bits, 0 for what doesn't occur

	sorted [numLitLen]uint32 // for build
}

// bits returns how many bits symbols take that occur so often.
func (c *code) bits(freq []uint32) (n int) {
	for s, f := range freq {
		n += int(f) * int(c.size[s])
	}
	return n
}

// In build, a symbol is one word with how often it occurs, which is less than 1 << (32-symbolBits), so that they sort.
const (
	symbolBits = 9
	symbolMask = 1<<symbolBits - 1
)

// build makes a code of symbols that occur so often, with no codeword above the limit. It has two codewords at least, as there are
// decoders that ask for that.
func (c *code) build(freq []uint32, limit int) {
	clear(c.size[:len(freq)])
	nodes := c.sort(freq)
	if len(nodes) < 2 {
		only := 0
		if len(nodes) == 1 {
			only = int(nodes[0] & symbolMask)
		}
		c.size[0], c.size[max(only, 1)] = 1, 1
	} else {
		join(nodes)
		c.assign(nodes, sizes(nodes, limit), limit)
	}
	c.words(len(freq))
}

// sort returns the symbols that occur, the rarest first, and those that occur as often by number.
func (c *code) sort(freq []uint32) []uint32 {
	// Counting does most of it: what is left to be sorted is what occurs more often than there are symbols.
	var first [numLitLen]uint16
	most := uint32(len(freq) - 1)
	for _, f := range freq {
		first[min(f, most)]++
	}
	n := uint16(0)
	for f := uint32(1); f <= most; f++ {
		first[f], n = n, n+first[f]
	}
	frequent := first[most]
	for s, f := range freq {
		if f != 0 {
			at := &first[min(f, most)]
			c.sorted[*at] = f<<symbolBits | uint32(s)
			*at++
		}
	}
	slices.Sort(c.sorted[frequent:n])
	return c.sorted[:n]
}

// join makes a Huffman tree in place, as in Moffat and Katajainen, "In-Place Calculation of Minimum-Redundancy Codes", 1995. Of the
// symbols nothing stays but their order, in the low bits, and above these are the parents of inner nodes, of which the last is the root.
func join(a []uint32) {
	leaf, inner := 0, 0
	for next := range len(a) - 1 {
		weight := uint32(0)
		for range 2 {
			if leaf < len(a) && (inner == next || a[leaf]>>symbolBits <= a[inner]>>symbolBits) {
				weight += a[leaf] &^ symbolMask
				leaf++
			} else {
				weight += a[inner] &^ symbolMask
				a[inner] = uint32(next)<<symbolBits | a[inner]&symbolMask
				inner++
			}
		}
		a[next] = weight | a[next]&symbolMask
	}
}

// sizes returns how many codewords of each size a tree has. Where it is deeper than the limit, a leaf further up takes two of the codewords
// in its stead, as in libdeflate: not the best of such codes, but close, and such trees are rare.
func sizes(a []uint32, limit int) (count [maxCodeword + 1]uint16) {
	root := len(a) - 2
	a[root] &= symbolMask
	count[1] = 2
	for i := root - 1; i >= 0; i-- {
		depth := a[a[i]>>symbolBits]>>symbolBits + 1
		a[i] = depth<<symbolBits | a[i]&symbolMask
		at := min(int(depth), limit-1)
		if int(depth) >= limit {
			for count[at] == 0 {
				at--
			}
		}
		count[at]--
		count[at+1] += 2
	}
	return count
}

// assign gives the longest codewords to the rarest symbols.
func (c *code) assign(sorted []uint32, count [maxCodeword + 1]uint16, limit int) {
	i := 0
	for size := limit; size > 0; size-- {
		for range count[size] {
			c.size[sorted[i]&symbolMask] = uint8(size)
			i++
		}
	}
}

// words computes the codewords of n symbols from their sizes (RFC 1951, 3.2.2).
func (c *code) words(n int) {
	var count, next [maxCodeword + 1]uint16
	for _, s := range c.size[:n] {
		count[s]++
	}
	count[0] = 0
	for s := 1; s <= maxCodeword; s++ {
		next[s] = (next[s-1] + count[s-1]) << 1
	}
	for s, size := range c.size[:n] {
		c.word[s] = bits.Reverse16(next[size]) >> (16 - size)
		next[size]++
	}
}
