package zstd

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// However many bits sequences have, as many as there can be or none, they are packed as one bit after the other would be.
func TestEncode(t *testing.T) {
	for seed := range layertest.Seeds(300) {
		r := rand.New(rand.NewPCG(seed, 6))
		var c coder
		var h histogram
		var seqs []sequence
		add := func(literals, length, offset uint32) { seqs = append(seqs, h.newSequence(literals, length, offset)) }
		upTo := func(most int) uint32 { return uint32(1)<<r.IntN(most) - 1 + r.Uint32N(1<<r.IntN(most)) }
		if seed%2 == 0 {
			for range 1 + r.IntN(3000) {
				add(upTo(17), upTo(17), 1+upTo(24))
			}
		} else {
			// Symbols that are rare, and so take as many bits as states have, with as many extra bits as fit beside them, or one more.
			for i := range 5000 {
				if i%50 > 0 {
					add(0, 0, 1)
					continue
				}
				l, m := 9+r.IntN(7), 7+r.IntN(7)
				add(1<<l, 1<<m, 1<<(usualExtra+r.IntN(2)-l-m))
			}
		}
		tables := [3]*table{}
		for of := range tables {
			_, tables[of], _ = c.choose(make([]byte, 0, 1024), of, h.fields[of][:], len(seqs))
		}
		got := encode(make([]byte, 3, maxPacked), seqs, &tables)
		if want := packed(seqs, &tables); !bytes.Equal(got[3:], want) {
			t.Fatalf("seed %d: %d sequences are %d bytes, want %d others", seed, len(seqs), len(got)-3, len(want))
		}
	}
}

// packed does what encode does, bit by bit.
func packed(seqs []sequence, t *[3]*table) (out []byte) {
	n := 0
	add := func(v uint64, bits uint) {
		for i := range bits {
			if n%8 == 0 {
				out = append(out, 0)
			}
			out[n/8] |= byte(v>>i&1) << (n % 8)
			n++
		}
	}
	var states [3]uint32
	for i, s := range slices.Backward(seqs) {
		for _, of := range []int{ofOffset, ofLength, ofLiterals} {
			symbol := [3]uint8{ofLiterals: s.literals, ofOffset: s.offset, ofLength: s.length}[of]
			if i == len(seqs)-1 {
				states[of] = t[of].begin(symbol)
				continue
			}
			next, v, bits := t[of].step(states[of], symbol, 0, 0)
			add(v, bits)
			states[of] = next
		}
		add(s.extra, uint(s.bits))
	}
	for _, of := range []int{ofLength, ofOffset, ofLiterals} {
		add(uint64(states[of]), t[of].log)
	}
	add(1, 1)
	return out
}

// A sequence's symbols and extra bits say the numbers again, as RFC 8878, 3.1.1.3.2.1 has it.
func TestSequences(t *testing.T) {
	literals := []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 28, 32, 40, 48, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536}
	lengths := []uint32{35, 37, 39, 41, 43, 47, 51, 59, 67, 83, 99, 131, 259, 515, 1027, 2051, 4099, 8195, 16387, 32771, 65539}
	for seed := range layertest.Seeds(20_000) {
		r := rand.New(rand.NewPCG(seed, 7))
		l, m, o := r.Uint32N(1<<r.IntN(18)), minMatch+r.Uint32N(1<<r.IntN(17)), 1+r.Uint32N(1<<r.IntN(24))
		var h histogram
		s := h.newSequence(l, m-minMatch, o)
		take := func(n int) uint32 {
			v := uint32(s.extra & (1<<n - 1))
			s.extra >>= n
			s.bits -= uint8(n)
			return v
		}
		gotL := literals[s.literals] + take(int(literalsExtra[s.literals]))
		gotM := uint32(s.length) + minMatch
		if s.length >= 32 {
			gotM = lengths[s.length-32]
		}
		gotM += take(int(lengthExtra[s.length]))
		gotO := uint32(1)<<s.offset + take(int(s.offset))
		if gotL != l || gotM != m || gotO != o || s.bits != 0 || s.extra != 0 {
			t.Fatalf("%d literals, a match of %d, offset %d: got %d, %d, %d, with %d bits and %#x left", l, m, o, gotL, gotM, gotO, s.bits, s.extra)
		}
	}
}

// Symbols are sorted as by comparing them, whatever their counts are.
func TestSort(t *testing.T) {
	var l literalCoder
	for seed := range layertest.Seeds(1000) {
		r := rand.New(rand.NewPCG(seed, 8))
		l.keys = l.keys[:0]
		for s := range uint32(256) {
			if r.IntN(4) > 0 {
				l.keys = append(l.keys, (1+r.Uint32N(1<<r.IntN(18)))<<8|s)
			}
		}
		want := slices.Sorted(slices.Values(l.keys))
		l.sort()
		if !slices.Equal(l.keys, want) {
			t.Fatalf("seed %d: %x, want %x", seed, l.keys, want)
		}
	}
}
