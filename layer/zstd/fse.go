package zstd

import "math/bits"

// Sequences are coded by Finite State Entropy, in three codes: of the numbers of literals, of the lengths of matches, and of their offsets. A code is
// made from a distribution: how many of a table's states, of which there is a power of two, stand for each symbol.

const (
	// maxSymbols is how many symbols a code has at most: lengths of matches.
	maxSymbols = 53
	// maxLog is that of the largest table.
	maxLog = 9
	minLog = 5
	// lessThanOne is what a distribution has for a symbol that gets a state although it's rarer than that.
	lessThanOne = -1
)

// A table is a code, ready to encode.
type table struct {
	log    uint
	states [1 << maxLog]uint16
	to     [64]transition // by symbol
	// The distribution it's made of.
	norm [maxSymbols]int16
	n    int // symbols
}

// A transition is what leads from a state to that of the symbol before.
type transition struct {
	delta uint32 // what to add to the state to have in its upper half how many bits to write
	next  uint32 // what to add to the rest of the state to have where in the table the next one is
}

// build makes the code of a distribution, of 1 << log states.
func (t *table) build(norm []int16, log uint) {
	size := 1 << log
	t.log, t.n = log, len(norm)
	copy(t.norm[:], norm)
	var symbols [1 << maxLog]uint8
	var first [maxSymbols + 1]int
	high := size - 1
	for s, p := range norm {
		if p == lessThanOne {
			symbols[high] = uint8(s)
			high--
			p = 1
		}
		first[s+1] = first[s] + int(p)
	}
	step, at := size>>1+size>>3+3, 0
	for s, p := range norm {
		for range p {
			symbols[at] = uint8(s)
			for at = (at + step) & (size - 1); at > high; at = (at + step) & (size - 1) {
			}
		}
	}
	place := first
	for i, s := range symbols[:size] {
		t.states[place[s]] = uint16(size + i)
		place[s]++
	}
	for s, p := range norm {
		switch p {
		case 0:
		case lessThanOne, 1:
			t.to[s&63] = transition{uint32(log<<16) - uint32(size), uint32(first[s] - 1)}
		default:
			most := log - uint(bits.Len16(uint16(p-1))) + 1
			t.to[s&63] = transition{uint32(most<<16) - uint32(p)<<most, uint32(first[s] - int(p))}
		}
	}
}

// repeat makes a code of one symbol, which takes no bits.
func (t *table) repeat(symbol uint8) {
	t.log, t.n = 0, int(symbol)+1
	t.states[0] = 0
	t.to[symbol&63] = transition{}
}

// cost returns what symbols take that occur so many times, without their extra bits.
func (t *table) cost(counts []uint32) uint32 {
	if len(counts) > t.n || t.log == 0 {
		return impossible
	}
	cost := uint32(0)
	for s, k := range counts {
		if k == 0 {
			continue
		}
		switch p := t.norm[s]; p {
		case 0:
			return impossible
		case lessThanOne:
			cost += k * uint32(t.log) * bit
		default:
			cost += k * (uint32(t.log)*bit - log2Of(uint32(p)))
		}
	}
	return cost
}

// begin returns the state from which a decoder will read a symbol last: the first one that is encoded.
func (t *table) begin(symbol uint8) uint32 {
	s := &t.to[symbol&63]
	n := (s.delta + 1<<15) >> 16
	return uint32(t.states[((n<<16-s.delta)>>n+s.next)&(1<<maxLog-1)])
}

// normalize makes a distribution of counts, of which there are total: that of 1 << log states. Whatever is there gets one.
func normalize(norm []int16, counts []uint32, total int, log uint) {
	left, largest := 1<<log, 0
	scale := uint64(1<<(log+32)) / uint64(total)
	for s, c := range counts {
		if c == 0 {
			norm[s] = 0
			continue
		}
		p := max(int((uint64(c)*scale+1<<31)>>32), 1)
		norm[s] = int16(p)
		left -= p
		if c > counts[largest] {
			largest = s
		}
	}
	if left >= 0 || -left < int(norm[largest])/4 {
		norm[largest] += int16(left)
		return
	}
	for ; left < 0; left++ {
		largest = 0
		for s, p := range norm {
			if p > norm[largest] {
				largest = s
			}
		}
		norm[largest]--
	}
}

// logFor returns the size of table that so many sequences are worth.
func logFor(total, symbols int, most uint) uint {
	log := min(uint(max(bits.Len(uint(total-1))-3, 0)), most)
	least := min(uint(bits.Len(uint(total))), uint(bits.Len(uint(symbols-1)))+1)
	return min(max(log, least, minLog), most)
}

// appendDistribution appends a table's distribution, as decoders make the table from. out has room for it.
func appendDistribution(out []byte, norm []int16, log uint) []byte {
	w := bitWriter{out: out}
	w.add(uint64(log-minLog), 4)
	size := 1 << log
	left, threshold, n := size+1, size, log+1
	zero := false // whether the symbol before has none
	for s := 0; s < len(norm) && left > 1; {
		if zero {
			start := s
			for norm[s] == 0 {
				s++
			}
			for ; s >= start+3; start += 3 {
				w.add(3, 2)
				w.flush()
			}
			w.add(uint64(s-start), 2)
		}
		p := int(norm[s])
		s++
		most := 2*threshold - 1 - left
		left -= max(p, -p)
		p++
		if p >= threshold {
			p += most
		}
		width := n
		if p < most {
			width--
		}
		w.add(uint64(p), width)
		w.flush()
		zero = p == 1
		for left < threshold {
			n--
			threshold >>= 1
		}
	}
	w.align()
	return w.out
}
