package deflate

import (
	"encoding/binary"
	"slices"
)

// A bitWriter appends bits to a buffer, of each byte the lowest first.
type bitWriter struct {
	out  []byte
	acc  uint64
	have uint // bits in acc, less than 8 after a flush
}

func (w *bitWriter) grow(n int) { w.out = slices.Grow(w.out, n) }

// put adds bits; there must be a flush before there are 64.
func (w *bitWriter) put(v uint64, bits uint) {
	w.acc |= v << (w.have & 63)
	w.have += bits
}

// flush moves whole bytes to the buffer.
func (w *bitWriter) flush() {
	w.out = binary.LittleEndian.AppendUint64(w.out, w.acc)
	w.out = w.out[:len(w.out)-8+int(w.have>>3)]
	w.acc >>= w.have &^ 7 & 63
	w.have &= 7
}

// align fills the last byte up.
func (w *bitWriter) align() {
	w.have = (w.have + 7) &^ 7
	w.flush()
}

// stored writes blocks of bytes as they are.
func (w *bitWriter) stored(src []byte, last uint64) {
	for {
		n := min(len(src), maxStored)
		final := uint64(0)
		if n == len(src) {
			final = last
		}
		w.put(final|blockStored<<1, 3)
		w.align()
		w.out = binary.LittleEndian.AppendUint16(w.out, uint16(n))
		w.out = binary.LittleEndian.AppendUint16(w.out, ^uint16(n))
		w.out = append(w.out, src[:n]...)
		if src = src[n:]; len(src) == 0 {
			return
		}
	}
}
