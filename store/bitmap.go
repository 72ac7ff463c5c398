package store

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

// bitmap is a set of chunks. Its methods are atomic, each for itself.
type bitmap []atomic.Uint64

func newBitmap(n int) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) has(i int) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }

// add reports whether i was not in the set.
func (b bitmap) add(i int) bool { return b[i/64].Or(1<<(i%64))&(1<<(i%64)) == 0 }

func (b bitmap) remove(i int) { b[i/64].And(^uint64(1 << (i % 64))) }

// next returns the first chunk, from i up to end, that is in the set (in) or isn't (!in); end if there is none.
func (b bitmap) next(i, end int, in bool) int {
	for i < end {
		w := b[i/64].Load()
		if !in {
			w = ^w
		}
		if w >>= i % 64; w != 0 {
			return min(i+bits.TrailingZeros64(w), end)
		}
		i = i/64*64 + 64
	}
	return end
}

func (b bitmap) count() (n int) {
	for i := range b {
		n += bits.OnesCount64(b[i].Load())
	}
	return n
}

// bytes returns the set in little endian order: chunk i is bit i%8 of byte i/8.
func (b bitmap) bytes() []byte {
	p := make([]byte, 0, len(b)*8)
	for i := range b {
		p = binary.LittleEndian.AppendUint64(p, b[i].Load())
	}
	return p
}

// load is the inverse of bytes, for a set of n chunks. It reports whether p is such a set.
func (b bitmap) load(p []byte, n int) bool {
	if len(p) != len(b)*8 {
		return false
	}
	for i := range b {
		b[i].Store(binary.LittleEndian.Uint64(p[i*8:]))
	}
	return n%64 == 0 || b[len(b)-1].Load()>>(n%64) == 0
}
