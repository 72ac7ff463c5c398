package fill

import (
	"cmp"
	"math"
	"slices"
)

// span is the range from off up to end.
type span struct{ off, end int64 }

// spans are ranges by offset, disjoint and not adjacent.
type spans []span

// add adds the range from off up to end.
func (s *spans) add(off, end int64) {
	i, _ := slices.BinarySearchFunc(*s, off, func(x span, off int64) int { return cmp.Compare(x.end, off) })
	j := i
	for j < len(*s) && (*s)[j].off <= end {
		off, end = min(off, (*s)[j].off), max(end, (*s)[j].end)
		j++
	}
	*s = slices.Replace(*s, i, j, span{off, end})
}

// past returns the first position from pos on that is in no range.
func (s spans) past(pos int64) int64 {
	if i := s.after(pos); i > 0 && pos < s[i-1].end {
		return s[i-1].end
	}
	return pos
}

// next returns where the first range behind pos begins.
func (s spans) next(pos int64) int64 {
	if i := s.after(pos); i < len(s) {
		return s[i].off
	}
	return math.MaxInt64
}

// has reports whether one range holds everything from off up to end.
func (s spans) has(off, end int64) bool { return s.past(off) >= end }

// after returns the index of the first range that begins behind pos.
func (s spans) after(pos int64) int {
	i, _ := slices.BinarySearchFunc(s, pos, func(x span, pos int64) int {
		if x.off > pos {
			return 1
		}
		return -1
	})
	return i
}
