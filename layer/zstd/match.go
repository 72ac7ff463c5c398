package zstd

import (
	"math/bits"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/word"
)

const (
	// lookahead is how many bytes there are from a position on that is looked at, at least: a word, also at the next position, and the literals
	// that are copied at once.
	lookahead = 16

	longBits  = 17
	shortBits = 15
	leastBits = 8

	longPrime = 0x9E3779B185EBCA87
	fivePrime = 0xCF1BBCDCBB << 24 // so that there are 5 bytes in the hash
	fourPrime = 0x9E3779B1 << 32   // as above, 4
	// fewBytes is how many there are at most in an input that is searched for matches of 4 bytes. In larger ones, they make it smaller, too, but take
	// more time.
	fewBytes = 32 << 10

	posMask = window - 1
	// skipShift: for each 1 << skipShift literals in a run, one more position is left out between two that are looked at.
	skipShift = 8
	// minFound is the length of the shortest match that is looked for. One takes matchBits besides a bit for each binary digit of its offset, about, in
	// literals of literalBits. Where bytes look like nothing, literals take more, but so do the lengths.
	minFound    = 4
	matchBits   = 4
	literalBits = 4
)

// A place is a position, less whole windows, with 9 bits of its short hash above, in both tables: so it's made once. Places with the same bits differ by
// an offset; those with others by more than the window. What a place says is looked at before it's believed: it may be of other bytes, or from more
// than a window before. The empty one is position 0.
type place uint32

func placeOf(hash uint64, pos int) place { return place(hash>>16)&^posMask | place(pos)&posMask }

// A finder knows where bytes were before.
type finder struct {
	long                  [1 << longBits]place  // by 8 bytes
	short                 [1 << shortBits]place // by 5, or 4
	longShift, shortShift uint
	shortPrime            uint64
}

// reset empties the tables, or what is used of them for so many bytes.
func (f *finder) reset(n int) {
	log := bits.Len(uint(n))
	long := min(max(log, leastBits), longBits)
	short := min(max(log-1, leastBits), shortBits)
	f.longShift, f.shortShift = uint(64-long), uint(64-short)
	f.shortPrime = fivePrime
	if n <= fewBytes {
		f.shortPrime = fourPrime
	}
	clear(f.long[:1<<long])
	clear(f.short[:1<<short])
}

func (f *finder) atLong(hash uint64) *place {
	return &f.long[hash>>(f.longShift&63)&(1<<longBits-1)]
}

func (f *finder) atShort(hash uint64) *place {
	return &f.short[hash>>(f.shortShift&63)&(1<<shortBits-1)]
}

// put takes note of a position.
func (f *finder) put(src []byte, pos int) {
	v := word.At64(src, pos)
	h := v * f.shortPrime
	here := placeOf(h, pos)
	*f.atShort(h) = here
	*f.atLong(v * longPrime) = here
}

// search returns the next match from pos on, which isn't 0: where it begins, its length and its offset. Without one the length is 0. A match with the
// offset that the last one had is the first that counts.
func (f *finder) search(src []byte, pos, recent int) (at, length, offset int) {
	limit := len(src) - lookahead
	for run := pos; pos < limit; pos += 1 + (pos-run)>>skipShift {
		reach := uint(min(pos, window))
		v := word.At64(src, pos)
		h := v * f.shortPrime
		here := placeOf(h, pos)
		p := f.atLong(v * longPrime)
		long := int(here - *p)
		*p = here
		p = f.atShort(h)
		short := int(here - *p)
		*p = here
		if word.At32(src, pos+1-recent) == uint32(v>>8) {
			return pos + 1, 4 + matchLen(src, pos+5-recent, pos+5), recent
		}
		if uint(long-1) < reach && word.At64(src, pos-long) == v {
			return pos, 8 + matchLen(src, pos+8-long, pos+8), long
		}
		if uint(short-1) >= reach {
			continue
		}
		x := word.At64(src, pos-short) ^ v
		n := bits.TrailingZeros64(x) >> 3
		if x == 0 {
			n += matchLen(src, pos+8-short, pos+8)
		}
		if n < minFound || n*literalBits < bits.Len(uint(short))+matchBits {
			continue
		}
		// Perhaps the next position has a longer one.
		v = word.At64(src, pos+1)
		here = placeOf(v*f.shortPrime, pos+1)
		p = f.atLong(v * longPrime)
		long = int(here - *p)
		*p = here
		if uint(long-1) < reach && word.At64(src, pos+1-long) == v {
			if m := 8 + matchLen(src, pos+9-long, pos+9); m > n {
				return pos + 1, m, long
			}
		}
		return pos, n, short
	}
	return pos, 0, 0
}

