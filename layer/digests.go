package layer

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"iter"
	"slices"
	"sort"
)

// A packed layer has its chunks in the order of their digests too: after each other, the beginning of the digest and the chunk's
// index. The order is that of whole digests, which a table of contents may choose as it likes.
const sumSize = 8

func beginning(sum *[sha256.Size]byte) uint32 { return binary.BigEndian.Uint32(sum[:]) }

func writeSums(w *bufio.Writer, l *Layer) {
	keys := make([]uint64, len(l.Digests))
	for i := range l.Digests {
		keys[i] = uint64(beginning(&l.Digests[i]))<<32 | uint64(i)
	}
	slices.SortFunc(keys, func(a, b uint64) int {
		if a>>32 != b>>32 {
			return cmp.Compare(a, b)
		}
		return cmp.Or(bytes.Compare(l.Digests[uint32(a)][:], l.Digests[uint32(b)][:]), cmp.Compare(a, b))
	})
	for _, k := range keys {
		_, _ = w.Write(le.AppendUint64(w.AvailableBuffer(), k))
	}
}

// ordered returns what is at place k in the order of digests.
func (p *packed) ordered(k int) (begins uint32, chunk int) {
	key := le.Uint64(p.b[p.sums+int64(k)*sumSize:])
	return uint32(key >> 32), int(uint32(key))
}

func (p *packed) sum(chunk int) []byte { return p.b[chunk*sha256.Size:][:sha256.Size] }

// compareAt compares what is at place k with what is at place m of o.
func (p *packed) compareAt(k int, o *packed, m int) int {
	a, c := p.ordered(k)
	b, d := o.ordered(m)
	if a != b {
		return cmp.Compare(a, b)
	}
	return bytes.Compare(p.sum(c), o.sum(d))
}

// Order returns what stands for the chunks in the order of their digests: in the upper half of each number the first 4 bytes of the digest, in the lower
// one the chunk's index. Two layers can be compared by it, but for a chance match, of which one isn't open. For a layer that isn't packed it is nil.
func (l *Layer) Order() []uint64 {
	p := l.packed
	if p == nil {
		return nil
	}
	order := make([]uint64, len(l.Chunks))
	p.reading(func() {
		for k := range order {
			order[k] = le.Uint64(p.b[p.sums+int64(k)*sumSize:])
		}
	})
	return order
}

// WithDigest iterates over the chunks whose bytes have a SHA-256, by their indices in Layer.Chunks. In a layer that isn't packed none is found.
func (l *Layer) WithDigest(sum [sha256.Size]byte) iter.Seq[int] {
	return func(yield func(int) bool) {
		p := l.packed
		if p == nil {
			return
		}
		begins := beginning(&sum)
		p.reading(func() {
			k := sort.Search(len(l.Chunks), func(k int) bool {
				b, c := p.ordered(k)
				return b > begins || b == begins && bytes.Compare(p.sum(c), sum[:]) >= 0
			})
			for ; k < len(l.Chunks); k++ {
				if b, c := p.ordered(k); b != begins || !bytes.Equal(p.sum(c), sum[:]) || !yield(c) {
					return
				}
			}
		})
	}
}

// Shared finds the chunks that two layers have in common, by their digests: it calls mine for those of l, and theirs for those of o. If o is l,
// it calls mine for the chunks that it has more than once. It takes one look at each chunk. In a layer that isn't packed none is found.
func (l *Layer) Shared(o *Layer, mine, theirs func(chunk int)) {
	p, q := l.packed, o.packed
	if p == nil || q == nil {
		return
	}
	p.reading(func() { q.reading(func() { l.shared(o, mine, theirs) }) })
}

func (l *Layer) shared(o *Layer, mine, theirs func(chunk int)) {
	p, q := l.packed, o.packed
	if l == o {
		same := func(k int) bool { return k > 0 && k < len(l.Chunks) && p.compareAt(k-1, p, k) == 0 }
		for k := range l.Chunks {
			if same(k) || same(k+1) {
				_, c := p.ordered(k)
				mine(c)
			}
		}
		return
	}
	for k, m := 0, 0; k < len(l.Chunks) && m < len(o.Chunks); {
		switch order := p.compareAt(k, q, m); {
		case order < 0:
			k++
		case order > 0:
			m++
		default:
			first := k
			for ; k < len(l.Chunks) && p.compareAt(k, q, m) == 0; k++ {
				_, c := p.ordered(k)
				mine(c)
			}
			for ; m < len(o.Chunks) && p.compareAt(first, q, m) == 0; m++ {
				_, c := q.ordered(m)
				theirs(c)
			}
		}
	}
}
