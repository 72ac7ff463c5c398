package deflate

import (
	"math/bits"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/word"
)

const (
	window = 1 << 15
	// lookahead is how many bytes there are from a position on that is looked at, at least: a word, also at the next position.
	lookahead = 9

	hashBits = 15

	// ahead is how many positions are taken note of at once, and ring how many buckets are kept, as they were before: those of the
	// positions that parse is about to look at.
	ahead = 512
	ring  = 2 * ahead

	// segmentSize is how many bytes parse looks at before it's asked whether they still belong together.
	segmentSize = 4 << 10
	// nice is the length of a match than which no better one is looked for in the same bucket, and lazy than which none is at the next position.
	nice = 32
	lazy = 10
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

// place returns the newest position: within the window before pos, and not before the input, if pos isn't 0.
func (b bucket) place(pos int) int { return pos + (int(b)-pos)&(window-1) - window }

// A found says how many bytes the longest match of a bucket has, up to 8, and in its two lowest bits which it is: 3 is the nearest, which is
// preferred to others of that length.
type found int

const (
	fourBytes  found = 4 << 2
	eightBytes found = 8 << 2
)

// agree returns the found, as a bit, of a place where the bytes are others from the lowest bit of x on.
func agree(x uint64, which int) uint64 {
	return 1 << ((bits.TrailingZeros64(x)>>1&^3 | which) & 63)
}

// in returns the length and the offset less 1 of a match of at least fourBytes and less than eightBytes.
func (k found) in(b bucket, pos int) (length, offset int) {
	return int(k >> 2), pos - 1 - (b >> (uint(3-k&3) * 16 & 63)).place(pos)
}

// A finder knows where bytes were before.
type finder struct {
	buckets [1 << hashBits]bucket // by four bytes
	// before are the buckets of positions as they were before these, up to known.
	before [ring]bucket
	known  int
}

func (f *finder) reset() {
	clear(f.buckets[:])
	f.known = 0
}

func hash4(v uint32) uint32 { return v * 0x9E3779B1 >> (32 - hashBits) }

// look takes note of the next positions: of all of them, whatever is found at them. The input must have 8 bytes from each on.
func (f *finder) look(src []byte) {
	pos := f.known
	end := min(pos+ahead, len(src)-lookahead+1)
	f.known = end
	for ; pos+4 <= end; pos += 4 {
		v := word.At64(src, pos)
		before := (*[4]bucket)(f.before[pos&(ring-4):])
		before[0] = f.note(uint32(v), pos)
		before[1] = f.note(uint32(v>>8), pos+1)
		before[2] = f.note(uint32(v>>16), pos+2)
		before[3] = f.note(uint32(v>>24), pos+3)
	}
	for ; pos < end; pos++ {
		f.before[pos&(ring-1)] = f.note(word.At32(src, pos), pos)
	}
}

// note puts a position into its bucket, and returns that as it was before.
func (f *finder) note(v uint32, pos int) bucket {
	at := &f.buckets[hash4(v)]
	b := *at
	*at = b.with(pos)
	return b
}

// longest returns the length and the offset less 1 of the longest match of a bucket that has one of 8 bytes or more.
func longest(src []byte, pos int, b bucket) (length, offset int) {
	v := word.At64(src, pos)
	q0, q1, q2, q3 := b.place(pos), (b >> 16).place(pos), (b >> 32).place(pos), (b >> 48).place(pos)
	if len(src)-pos >= 16 {
		// The next 8 bytes: of all four, without a branch.
		w := word.At64(src, pos+8)
		k0 := bits.TrailingZeros64(word.At64(src, q0+8)^w)&^7 | 3
		k1 := bits.TrailingZeros64(word.At64(src, q1+8)^w)&^7 | 2
		k2 := bits.TrailingZeros64(word.At64(src, q2+8)^w)&^7 | 1
		k3 := bits.TrailingZeros64(word.At64(src, q3+8)^w) &^ 7
		if word.At64(src, q0) != v {
			k0 = 0
		}
		if word.At64(src, q1) != v {
			k1 = 0
		}
		if word.At64(src, q2) != v {
			k2 = 0
		}
		if word.At64(src, q3) != v {
			k3 = 0
		}
		if k := max(max(k0, k1), max(k2, k3)); k < 64 {
			return 8 + k>>3, pos - 1 - (b >> (uint(3-k&3) * 16 & 63)).place(pos)
		}
	}
	most := min(len(src)-pos, maxMatch)
	for _, q := range [...]int{q0, q1, q2, q3} {
		if word.At64(src, q) != v {
			continue
		}
		if n := matchLen(src, q, pos, most); n > length {
			length, offset = n, pos-1-q
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
		if x := word.At64(src, q+n) ^ word.At64(src, pos+n); x != 0 {
			return n + bits.TrailingZeros64(x)>>3
		}
	}
	for n < most && src[q+n] == src[pos+n] {
		n++
	}
	return n
}

// parse appends what is from pos on to the block's sequences, counts its symbols in segment, and returns where it ends: after segmentSize
// bytes, or some more. Literals are taken for as long as in the segment before: a match that takes more than those it would replace isn't one.
//
// While one position is decided about, the next is looked at. So it costs nothing to see whether that has a better match, and less to have
// guessed wrong, as processors do before they know, that this one has none.
func (e *encoder) parse(src []byte, pos int) int {
	f, h, seqs, literal := &e.finder, &e.segment, e.block.seqs, e.literal
	end := len(src)
	if end-pos >= segmentSize+segmentSize/4 {
		end = pos + segmentSize
	}
	stop := min(end, len(src)-lookahead)
	run := pos // where the literals begin
	// k and b are of pos, which isn't fresh if it has been decided about: then it's here for the next only.
	k, b, fresh := found(0), bucket(0), true
	if pos > 0 {
		pos, fresh = pos-1, false
	}
	for pos < stop {
		if pos+1 >= f.known {
			f.look(src)
			continue
		}
		for upTo := min(stop, f.known-1); pos < upTo; {
			next := pos + 1
			v := word.At64(src, next)
			b2 := f.before[next&(ring-1)]
			all := agree(word.At64(src, b2.place(next))^v, 3)
			all |= agree(word.At64(src, (b2>>16).place(next))^v, 2)
			all |= agree(word.At64(src, (b2>>32).place(next))^v, 1)
			all |= agree(word.At64(src, (b2>>48).place(next))^v, 0)
			k2 := found(bits.Len64(all) - 1)
			n, d := 0, 0
			if k >= eightBytes {
				n, d = longest(src, pos, b)
			} else if k >= fourBytes {
				n, d = k.in(b, pos)
			}
			if n*literal < (bits.Len(uint(d))+matchBits)*bit {
				if !fresh {
					pos, k, b, fresh = next, k2, b2, true
					continue
				}
				h.litLen[src[pos]]++
				if skip := min((pos-run)>>skipShift, stop-next); skip > 0 {
					for range skip {
						pos++
						h.litLen[src[pos]]++
					}
					k, fresh = 0, false
				} else {
					pos, k, b = next, k2, b2
				}
				continue
			}
			if n < lazy && k2 >= fourBytes && int(k2>>2) >= min(n, 8) {
				n2, d2 := k2.in(b2, next)
				if k2 >= eightBytes {
					n2, d2 = longest(src, next, b2)
				}
				// One more bit of an offset is worth a quarter of a byte.
				if n2 >= n && 4*(n2-n)+bits.Len(uint(d))-bits.Len(uint(d2)) > 2 {
					h.litLen[src[pos]]++
					pos, k, b = next, k2, b2
					continue
				}
			}
			h.litLen[firstLength+int(rfc.lengthSlot[uint8(n-minMatch)]&31)]++
			h.offset[rfc.offsetSlotOf(uint16(d))&31]++
			seqs = append(seqs, sequence{uint32(pos - run), uint16(n), uint16(d)})
			pos += n - 1
			run = pos + 1
			k, fresh = 0, false
		}
	}
	if !fresh {
		pos++
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
