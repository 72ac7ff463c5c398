package zstd

import (
	"slices"
)

// maxCodeword is how long codewords of literals are, at most.
const maxCodeword = 11

// A code is a Huffman code of literals: a codeword of each, and from the 16th bit on its length, which is 0 where there's none.
type code [256]uint32

func (c *code) length(s int) uint32 { return c[s] >> 16 }

// A literalCoder encodes the literals of the blocks of a frame.
type literalCoder struct {
	codes [2]code
	own   int      // of codes: the other one is that of the last block that has one
	last  bool     // whether there is
	keys  []uint32 // symbols that there are, rare ones first, with their counts above
	nodes []uint32
	table table
}

// keep takes what was counted, and returns how often the most frequent literal occurs.
func (l *literalCoder) keep(counts *[256]uint32) (most uint32) {
	l.keys = l.keys[:0]
	for s, n := range counts {
		if n > 0 {
			l.keys = append(l.keys, n<<8|uint32(s))
			most = max(most, n)
		}
	}
	return most
}

// sort sorts keys by their counts, and those with the same count as they were before: by the symbol. It does so digit by digit, from the lowest
// on: comparing them takes branches that are guessed wrong half of the time.
func (l *literalCoder) sort() {
	const digit, mask = 6, 1<<6 - 1
	all := uint32(0)
	for _, k := range l.keys {
		all |= k
	}
	l.nodes = slices.Grow(l.nodes[:0], len(l.keys))[:len(l.keys)]
	for shift := 8; all>>shift > 0; shift += digit {
		var at [1 << digit]uint16
		for _, k := range l.keys {
			at[k>>shift&mask]++
		}
		sum := uint16(0)
		for i, n := range at {
			at[i] = sum
			sum += n
		}
		for _, k := range l.keys {
			next := &at[k>>shift&mask]
			l.nodes[*next] = k
			*next++
		}
		l.keys, l.nodes = l.nodes, l.keys
	}
}

// build makes the code of what was counted, of two literals or more, and returns the length of its longest codeword.
func (l *literalCoder) build(c *code) uint32 {
	l.sort()
	n := len(l.keys)
	// Leaves are in order, and so are the nodes that two are put together to: each time the two rarest, of either.
	l.nodes = slices.Grow(l.nodes[:0], 4*n)[:4*n]
	weight, parent := l.nodes[:2*n], l.nodes[2*n:]
	for i, k := range l.keys {
		weight[i] = k >> 8
	}
	leaf, node := 0, n
	for next := n; next < 2*n-1; next++ {
		sum := uint32(0)
		for range 2 {
			at := node
			if leaf < n && (node == next || weight[leaf] <= weight[node]) {
				at = leaf
				leaf++
			} else {
				node++
			}
			sum += weight[at]
			parent[at] = uint32(next)
		}
		weight[next] = sum
	}
	depth := weight // which nobody wants any more, from the root on
	depth[2*n-2] = 0
	for i := 2*n - 3; i >= 0; i-- {
		depth[i] = depth[parent[i]] + 1
	}
	// Codewords that are too long get shorter, rare ones longer for that, and then the most frequent ones shorter until none is left over.
	left := 1 << maxCodeword
	for i := range depth[:n] {
		depth[i] = min(depth[i], maxCodeword)
		left -= 1 << (maxCodeword - depth[i])
	}
	for i := 0; left < 0; i = (i + 1) % n {
		for ; depth[i] < maxCodeword && left < 0; depth[i]++ {
			left += 1 << (maxCodeword - depth[i] - 1)
		}
	}
	for left > 0 {
		for i := n - 1; i >= 0; i-- {
			if size := 1 << (maxCodeword - depth[i]); size <= left && depth[i] > 1 {
				depth[i]--
				left -= size
			}
		}
	}
	var lengths [maxCodeword + 2]uint32
	*c = code{}
	longest := uint32(0)
	for i, k := range l.keys {
		c[k&255] = depth[i] << 16
		lengths[depth[i]]++
		longest = max(longest, depth[i])
	}
	var next [maxCodeword + 1]uint32
	first := uint32(0)
	for n := longest; n > 0; n-- {
		next[n] = first
		first = (first + lengths[n]) >> 1
	}
	for s, w := range c {
		if n := w >> 16; n > 0 {
			c[s] = w | next[n]
			next[n]++
		}
	}
	return longest
}

// impossible is more than anything takes, in bits.
const impossible = 1 << 30

// bits returns how many bits the literals take in a code.
func (l *literalCoder) bits(c *code) int {
	sum := 0
	for _, k := range l.keys {
		n := c.length(int(k & 255))
		if n == 0 {
			return impossible
		}
		sum += int(n * (k >> 8))
	}
	return sum
}

