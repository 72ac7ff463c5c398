package deflate

import "math/bits"

const (
	window = 1 << 15
	// lookahead is how many bytes there are from a position on that is looked at, at least: a word, also at the next position.
	lookahead = 9

	hashBits  = 14
	hash3Bits = 14

	// segmentSize is how many bytes parse looks at before it's asked whether they still belong together.
	segmentSize = 4 << 10
	// nice is the length of a match than which no better one is looked for in the same bucket, and lazy than which none is at the next position.
	nice = 32
	lazy = 12
	// near is up to where a match of three bytes is looked at, and manyLetters how many different literals there are in a segment for any to be
	// looked for in the next: text has fewer, and little of them.
	near        = 4096
	manyLetters = 160
	// skipShift: for each 1 << skipShift literals in a run, one more position is left out between two that are looked at.
	skipShift = 5
	// matchBits is what a match takes besides a bit for each binary digit of its offset, about.
	matchBits = 8
)

// A bucket holds the last four positions of one hash, 16 bits of each, the newest lowest. What it says is looked at before it's believed: it
// may be of other bytes with the same hash, or from 64 KiB or more before, and then stands for some place within the window. An empty one
// is four times position 0.
type bucket uint64

func (b bucket) with(pos int) bucket { return b<<16 | bucket(uint16(pos)) }

// offset returns the offset less 1 of the newest position: within the window, and not before the input, if pos isn't 0.
func (b bucket) offset(pos int) int { return (pos - 1 - int(b)) & (window - 1) }

// A finder knows where bytes were before.
type finder struct {
	buckets [1 << hashBits]bucket // by four bytes
	// last3 is by three bytes, of positions that no match went over: those of others are hardly missed, and take time.
	last3 [1 << hash3Bits]uint16
	// three says whether to look for matches of three bytes.
	three bool
}

func (f *finder) reset() {
	clear(f.buckets[:])
	clear(f.last3[:])
	f.three = true
}

func hash4(v uint32) uint32 { return v * 0x9E3779B1 >> (32 - hashBits) }
func hash3(v uint32) uint32 { return v << 8 * 0x9E3779B1 >> (32 - hash3Bits) }

// find returns the length of the longest match at pos and its offset less 1, and takes note of pos, which is neither 0 nor in the last
// lookahead-1 bytes. Of several of that length it's the nearest; without any the length is less than minMatch.
func (f *finder) find(src []byte, pos int) (length, offset int) {
	v := load64(src, pos)
	at := &f.buckets[hash4(uint32(v))]
	b := *at
	*at = b.with(pos)
	// The lengths of all four, up to 8, in bits, with a number in the lowest bits that prefers the nearest.
	last := pos - 1
	k0 := bits.TrailingZeros64(load64(src, last-b.offset(pos))^v)&^7 | 3
	k1 := bits.TrailingZeros64(load64(src, last-(b>>16).offset(pos))^v)&^7 | 2
	k2 := bits.TrailingZeros64(load64(src, last-(b>>32).offset(pos))^v)&^7 | 1
	k3 := bits.TrailingZeros64(load64(src, last-(b>>48).offset(pos))^v) &^ 7
	k := max(max(k0, k1), max(k2, k3))
	if f.three {
		h := hash3(uint32(v))
		c := f.last3[h]
		f.last3[h] = uint16(pos)
		if k < 32 {
			d := (last - int(c)) & (window - 1)
			if (load32(src, last-d)^uint32(v))<<8 == 0 && d < near {
				return minMatch, d
			}
		}
	}
	if k < 32 {
		return 0, 0
	}
	if k >= 64 {
		return longest(src, pos, b)
	}
	return k >> 3, (b >> (uint(3-k&3) * 16 & 63)).offset(pos)
}

