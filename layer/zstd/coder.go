package zstd

// A coder encodes the sequences of the blocks of a frame.
type coder struct {
	own     [3][2]table // codes that were made for a block: the next one, and one that last may have
	next    [3]int      // in own
	last    [3]*table   // what the block before has used, nil where that can't be said
	counts  [3][64]uint32
	symbols [][3]uint8 // of the sequences
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

// append appends the sequences of a block. There's room in out for all that a block can be.
func (c *coder) append(out []byte, seqs []sequence) []byte {
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
	symbols := c.count(seqs)
	modes := len(out)
	out = append(out, 0)
	var t [3]*table
	for of := range t {
		var mode int
		out, t[of], mode = c.choose(out, of, len(seqs))
		out[modes] |= uint8(mode << (6 - 2*of))
	}
	// A decoder reads from the end.
	w := bitWriter{out: out}
	last := len(seqs) - 1
	y := symbols[last]
	tl, to, tm := t[ofLiterals], t[ofOffset], t[ofLength]
	literals, offset, length := tl.begin(y[ofLiterals]), to.begin(y[ofOffset]), tm.begin(y[ofLength])
	w.extra(&seqs[last], y)
	for i := last - 1; i >= 0; i-- {
		y := symbols[i]
		offset = w.step(to, offset, y[ofOffset])
		length = w.step(tm, length, y[ofLength])
		literals = w.step(tl, literals, y[ofLiterals])
		w.extra(&seqs[i], y)
	}
	w.state(tm, length)
	w.state(to, offset)
	w.state(tl, literals)
	w.add(1, 1) // where the bits end
	w.align()
	for of := range t {
		if t[of] == &c.own[of][c.next[of]] {
			c.next[of] ^= 1
		}
	}
	c.last = t
	return w.out
}

// count counts the symbols of sequences, and returns them.
func (c *coder) count(seqs []sequence) [][3]uint8 {
	if cap(c.symbols) < len(seqs) {
		c.symbols = make([][3]uint8, len(seqs)+len(seqs)/2)
	}
	symbols := c.symbols[:len(seqs)]
	c.counts = [3][64]uint32{}
	for i := range symbols {
		s := &seqs[i]
		l, o, m := symbolOfLiterals(s.literals), symbolOfOffset(s.offset), symbolOfLength(s.length)
		symbols[i] = [3]uint8{ofLiterals: l, ofOffset: o, ofLength: m}
		c.counts[ofLiterals][l&63]++
		c.counts[ofOffset][o&63]++
		c.counts[ofLength][m&63]++
	}
	return symbols
}

// choose finds the code for a field of a block with so many sequences, and appends what says it.
func (c *coder) choose(out []byte, of, total int) ([]byte, *table, int) {
	f, counts := &fields[of], c.counts[of][:]
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
	cost, all := uint32(0), log16(uint32(total))
	for _, k := range counts {
		if k > 0 {
			cost += k*(all-log16(k)) + symbolCost
		}
	}
	return cost + cost>>5
}

// step writes what leads from the state of a symbol to that of the one before it, which it returns.
func (w *bitWriter) step(t *table, state uint32, symbol uint8) uint32 {
	n := (state + t.delta[symbol]) >> 16
	w.add(uint64(state&(1<<n-1)), uint(n))
	return uint32(t.states[int32(state>>n)+t.next[symbol]])
}

// state writes the state that a decoder begins with.
func (w *bitWriter) state(t *table, state uint32) {
	w.add(uint64(state&(1<<t.log-1)), t.log)
}

// extra writes the extra bits of a sequence, behind up to 26 others.
func (w *bitWriter) extra(s *sequence, symbols [3]uint8) {
	n := uint(literalsExtra[symbols[ofLiterals]])
	w.add(uint64(s.literals)&(1<<n-1), n)
	w.flush()
	n = uint(lengthExtra[symbols[ofLength]])
	w.add(uint64(s.length)&(1<<n-1), n)
	n = uint(symbols[ofOffset])
	w.add(uint64(s.offset)&(1<<n-1), n)
	w.flush()
}
