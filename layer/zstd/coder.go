package zstd

import "encoding/binary"

// A coder encodes the sequences of the blocks of a frame.
type coder struct {
	own  [3][2]table // codes that were made for a block: the next one, and one that last may have
	next [3]int      // in own
	last [3]*table   // what the block before has used, nil where that can't be said
}

// How a block says a code.
const (
	modeUsual    = 0
	modeRepeated = 1 // all are one symbol
	modeOwn      = 2
	modeLast     = 3 // as the block before
)

const (
	// leastOwn is how many sequences are worth to look whether a code of their own is.
	leastOwn = 24
	// symbolCost is what the header of a code takes for each symbol, about, in parts of a bit.
	symbolCost = 5 * bit
)

// append appends the sequences of a block, of which the symbols were counted. There's room in out for all that a block can be.
func (c *coder) append(out []byte, seqs []sequence, counts *[3][64]uint32) []byte {
	switch n := len(seqs); {
	case n == 0:
		return append(out, 0)
	case n < 128:
		out = append(out, uint8(n))
	case n < 0x7f00:
		out = append(out, uint8(n>>8)+128, uint8(n))
	default:
		out = append(out, 255, uint8(n-0x7f00), uint8((n-0x7f00)>>8))
	}
	modes := len(out)
	out = append(out, 0)
	var t [3]*table
	for of := range t {
		var mode int
		out, t[of], mode = c.choose(out, of, counts[of][:], len(seqs))
		out[modes] |= uint8(mode << (6 - 2*of))
	}
	out = encode(out, seqs, &t)
	for of := range t {
		if t[of] == &c.own[of][c.next[of]] {
			c.next[of] ^= 1
		}
	}
	c.last = t
	return out
}

// choose finds the code for a field of a block with so many sequences, and appends what says it.
func (c *coder) choose(out []byte, of int, counts []uint32, total int) ([]byte, *table, int) {
	f := &fields[of]
	for counts[len(counts)-1] == 0 {
		counts = counts[:len(counts)-1]
	}
	own := &c.own[of][c.next[of]]
	if only := len(counts) - 1; counts[only] == uint32(total) && total > 2 {
		own.repeat(uint8(only))
		return append(out, uint8(only)), own, modeRepeated
	}
	t, mode := f.usual, modeUsual
	cost := t.cost(counts)
	if last := c.last[of]; last != nil {
		if k := last.cost(counts); k < cost {
			t, mode, cost = last, modeLast, k
		}
	}
	if total < leastOwn || least(counts, total) >= cost {
		return out, t, mode
	}
	log := logFor(total, len(counts), f.most)
	var norm [maxSymbols]int16
	normalize(norm[:len(counts)], counts, total, log)
	own.build(norm[:len(counts)], log)
	return appendDistribution(out, norm[:len(counts)], log), own, modeOwn
}

// least returns about what a code of its own takes for so many symbols, with what says it.
func least(counts []uint32, total int) uint32 {
	cost, all := uint32(0), log2Of(uint32(total))
	for _, k := range counts {
		if k > 0 {
			cost += k*(all-log2Of(k)) + symbolCost
		}
	}
	return cost + cost>>5
}

// usualExtra is how many extra bits of a sequence fit into a word beside the states of three codes, and 7 bits that may be left of what is before. Hardly any has more. One bit of the
// word stays free, so that less than 64 are flushed.
const usualExtra = 63 - 7 - (9 + 8 + 9)

// encode appends sequences, the last one first: a decoder reads from the end.
func encode(to []byte, seqs []sequence, t *[3]*table) []byte {
	tl, tm, tof := t[ofLiterals], t[ofLength], t[ofOffset]
	last := &seqs[len(seqs)-1]
	literals, length, offset := tl.begin(last.literals), tm.begin(last.length), tof.begin(last.offset)
	acc, have := last.extra, uint(last.bits)
	out, n := to[:cap(to)], len(to)
	for i := len(seqs) - 2; i >= 0; i-- {
		binary.LittleEndian.PutUint64(out[n:], acc)
		n, acc, have = n+int(have>>3), acc>>(have&56), have&7
		s := &seqs[i]
		offset, acc, have = tof.step(offset, s.offset, acc, have)
		length, acc, have = tm.step(length, s.length, acc, have)
		literals, acc, have = tl.step(literals, s.literals, acc, have)
		if s.bits > usualExtra {
			binary.LittleEndian.PutUint64(out[n:], acc)
			n, acc, have = n+int(have>>3), acc>>(have&56), have&7
		}
		acc |= s.extra << (have & 63)
		have += uint(s.bits)
	}
	w := bitWriter{out: out[:n], bit: acc, n: have}
	w.flush()
	w.state(tm, length)
	w.state(tof, offset)
	w.state(tl, literals)
	w.add(1, 1) // where the bits end
	w.align()
	return w.out
}

// step adds what leads from the state of a symbol to that of the one before it, which it returns, to a word with so many bits.
func (t *table) step(state uint32, symbol uint8, acc uint64, have uint) (uint32, uint64, uint) {
	s := &t.to[symbol&63]
	n := (state + s.delta) >> 16
	acc |= uint64(state&(1<<(n&31)-1)) << (have & 63)
	return uint32(t.states[(state>>(n&31)+s.next)&(1<<maxLog-1)]), acc, have + uint(n)
}

// state writes the state that a decoder begins with.
func (w *bitWriter) state(t *table, state uint32) {
	w.add(uint64(state&(1<<t.log-1)), t.log)
}
