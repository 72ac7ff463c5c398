package deflate

import (
	"math"
	"math/bits"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/word"
)

const (
	window = 1 << 15
	// lookahead is how many bytes there are from a position on that is looked at, at least: a word, also at the next position.
	lookahead = 9

	hashBits = 14

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

// place returns one of the four, of which 0 is the newest: within the window before pos, and not before the input, if pos isn't 0.
func (b bucket) place(which, pos int) int {
	return pos + (int(b>>(which*16&63))-pos)&(window-1) - window
}

// A found says how many bytes each place of a bucket has in common with a position, up to 8: the nth of them is bit 8n - 1 less the number of the place.
// So the highest bit is of the longest match, and of the nearest of several.
type found uint64

const (
	fourBytes  found = 1 << (8*4 - 4)
	eightBytes found = 1 << (8*8 - 4)
)

// asLong is, by the length of a match, the least found at the next position that is of one as long; none is, where the match is long enough. One
// comparison stands for three, of which each would be guessed wrong at times.
var asLong = [lazy + 1]found{
	4: fourBytes, 5: fourBytes << 8, 6: fourBytes << 16, 7: fourBytes << 24, 8: eightBytes, 9: eightBytes, lazy: math.MaxUint64,
}

// same returns the highest bit of each byte of a word from the lowest on that is 0, up to the first that isn't.
func same(x uint64) found { return found((x - 1) &^ x & 0x8080_8080_8080_8080) }

// longest returns how many bytes the longest match has, of which there must be one, and its place.
func (k found) longest() (length, which int) {
	highest := bits.Len64(uint64(k)) - 1
	return highest>>3 + 1, 7 - highest&7
}

// whole returns all bits if a place has all 8 bytes, and none if it hasn't.
func (k found) whole(which int) found { return found(int64(k<<which) >> 63) }

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

// match returns the length and the offset less 1 of the longest match of a bucket, as it was found, of at least one byte.
func (b bucket) match(k found, src []byte, pos int) (length, offset int) {
	if k >= eightBytes {
		return b.long(k, src, pos)
	}
	n, which := k.longest()
	return n, pos - 1 - b.place(which, pos)
}

// long is match for one of 8 bytes or more.
func (b bucket) long(k found, src []byte, pos int) (length, offset int) {
	most := min(len(src)-pos, maxMatch)
	if most >= 16 {
		// The next 8 bytes: of all four, without a branch.
		v := word.At64(src, pos+8)
		more := same(word.At64(src, b.place(0, pos)+8)^v) & k.whole(0)
		more |= same(word.At64(src, b.place(1, pos)+8)^v) >> 1 & k.whole(1)
		more |= same(word.At64(src, b.place(2, pos)+8)^v) >> 2 & k.whole(2)
		more |= same(word.At64(src, b.place(3, pos)+8)^v) >> 3 & k.whole(3)
		if more < eightBytes {
			n := 8
			if more == 0 {
				more, n = k, 0
			}
			m, which := more.longest()
			return n + m, pos - 1 - b.place(which, pos)
		}
		k = more
	}
	for which := range 4 {
		if k.whole(which) == 0 {
			continue
		}
		q := b.place(which, pos)
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
	// k is of pos, which isn't fresh if it has been decided about: then it's here for the next only.
	k, fresh := found(0), true
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
			b := f.before[next&(ring-1)]
			k2 := same(word.At64(src, b.place(0, next)) ^ v)
			k2 |= same(word.At64(src, b.place(1, next))^v) >> 1
			k2 |= same(word.At64(src, b.place(2, next))^v) >> 2
			k2 |= same(word.At64(src, b.place(3, next))^v) >> 3
			n, d := 0, 0
			if k >= fourBytes {
				n, d = f.before[pos&(ring-1)].match(k, src, pos)
			}
			if n*literal < (bits.Len(uint(d))+matchBits)*bit {
				if !fresh {
					pos, k, fresh = next, k2, true
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
					pos, k = next, k2
				}
				continue
			}
			if k2 >= asLong[min(n, lazy)] {
				n2, which := k2.longest()
				d2 := pos - b.place(which, next)
				if k2 >= eightBytes {
					n2, d2 = b.long(k2, src, next)
				}
				// One more bit of an offset is worth a quarter of a byte.
				if n2 >= n && 4*(n2-n)+bits.Len(uint(d))-bits.Len(uint(d2)) > 2 {
					h.litLen[src[pos]]++
					pos, k = next, k2
					continue
				}
			}
			h.litLen[firstLength+int(rfc.lengthSlot[uint8(n-minMatch)]&31)]++
			slot, _ := offsetSymbol(uint16(d))
			h.offset[slot&31]++
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
