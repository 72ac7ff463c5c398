package fill

import (
	"math/rand/v2"
	"testing"
)

// TestSpans compares spans with a slice of booleans.
func TestSpans(t *testing.T) {
	const size = 200
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var s spans
		var in [size + 1]bool
		for range 20 {
			off := rng.Int64N(size)
			end := off + 1 + rng.Int64N(min(20, size-off))
			s.add(off, end)
			for i := off; i < end; i++ {
				in[i] = true
			}
			for i := 1; i < len(s); i++ {
				if s[i-1].end >= s[i].off {
					t.Fatalf("%v are not disjoint or not joined", s)
				}
			}
			for pos := range int64(size) {
				past := pos
				for in[past] {
					past++
				}
				if got := s.past(pos); got != past {
					t.Fatalf("%v: past(%d) = %d, want %d", s, pos, got, past)
				}
				next := past
				for next < size && !in[next] {
					next++
				}
				if !in[pos] && next < size && s.next(pos) != next {
					t.Fatalf("%v: next(%d) = %d, want %d", s, pos, s.next(pos), next)
				}
			}
		}
	}
}
