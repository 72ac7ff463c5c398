package deflate

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

// skewed are letters without order, some of them rare: Huffman coding is all that helps, and its codewords are as long as they get.
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

// inputs are by what they are good for.
func inputs(t testing.TB) map[string][]byte {
	far := noise(1, window)
	in := map[string][]byte{
		"empty":              {},
		"one byte":           {7},
		"one byte, 9 times":  bytes.Repeat([]byte{7}, 9),
		"zeros":              make([]byte, 1<<20),
		"longest match":      append(bytes.Repeat([]byte("x"), maxMatch+1), 'y'),
		"two letters":        bytes.Repeat([]byte("ab"), 70_000),
		"farthest match":     append(far[:window:window], far[:100]...),
		"one too far":        append(append(far[:window:window], '!'), far[:100]...),
		"positions wrap":     append(append(text(1, 1<<16+5), noise(2, 1<<15)...), text(1, 1<<16)...),
		"noise":              noise(3, 300_000),
		"a block of stored":  noise(4, maxStored),
		"one byte more":      noise(4, maxStored+1),
		"noise then text":    append(noise(5, 150_000), text(5, 150_000)...),
		"text then noise":    append(text(6, 150_000), noise(6, 150_000)...),
		"skewed":             skewed(7, 2<<20),
		"text":               text(8, 400_000),
		"program":            program(t, 1<<20),
		"long literal block": append(noise(9, 3<<20), text(9, 1000)...),
		"every byte":         noise(10, 256),
	}
	for n := range 3 * lookahead {
		in[fmt.Sprintf("%d letters", n)] = []byte("abcabcabcabcabcabcabcabcabcabcabcabc")[:n]
	}
	return in
}
