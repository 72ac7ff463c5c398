// Package sha256s has up to three SHA-256 digests go over the same bytes for little more than the price of one.
//
// A layer's tar is hashed as a whole, and its files and chunks are by themselves. The rounds of SHA-256 depend on each other, so a CPU that
// has instructions for them waits for most of the time: other digests of the same blocks, which have the words of a block in common, fill
// that. Where there are no such instructions, but AVX-512, each digest has a lane of its registers, which takes fewer operations than crypto/sha256 does for
// one. A payload in a tar begins at a block, as SHA-256 has blocks of 64 bytes and a tar of 512.
//
// What a digest is stays crypto/sha256's: this takes its state, as encoding.BinaryAppender has it, and gives it back.
package sha256s

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"hash"
)

const (
	// magic begins the state of crypto/sha256's digests. Behind it are the eight words of the state, a block that isn't complete, and the
	// number of bytes.
	magic     = "sha\x03"
	stateSize = len(magic) + sha256.Size + sha256.BlockSize + 8
	lengthAt  = stateSize - 8

	// worthwhile is how many bytes make up for taking the states and giving them back. It's more than the rest of a block and a way's unit.
	worthwhile = 1 << 10
)

// A way is how up to three states go over the same bytes.
type way struct {
	over  func(p []byte, states ...*words)
	unit  int // of how many bytes p is a multiple
	least int // how many states make it faster than one after the other
}

// ways are what this CPU has, the best first. Without one there is nothing better than one after the other.
var ways []way

// Write writes p to digests. They are crypto/sha256's, and not more than three, if it's to be fast.
func Write(p []byte, digests ...hash.Hash) {
	if len(ways) > 0 && len(p) >= worthwhile {
		p = p[together(p, digests):]
	}
	for _, d := range digests {
		d.Write(p)
	}
}

// A state is a digest that can be taken from where it is.
type state interface {
	encoding.BinaryAppender
	encoding.BinaryUnmarshaler
}

// together writes p to all, up to the last complete block, if all are at the same place in a block, and returns how many bytes that are.
func together(p []byte, digests []hash.Hash) int {
	var w [3]words
	var states []*words
	if len(digests) < ways[0].least || len(digests) > len(w) {
		return 0
	}
	for i, d := range digests {
		if !w[i].take(d) || w[i].begun() != w[0].begun() {
			return 0
		}
		states = append(states, &w[i])
	}
	rest := 0 // of the block that is begun
	if begun := w[0].begun(); begun > 0 {
		rest = sha256.BlockSize - begun
		for i, d := range digests {
			d.Write(p[:rest])
			w[i].take(d)
		}
	}
	n := (len(p) - rest) / ways[0].unit * ways[0].unit
	ways[0].over(p[rest:rest+n], states...)
	for i, d := range digests {
		w[i].give(d.(state), n)
	}
	return rest + n
}

// words are the state of a digest.
type words struct {
	state   [8]uint32
	encoded []byte
}

// take takes the state of h, and reports whether that is one of crypto/sha256's.
func (w *words) take(h hash.Hash) bool {
	s, ok := h.(state)
	if !ok {
		return false
	}
	var err error
	w.encoded, err = s.AppendBinary(make([]byte, 0, stateSize))
	if err != nil || len(w.encoded) != stateSize || string(w.encoded[:len(magic)]) != magic {
		return false
	}
	for i := range w.state {
		w.state[i] = binary.BigEndian.Uint32(w.encoded[len(magic)+4*i:])
	}
	return true
}

// begun returns how many bytes of a block have been written.
func (w *words) begun() int {
	return int(binary.BigEndian.Uint64(w.encoded[lengthAt:]) % sha256.BlockSize)
}

// give gives the state, of a digest that was at the beginning of a block, back to it, n bytes further on.
func (w *words) give(s state, n int) {
	for i, v := range w.state {
		binary.BigEndian.PutUint32(w.encoded[len(magic)+4*i:], v)
	}
	length := w.encoded[lengthAt:]
	binary.BigEndian.PutUint64(length, binary.BigEndian.Uint64(length)+uint64(n))
	if err := s.UnmarshalBinary(w.encoded); err != nil {
		panic("sha256s: " + err.Error()) // it has encoded it itself
	}
}
