package layertest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Noise is what can't be compressed.
func Noise(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, 0, size+8)
	for len(b) < size {
		b = binary.LittleEndian.AppendUint64(b, r.Uint64())
	}
	return b[:size]
}

// Skewed are letters without order, some of them rare: Huffman coding is all that helps, and its codewords are as long as they get.
func Skewed(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 8))
	b := make([]byte, size)
	for i := range b {
		for b[i] = 0; b[i] < 40 && r.IntN(2) == 0; b[i]++ {
		}
	}
	return b
}

// Program is the test itself: code, tables, names, and in between what looks like nothing.
func Program(t testing.TB, size int) []byte {
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

// Text has words that come again, near and far.
func Text(seed uint64, size int) []byte {
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

// Once returns a function that has inputs made when they are first wanted, and then returns the same: they take seconds under the race detector.
// Tests leave them as they are.
func Once(make func(testing.TB) map[string][]byte) func(testing.TB) map[string][]byte {
	var once sync.Once
	var inputs map[string][]byte
	return func(t testing.TB) map[string][]byte {
		t.Helper()
		once.Do(func() { inputs = make(t) })
		if inputs == nil {
			t.Fatal("the inputs couldn't be made, as another test says")
		}
		return inputs
	}
}

// Pieces appends pieces of inputs in any order and of any size, up to 128 KB each: another series for each seed, and the same for the same inputs.
func Pieces(inputs map[string][]byte, seed uint64) []byte {
	var names []string
	for name := range inputs {
		names = append(names, name)
	}
	slices.Sort(names)
	r := rand.New(rand.NewPCG(seed, 1))
	var in []byte
	for range 1 + r.IntN(8) {
		p := inputs[names[r.IntN(len(names))]]
		if len(p) > 0 {
			p = p[r.IntN(len(p)):]
		}
		in = append(in, p[:min(len(p), 1<<r.IntN(18))]...)
	}
	return in
}
