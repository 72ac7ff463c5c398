package zstd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

// noise is what can't be compressed.
func noise(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, 0, size+8)
	for len(b) < size {
		b = binary.LittleEndian.AppendUint64(b, r.Uint64())
	}
	return b[:size]
}

// skewed are letters without order, some of them rare: Huffman coding is all that helps.
func skewed(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 8))
	b := make([]byte, size)
	for i := range b {
		for b[i] = 0; b[i] < 40 && r.IntN(2) == 0; b[i]++ {
		}
	}
	return b
}

// program is the test itself: code, tables, names, and in between what looks like nothing.
func program(t testing.TB, size int) []byte {
	t.Helper()
	name, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b[len(b)/4:][:size]
}

// text has words that come again, near and far.
func text(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 9))
	words := strings.Fields("layer blob frame chunk table of contents digest mount lazy eager fetch door fill registry the a an is that which")
	var b bytes.Buffer
	for b.Len() < size {
		if r.IntN(12) == 0 {
			fmt.Fprintf(&b, "%x\n", r.Uint64())
		} else {
			fmt.Fprintf(&b, "%s ", words[int(r.ExpFloat64()*4)%len(words)])
		}
	}
	return b.Bytes()[:size]
}

// pairs are words of two kinds of matches: as many sequences as a block can have, of 4 bytes each.
func pairs(size int) []byte {
	r := rand.New(rand.NewPCG(1, 10))
	var words [64][5]byte
	for i := range words {
		copy(words[i][:], noise(uint64(i), 5))
	}
	var b []byte
	for len(b) < size {
		b = append(b, words[r.IntN(len(words))][:]...)
	}
	return b[:size]
}

// inputs are by what they are good for.
func inputs(t testing.TB) map[string][]byte {
	beyond := append(text(1, window), noise(1, 1000)...)
	in := map[string][]byte{
		"empty":                 {},
		"one byte":              {7},
		"one byte, 9 times":     bytes.Repeat([]byte{7}, 9),
		"zeros":                 make([]byte, 1<<20),
		"zeros and a byte":      append(make([]byte, maxBlock), 1),
		"two letters":           bytes.Repeat([]byte("ab"), 170_000),
		"three letters":         bytes.Repeat([]byte("abc"), 300),
		"longest match":         append(bytes.Repeat([]byte("longest!"), 2*maxBlock/8), 'y'),
		"most literals":         append(noise(1, maxBlock-20), bytes.Repeat([]byte("a"), 20)...),
		"many sequences":        pairs(600_000),
		"positions wrap":        append(beyond, beyond...),
		"noise":                 noise(3, 300_000),
		"a block of noise":      noise(4, maxBlock),
		"one byte more":         noise(4, maxBlock+1),
		"noise twice":           append(noise(5, 150_000), noise(5, 150_000)...),
		"noise then text":       append(noise(5, 150_000), text(5, 150_000)...),
		"text then noise":       append(text(6, 150_000), noise(6, 250_000)...),
		"text, noise, the same": append(append(text(6, 150_000), noise(6, 2*maxBlock)...), text(6, 150_000)...),
		"text, zeros, the same": append(append(text(6, maxBlock), make([]byte, maxBlock)...), text(6, maxBlock)...),
		"skewed":                skewed(7, 1<<20),
		"few skewed":            skewed(7, 900),
		"text":                  text(8, 400_000),
		"program":               program(t, 1<<20),
		"every byte":            noise(10, 256),
		"header of two bytes":   text(11, 255),
		"header of four":        text(11, 256+1<<16),
	}
	for n := range 3 * lookahead {
		in[fmt.Sprintf("%d letters", n)] = []byte("abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc")[:n]
	}
	return in
}
