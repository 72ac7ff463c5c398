package deflate

import "github.com/buildkitd-lazy/buildkitd-lazy/layer/word"

import "encoding/binary"

// A sequence is a run of literals, and a match behind it, if its length isn't 0.
type sequence struct {
	literals uint32
	length   uint16
	offset   uint16 // less 1
}

// A block is a part of the input as literals and matches, and how often each symbol occurs in it.
type block struct {
	seqs []sequence
	histogram

	litLen, offset, precode code
	// sizes are those of both codes, as a dynamic block's header has them: symbols of the precode, with their extra bits from the 6th on.
	sizes                  []uint16
	litLenUsed, offsetUsed int
	// literal and length are the codewords of literals and of whole lengths, these with their extra bits: above them, from the 24th bit on, is
	// how many bits that is.
	literal [256]uint32
	length  [maxMatch - minMatch + 1]uint32
}

// drop makes it a block of nothing but the sequences from the nth on, which aren't counted yet.
func (b *block) drop(n int) {
	b.seqs = b.seqs[:copy(b.seqs, b.seqs[n:])]
	b.histogram = histogram{}
}

// litLenLimit is one less than the RFC's: four literals fit into a word beside the seven bits that may be there.
const litLenLimit = 14

// write appends the first n sequences, whose bytes are src, as a block, in the form that takes the least room. They must be those that are
// counted.
func (b *block) write(w *bitWriter, n int, src []byte, final bool) {
	b.histogram.litLen[endOfBlock]++
	b.litLen.build(b.histogram.litLen[:], litLenLimit)
	b.offset.build(b.histogram.offset[:], maxCodeword)
	header, precodes := b.header()
	extra := 0
	for s, f := range b.histogram.litLen[firstLength:] {
		extra += int(f) * int(rfc.lengthExtra[s&31])
	}
	for s, f := range b.histogram.offset {
		extra += int(f) * int(rfc.offsetExtra[s])
	}
	dynamic := 3 + header + extra + b.litLen.bits(b.histogram.litLen[:]) + b.offset.bits(b.histogram.offset[:])
	fixed := 3 + extra + rfc.litLen.bits(b.histogram.litLen[:]) + rfc.offset.bits(b.histogram.offset[:])
	last := uint64(0)
	if final {
		last = 1
	}
	if stored := 8 * storedSize(len(src)); stored <= min(dynamic, fixed) {
		w.stored(src, last)
		return
	}
	w.grow(min(dynamic, fixed)/8 + 64) // words are stored whole, also the last
	if fixed <= dynamic {
		w.put(last|blockFixed<<1, 3)
		b.sequences(w, n, src, &rfc.litLen, &rfc.offset)
		return
	}
	w.put(last|blockDynamic<<1, 3)
	b.writeHeader(w, precodes)
	b.sequences(w, n, src, &b.litLen, &b.offset)
}

// header makes the precode, and returns how many bits a dynamic block's header takes, and how many sizes of the precode are in it.
func (b *block) header() (bits, precodes int) {
	b.litLenUsed, b.offsetUsed = usedLitLen, usedOffset
	for b.litLenUsed > firstLength && b.litLen.size[b.litLenUsed-1] == 0 {
		b.litLenUsed--
	}
	for b.offsetUsed > 1 && b.offset.size[b.offsetUsed-1] == 0 {
		b.offsetUsed--
	}
	var all [usedLitLen + usedOffset]uint8
	n := copy(all[:], b.litLen.size[:b.litLenUsed])
	n += copy(all[n:], b.offset.size[:b.offsetUsed])
	b.sizes = repeats(b.sizes[:0], all[:n])

	var freq [numPrecode]uint32
	for _, s := range b.sizes {
		freq[s&31]++
	}
	b.precode.build(freq[:], maxPrecode)
	precodes = numPrecode
	for precodes > 4 && b.precode.size[precodeOrder[precodes-1]] == 0 {
		precodes--
	}
	bits = 5 + 5 + 4 + 3*precodes + b.precode.bits(freq[:])
	for s, f := range freq {
		bits += int(f) * int(precodeExtra[s])
	}
	return bits, precodes
}

