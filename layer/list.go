package layer

// A list grows without copying what is in it: the 100,000 inodes of a large layer, doubled time and again, would leave
// five times their size to the garbage collector.
type list[T any] struct {
	blocks [][]T
}

const listBlock = 256

func (l *list[T]) len() int {
	if len(l.blocks) == 0 {
		return 0
	}
	last := len(l.blocks) - 1
	return last*listBlock + len(l.blocks[last])
}

// at returns the element at an index, which stays where it is.
func (l *list[T]) at(i uint32) *T { return &l.blocks[i/listBlock][i%listBlock] }

// add returns the index of what it has added.
func (l *list[T]) add(v T) uint32 {
	n := l.len()
	if n%listBlock == 0 {
		l.blocks = append(l.blocks, make([]T, 0, listBlock))
	}
	last := &l.blocks[n/listBlock]
	*last = append(*last, v)
	return uint32(n)
}

// all iterates over the indices and the elements.
func (l *list[T]) all(yield func(uint32, *T) bool) {
	for i, block := range l.blocks {
		for j := range block {
			if !yield(uint32(i*listBlock+j), &block[j]) {
				return
			}
		}
	}
}
