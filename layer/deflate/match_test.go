package deflate

import (
	"bytes"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/word"
)

// Whatever a bucket says is before a position and within the window, also where it's wrong; and what is the longest of its matches is one, is
// no shorter than the nearest, and never longer than a match may be.
func TestFindsMatches(t *testing.T) {
	for name, src := range inputs(t) {
		f := new(finder)
		f.reset()
		matches := 0
		for pos := 1; pos < min(len(src)-lookahead, 200_000); pos++ {
			for pos >= f.known {
				f.look(src)
			}
			b := f.before[pos&(ring-1)]
			k := found(0)
			nearest := 0
			for i := range 4 {
				q := b.place(i, pos)
				if q < 0 || q >= pos || pos-q > window {
					t.Fatalf("%s: at %d: a place at %d", name, pos, q)
				}
				k |= same(word.At64(src, q)^word.At64(src, pos)) >> i
				if nearest == 0 && bytes.Equal(src[q:q+8], src[pos:pos+8]) {
					nearest = matchLen(src, q, pos, min(len(src)-pos, maxMatch))
				}
			}
			if nearest == 0 {
				continue
			}
			matches++
			n, d := b.match(k, src, pos)
			offset := d + 1
			if n < nearest || n > maxMatch || offset < 1 || offset > window || offset > pos || pos+n > len(src) {
				t.Fatalf("%s: at %d of %d: %d bytes, %d back; the nearest has %d", name, pos, len(src), n, offset, nearest)
			}
			if !bytes.Equal(src[pos:pos+n], src[pos-offset:pos-offset+n]) {
				t.Fatalf("%s: at %d: %d bytes are others %d back", name, pos, n, offset)
			}
		}
		if matches == 0 && (name == "text" || name == "program" || name == "zeros") {
			t.Errorf("%s: nothing found", name)
		}
	}
}

// Sequences tell the whole input, and the histogram is theirs.
func TestParse(t *testing.T) {
	for name, src := range inputs(t) {
		e := &encoder{literal: usualLiteral}
		var got []byte
		for pos := 0; pos < len(src); {
			first := len(e.block.seqs)
			e.segment = histogram{}
			next := e.parse(src, pos)
			var want histogram
			at := pos
			for _, q := range e.block.seqs[first:] {
				got = append(got, src[at:at+int(q.literals)]...)
				for _, l := range src[at:][:q.literals] {
					want.litLen[l]++
				}
				at += int(q.literals) + int(q.length)
				if q.length == 0 {
					continue
				}
				for range q.length {
					got = append(got, got[len(got)-1-int(q.offset)])
				}
				want.litLen[firstLength+int(rfc.lengthSlot[q.length-minMatch])]++
				slot, _ := offsetSymbol(q.offset)
				want.offset[slot]++
			}
			if at != next || next <= pos {
				t.Fatalf("%s: sequences from %d to %d, not to %d", name, pos, at, next)
			}
			if e.segment != want {
				t.Fatalf("%s: the histogram of %d to %d is another one's", name, pos, next)
			}
			pos = next
		}
		if !bytes.Equal(got, src) {
			t.Errorf("%s: sequences tell another content", name)
		}
	}
}