// repeats appends the symbols of the precode that say these sizes (RFC 1951, 3.2.7), with their extra bits from the 6th on.
func repeats(to []uint16, sizes []uint8) []uint16 {
	for i := 0; i < len(sizes); {
		s := sizes[i]
		end := i + 1
		for end < len(sizes) && sizes[end] == s {
			end++
		}
		n := end - i
		i = end
		if s == 0 {
			for ; n >= 11; n -= min(n, 138) {
				to = append(to, 18|uint16(min(n, 138)-11)<<5)
			}
			if n >= 3 {
				to = append(to, 17|uint16(n-3)<<5)
				n = 0
			}
		} else if n >= 4 {
			to = append(to, uint16(s))
			for n--; n >= 3; n -= min(n, 6) {
				to = append(to, 16|uint16(min(n, 6)-3)<<5)
			}
		}
		for range n {
			to = append(to, uint16(s))
		}
	}
	return to
}

func (b *block) writeHeader(w *bitWriter, precodes int) {
	w.put(uint64(b.litLenUsed-firstLength), 5)
	w.put(uint64(b.offsetUsed-1), 5)
	w.put(uint64(precodes-4), 4)
	w.flush()
	for _, s := range precodeOrder[:precodes] {
		w.put(uint64(b.precode.size[s]), 3)
		w.flush()
	}
	for _, v := range b.sizes {
		s := v & 31
		w.put(uint64(b.precode.word[s]), uint(b.precode.size[s]))
		w.put(uint64(v>>5), uint(precodeExtra[s]))
		w.flush()
	}
}

// sequences writes the literals and matches, for which there must be room in w, and a word more.
func (b *block) sequences(w *bitWriter, upTo int, src []byte, litLen, offset *code) {
	for l := range b.literal {
		b.literal[l] = uint32(litLen.word[l]) | uint32(litLen.size[l])<<24
	}
	for l := range b.length {
		s := rfc.lengthSlot[l] & 31
		size := litLen.size[firstLength+int(s)]
		word := uint32(litLen.word[firstLength+int(s)]) | uint32(uint8(l)-rfc.lengthBase[s])<<size
		b.length[l] = word | uint32(size+rfc.lengthExtra[s])<<24
	}
	acc, have := w.acc, w.have
	out, n := w.out[:cap(w.out)], len(w.out)
	pos := 0
	for _, q := range b.seqs[:upTo] {
		left := int(q.literals)
		if len(src)-pos-left < 4 {
			for ; left > 0; left-- {
				acc, have = put(acc, have, b.literal[src[pos]])
				binary.LittleEndian.PutUint64(out[n:n+8:n+8], acc)
				n, acc, have = n+int(have>>3), acc>>(have&56), have&7
				pos++
			}
			if q.length == 0 {
				continue
			}
		}
		for ; left > 2; left -= 3 {
			v := word.At32(src, pos)
			acc, have = put(acc, have, b.literal[uint8(v)])
			acc, have = put(acc, have, b.literal[uint8(v>>8)])
			acc, have = put(acc, have, b.literal[uint8(v>>16)])
			binary.LittleEndian.PutUint64(out[n:n+8:n+8], acc)
			n, acc, have = n+int(have>>3), acc>>(have&56), have&7
			pos += 3
		}
		// Up to two are left, and to ask how many would be a branch that nobody can predict: both are looked up, and may be nothing.
		v := word.At32(src, pos)
		l0, l1 := b.literal[uint8(v)], b.literal[uint8(v>>8)]
		if left < 1 {
			l0 = 0
		}
		if left < 2 {
			l1 = 0
		}
		acc, have = put(acc, have, l0)
		acc, have = put(acc, have, l1)
		pos += left + int(q.length)
		if q.length > 0 {
			acc, have = put(acc, have, b.length[uint8(q.length-minMatch)])
		}
		binary.LittleEndian.PutUint64(out[n:n+8:n+8], acc)
		n, acc, have = n+int(have>>3), acc>>(have&56), have&7
		if q.length == 0 {
			continue
		}
		s, extra := offsetSymbol(q.offset)
		acc |= uint64(offset.word[s&31]) << (have & 63)
		have += uint(offset.size[s&31])
		acc |= uint64(q.offset&(1<<(extra&15)-1)) << (have & 63)
		have += extra
		binary.LittleEndian.PutUint64(out[n:n+8:n+8], acc)
		n, acc, have = n+int(have>>3), acc>>(have&56), have&7
	}
	w.out, w.acc, w.have = out[:n], acc, have
	w.put(uint64(litLen.word[endOfBlock]), uint(litLen.size[endOfBlock]))
	w.flush()
}

// put adds a codeword of block.literal or block.length to a word with so many bits.
func put(acc uint64, have uint, codeword uint32) (uint64, uint) {
	return acc | uint64(codeword&(1<<24-1))<<(have&63), have + uint(codeword>>24)
}
