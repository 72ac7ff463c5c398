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

	longPrime  = 0x9E3779B185EBCA87
	shortPrime = 0xCF1BBCDCBB << 24 // so that there are 5 bytes in the hash

	posMask = window - 1
	// skipShift: for each 1 << skipShift literals in a run, one more position is left out between two that are looked at.
	skipShift = 6
	// minFound is the length of the shortest match that is looked for. One takes matchBits besides a bit for each binary digit of its offset, about, in
	// literals of literalBits. Where bytes look like nothing, literals take more, but so do the lengths.
	minFound    = 4
	matchBits   = 4
	literalBits = 4
)

// A place is a position, less whole windows, with 9 more bits of its hash in the upper bits than say where in the table it is. So places of the
// same hash differ by an offset. What a place says is looked at before it's believed: it may be of other bytes, or from more than a window before. The empty one
// is position 0.
type place uint32

func placeOf(hash uint64, pos int) place { return place(hash>>16)&^posMask | place(pos)&posMask }

// A finder knows where bytes were before.
type finder struct {
	long                  [1 << longBits]place  // by 8 bytes
	short                 [1 << shortBits]place // by 5
	longShift, shortShift uint
}

// reset empties the tables, or what is used of them for so many bytes.
func (f *finder) reset(n int) {
	log := bits.Len(uint(n))
	long := min(max(log, leastBits), longBits)
	short := min(max(log-1, leastBits), shortBits)
	f.longShift, f.shortShift = uint(64-long), uint(64-short)
	clear(f.long[:1<<long])
	clear(f.short[:1<<short])
}

func (f *finder) atLong(hash uint64) *place {
	return &f.long[hash>>(f.longShift&63)&(1<<longBits-1)]
}

func (f *finder) atShort(hash uint64) *place {
	return &f.short[hash>>(f.shortShift&63)&(1<<shortBits-1)]
}

// putBoth takes note of two positions: by 8 bytes of the first, by 5 of the second.
func (f *finder) putBoth(src []byte, pos int) {
	v := word.At64(src, pos)
	h := v * longPrime
	*f.atLong(h) = placeOf(h, pos)
	h = v >> 8 * shortPrime
	*f.atShort(h) = placeOf(h, pos+1)
}

// search returns the next match from pos on, which isn't 0: where it begins, its length and its offset. Without one the length is 0. A match with the
// offset that the last one had is the first that counts.
func (f *finder) search(src []byte, pos, recent int) (at, length, offset int) {
	limit := len(src) - lookahead
	for run := pos; pos < limit; pos += 1 + (pos-run)>>skipShift {
		v := word.At64(src, pos)
		h := v * longPrime
		p := f.atLong(h)
		here := placeOf(h, pos)
		long := int(here - *p)
		*p = here
		h = v * shortPrime
		p = f.atShort(h)
		here = placeOf(h, pos)
		short := int(here - *p)
		*p = here
		if word.At32(src, pos+1-recent) == uint32(v>>8) {
			return pos + 1, 4 + matchLen(src, pos+5-recent, pos+5), recent
		}
		if uint(long-1) < uint(pos) && word.At64(src, pos-long) == v {
			return pos, 8 + matchLen(src, pos+8-long, pos+8), long
		}
		if uint(short-1) >= uint(pos) {
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
		h = v * longPrime
		p = f.atLong(h)
		here = placeOf(h, pos+1)
		long = int(here - *p)
		*p = here
		if uint(long-1) < uint(pos) && word.At64(src, pos+1-long) == v {
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

// parse finds the sequences and the literals of src[pos:].
func (e *encoder) parse(src []byte, pos int) {
	f, lits, seqs := &e.finder, e.lits[:0], e.seqs[:0]
	run := pos // where the literals begin
	for pos = max(pos, 1); ; {
		recent := int(e.recent[0])
		at, n, d := f.search(src, pos, recent)
		if n == 0 {
			break
		}
		pos = at
		if d != recent {
			for pos > run && pos > d && src[pos-1] == src[pos-1-d] {
				pos--
				n++
			}
		}
		lits = appendShort(lits, src, run, pos)
		seqs = append(seqs, sequence{uint32(pos - run), uint32(n - minMatch), e.offset(uint32(d), pos > run)})
		if pos += n; pos < len(src)-lookahead {
			f.putBoth(src, pos-n+1)
			f.putBoth(src, pos-2)
		}
		run = pos
	}
	e.lits, e.seqs = append(lits, src[run:]...), seqs
}

// appendShort appends src[from:to], behind which there are lookahead bytes, to what has room for as many.
func appendShort(out, src []byte, from, to int) []byte {
	if to-from > lookahead {
		return append(out, src[from:to]...)
	}
	n := len(out)
	copy(out[n:n+lookahead], src[from:][:lookahead])
	return out[:n+to-from]
}

// offset returns what the format has for an offset, and remembers it: 1 to 3 are the last ones, others are 3 larger than they are. Behind no
// literals there's no 1 for the last one, which would have been the match before, but a 3 for one less than that.
func (e *encoder) offset(d uint32, literals bool) uint32 {
	r := &e.recent
	last := *r
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