// appendCode appends what says a code: of each literal but the last one how long its codeword is. It returns nil where that can't be said.
func (l *literalCoder) appendCode(out []byte, c *code, longest uint32) []byte {
	last := 255
	for c[last] == 0 {
		last--
	}
	var weights [256]uint8
	var counts [maxCodeword + 2]uint32
	w := weights[:last]
	for s := range w {
		if n := c.length(s); n > 0 {
			w[s] = uint8(longest + 1 - n)
		}
		counts[w[s]]++
	}
	const direct = 128
	begin := len(out)
	if packed := l.appendWeights(append(out, 0), w, counts[:]); packed != nil {
		if size := len(packed) - begin - 1; size < 128 && (size < (len(w)+1)/2 || len(w) > direct) {
			packed[begin] = byte(size)
			return packed
		}
	}
	if len(w) > direct {
		return nil
	}
	out = append(out[:begin], byte(127+len(w)))
	for i := 0; i < len(w); i += 2 {
		out = append(out, w[i]<<4|weights[i+1]&15)
	}
	return out
}

// appendWeights appends weights in an FSE code, with two states in turns; nil if they're few, or the same.
func (l *literalCoder) appendWeights(out, w []byte, counts []uint32) []byte {
	for counts[len(counts)-1] == 0 {
		counts = counts[:len(counts)-1]
	}
	if most := slices.Max(counts); len(w) < 3 || most == 1 || int(most) == len(w) {
		return nil
	}
	log := logFor(len(w), len(counts), 6)
	var norm [maxCodeword + 2]int16
	normalize(norm[:len(counts)], counts, len(w), log)
	t := &l.table
	t.build(norm[:len(counts)], log)
	b := bitWriter{out: appendDistribution(out, norm[:len(counts)], log)}
	var states [2]uint32
	for i, symbol := range slices.Backward(w) {
		if i >= len(w)-2 {
			states[i&1] = t.begin(symbol)
			continue
		}
		states[i&1], b.bit, b.n = t.step(states[i&1], symbol, b.bit, b.n)
		b.flush()
	}
	b.state(t, states[1])
	b.state(t, states[0])
	b.add(1, 1)
	b.align()
	return b.out
}

// appendStream appends literals, the last one first: a decoder reads from the end.
func appendStream(out, p []byte, c *code) []byte {
	b := bitWriter{out: out}
	for ; len(p)&3 != 0; p = p[:len(p)-1] {
		w := c[p[len(p)-1]]
		b.add(uint64(w&0xffff), uint(w>>16))
	}
	b.flush()
	for ; len(p) >= 4; p = p[:len(p)-4] {
		q := p[len(p)-4:]
		w := c[q[3]]
		b.add(uint64(w&0xffff), uint(w>>16))
		w = c[q[2]]
		b.add(uint64(w&0xffff), uint(w>>16))
		w = c[q[1]]
		b.add(uint64(w&0xffff), uint(w>>16))
		w = c[q[0]]
		b.add(uint64(w&0xffff), uint(w>>16))
		b.flush()
	}
	b.add(1, 1)
	b.align()
	return b.out
}

const (
	// evenly: literals of which the most frequent one is rarer than one in so many aren't looked at further.
	evenly = 128
	// A 16th and some bytes is what a code must save to be worth that it's decoded.
	leastSaved, leastSavedBytes = 16, 10
	streams                     = 4
)

// append appends what literals of more than one kind are compressed to, and reports whether that's in the code of the last block. It returns nil if it isn't
// worth it. There's room in out for all that a block can be.
func (l *literalCoder) append(out, p []byte, counts *[256]uint32) (packed []byte, last bool) {
	most := l.keep(counts)
	if int(most) < len(p)/evenly || most == 1 {
		return nil, false
	}
	c := &l.codes[l.own]
	longest := l.build(c)
	packed = l.appendCode(out, c, longest)
	cost := impossible
	if packed != nil {
		cost = (len(packed)-len(out))*8 + l.bits(c)
	}
	if before := &l.codes[1-l.own]; l.last {
		if n := l.bits(before); n <= cost {
			packed, c, last, cost = out, before, true, n
		}
	}
	if cost/8 > len(p)-len(p)/leastSaved-leastSavedBytes {
		return nil, false
	}
	if len(p) < leastStreams {
		packed = appendStream(packed, p, c)
	} else {
		jump := len(packed)
		packed = append(packed, 0, 0, 0, 0, 0, 0)
		quarter := (len(p) + streams - 1) / streams
		for i := range streams {
			at := len(packed)
			packed = appendStream(packed, p[i*quarter:min((i+1)*quarter, len(p))], c)
			if size := len(packed) - at; i < streams-1 {
				packed[jump+2*i], packed[jump+2*i+1] = byte(size), byte(size>>8)
			}
		}
	}
	if !last {
		l.own = 1 - l.own
		l.last = true
	}
	return packed, last
}