// longest is find, for a bucket that has matches of 8 bytes and more.
func longest(src []byte, pos int, b bucket) (length, offset int) {
	v := load64(src, pos)
	last := pos - 1
	if len(src)-pos >= 16 {
		// The next 8 bytes, as in find.
		w := load64(src, pos+8)
		k0, k1, k2, k3 := 0, 0, 0, 0
		if q := last - b.offset(pos); load64(src, q) == v {
			k0 = bits.TrailingZeros64(load64(src, q+8)^w)&^7 | 3
		}
		if q := last - (b >> 16).offset(pos); load64(src, q) == v {
			k1 = bits.TrailingZeros64(load64(src, q+8)^w)&^7 | 2
		}
		if q := last - (b >> 32).offset(pos); load64(src, q) == v {
			k2 = bits.TrailingZeros64(load64(src, q+8)^w)&^7 | 1
		}
		if q := last - (b >> 48).offset(pos); load64(src, q) == v {
			k3 = bits.TrailingZeros64(load64(src, q+8)^w) &^ 7
		}
		if k := max(max(k0, k1), max(k2, k3)); k < 64 {
			return 8 + k>>3, (b >> (uint(3-k&3) * 16 & 63)).offset(pos)
		}
	}
	most := min(len(src)-pos, maxMatch)
	for range 4 {
		d := b.offset(pos)
		b >>= 16
		if load64(src, last-d) != v {
			continue
		}
		if n := matchLen(src, last-d, pos, most); n > length {
			length, offset = n, d
			if n >= nice {
				break
			}
		}
	}
	return length, offset
}

// matchLen returns how long the match is of two positions with the same 8 bytes, up to most.
func matchLen(src []byte, q, pos, most int) int {
	n := 8
	for ; most-n >= 8; n += 8 {
		if x := load64(src, q+n) ^ load64(src, pos+n); x != 0 {
			return n + bits.TrailingZeros64(x)>>3
		}
	}
	for n < most && src[q+n] == src[pos+n] {
		n++
	}
	return n
}

// add takes note of positions that aren't looked at.
func (f *finder) add(src []byte, pos, end int) {
	for end = min(end, len(src)-lookahead); pos < end; pos++ {
		at := &f.buckets[hash4(load32(src, pos))]
		*at = at.with(pos)
	}
}

// parse appends what is from pos on to the block's sequences, counts its symbols in segment, and returns where it ends: after segmentSize
// bytes, or some more. Literals are taken for as long as in the segment before: a match that takes more than those it would replace isn't one.
func (e *encoder) parse(src []byte, pos int) int {
	f, h, seqs, literal := &e.finder, &e.segment, e.block.seqs, e.literal
	end := len(src)
	if end-pos >= segmentSize+segmentSize/4 {
		end = pos + segmentSize
	}
	limit := len(src) - lookahead
	stop := min(end, limit)
	run := pos // where the literals begin
	if pos == 0 && stop > 0 {
		f.add(src, 0, 1)
		h.litLen[src[0]]++
		pos++
	}
	for pos < stop {
		n, d := f.find(src, pos)
		if n*literal < (bits.Len(uint(d))+matchBits)*bit {
			for upTo := min(pos+1+(pos-run)>>skipShift, end); pos < upTo; pos++ {
				h.litLen[src[pos]]++
			}
			continue
		}
		known := pos + 1 // where positions begin that nobody has taken note of
		for n < lazy && pos < limit {
			n2, d2 := f.find(src, pos+1)
			known = pos + 2
			// One more bit of an offset is worth a quarter of a byte.
			if n2 < n || 4*(n2-n)+bits.Len(uint(d))-bits.Len(uint(d2)) <= 2 {
				break
			}
			h.litLen[src[pos]]++
			pos++
			n, d = n2, d2
		}
		f.add(src, known, pos+n)
		h.litLen[firstLength+int(rfc.lengthSlot[uint8(n-minMatch)]&31)]++
		h.offset[rfc.offsetSlotOf(uint16(d))&31]++
		seqs = append(seqs, sequence{uint32(pos - run), uint16(n), uint16(d)})
		pos += n
		run = pos
	}
	if end == len(src) {
		for ; pos < end; pos++ {
			h.litLen[src[pos]]++
		}
	}
	if pos > run {
		seqs = append(seqs, sequence{literals: uint32(pos - run)})
	}
	e.block.seqs = seqs
	return pos
}
