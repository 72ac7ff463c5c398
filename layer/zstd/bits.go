package zstd

import "encoding/binary"

// A bitWriter packs numbers into bytes, the first into the lowest bits.
type bitWriter struct {
	out []byte // with room for the word that is stored next
	bit uint64 // what isn't in out yet
	n   uint   // how many bits that are
}

// add appends the lowest n bits of v, which has no others. There may be up to 63 at a time; flush leaves up to 7.
func (w *bitWriter) add(v uint64, n uint) {
	w.bit |= v << (w.n & 63)
	w.n += n
}

// flush stores whole bytes.
func (w *bitWriter) flush() {
	at := len(w.out)
	binary.LittleEndian.PutUint64(w.out[at:at+8], w.bit)
	w.out = w.out[:at+int(w.n>>3)]
	w.bit >>= w.n & 56
	w.n &= 7
}

// align fills the last byte up with zeros.
func (w *bitWriter) align() {
	w.n = (w.n + 7) &^ 7
	w.flush()
}