// matchLen returns how many bytes from two positions on are the same.
func matchLen(src []byte, q, pos int) int {
	n := 0
	for ; len(src)-pos-n >= 8; n += 8 {
		if x := word.At64(src, q+n) ^ word.At64(src, pos+n); x != 0 {
			return n + bits.TrailingZeros64(x)>>3
		}
	}
	for pos+n < len(src) && src[q+n] == src[pos+n] {
		n++
	}
	return n
}

// parse appends the sequences and the literals from pos on, up to a match that ends at least at end, and returns where it does. Without one, it returns the end of the
// last match, and leaves the literals behind it.
func (e *encoder) parse(src []byte, pos, end int) int {
	f, lits := &e.finder, e.lits[:cap(e.lits)]
	run, all := pos, len(e.lits) // where the literals begin, and how many there are before
	for pos = max(pos, 1); run < end; {
		recent := int(e.recent[0])
		at, n, d := f.search(src, pos, recent)
		if n == 0 {
			break
		}
		pos = at
		offset := uint32(1) // the last one, behind literals
		if d != recent {
			for pos > run && pos > d && src[pos-1] == src[pos-1-d] {
				pos--
				n++
			}
		}
		if d != recent || pos == run {
			offset = e.offset(uint32(d), pos > run)
		}
		literals := pos - run
		if literals <= lookahead {
			// There are as many bytes behind them, and copying these, too, takes no branch.
			copy(lits[all:all+lookahead:all+lookahead], src[run:run+lookahead:run+lookahead])
		} else {
			copy(lits[all:], src[run:pos])
		}
		all += literals
		e.seqs = append(e.seqs, e.segment.newSequence(uint32(literals), uint32(n-minMatch), offset))
		if pos += n; pos < len(src)-lookahead {
			f.put(src, pos-n+1)
			f.put(src, pos-2)
			for d := int(e.recent[1]); pos < len(src)-lookahead && d <= pos && word.At32(src, pos) == word.At32(src, pos-d); d = int(e.recent[1]) {
				pos += e.again(src, pos, d)
			}
		}
		run = pos
	}
	e.lits = lits[:all]
	return run
}

// again adds the match at a position that has the offset before the last one, and returns its length. It takes next to no bits.
func (e *encoder) again(src []byte, pos, d int) int {
	n := 4 + matchLen(src, pos+4-d, pos+4)
	e.seqs = append(e.seqs, e.segment.newSequence(0, uint32(n-minMatch), e.offset(uint32(d), false)))
	e.finder.put(src, pos)
	return n
}

// offset returns what the format has for an offset, and remembers it: 1 to 3 are the last ones, others are 3 larger than they are. Behind no
// literals there's no 1 for the last one, which would have been the match before, but a 3 for one less than that.
func (e *encoder) offset(d uint32, literals bool) uint32 {
	r := &e.recent
	last := *r
	if d != last[0] && d != last[1] && d != last[2] && d != last[0]-1 { // as a rule
		r[0], r[1], r[2] = d, last[0], last[1]
		return d + 3
	}
	switch {
	case d == last[0] && literals:
		return 1
	case d == last[1]:
		r[0], r[1] = d, last[0]
	default:
		r[0], r[1], r[2] = d, last[0], last[1]
	}
	switch {
	case d == last[1] && literals, d == last[2] && !literals:
		return 2
	case d == last[1]:
		return 1
	case d == last[2], d == last[0]-1 && !literals:
		return 3
	}
	return d + 3
}
