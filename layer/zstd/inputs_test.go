package zstd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// pairs are words of two kinds of matches: as many sequences as a block can have, of 4 bytes each.
func pairs(size int) []byte {
	r := rand.New(rand.NewPCG(1, 10))
	var words [64][5]byte
	for i := range words {
		copy(words[i][:], layertest.Noise(uint64(i), 5))
	}
	var b []byte
	for len(b) < size {
		b = append(b, words[r.IntN(len(words))][:]...)
	}
	return b[:size]
}

// inputs are by what they are good for.
var inputs = layertest.Once(func(t testing.TB) map[string][]byte {
	beyond := append(layertest.Text(1, window), layertest.Noise(1, 1000)...)
	in := map[string][]byte{
		"empty":                 {},
		"one byte":              {7},
		"one byte, 9 times":     bytes.Repeat([]byte{7}, 9),
		"zeros":                 make([]byte, 1<<20),
		"zeros and a byte":      append(make([]byte, maxBlock), 1),
		"two letters":           bytes.Repeat([]byte("ab"), 170_000),
		"three letters":         bytes.Repeat([]byte("abc"), 300),
		"longest match":         append(bytes.Repeat([]byte("longest!"), 2*maxBlock/8), 'y'),
		"most literals":         append(layertest.Noise(1, maxBlock-20), bytes.Repeat([]byte("a"), 20)...),
		"many sequences":        pairs(600_000),
		"positions wrap":        append(beyond, beyond...),
		"noise":                 layertest.Noise(3, 300_000),
		"a block of noise":      layertest.Noise(4, maxBlock),
		"one byte more":         layertest.Noise(4, maxBlock+1),
		"noise twice":           append(layertest.Noise(5, 150_000), layertest.Noise(5, 150_000)...),
		"noise then text":       append(layertest.Noise(5, 150_000), layertest.Text(5, 150_000)...),
		"text then noise":       append(layertest.Text(6, 150_000), layertest.Noise(6, 250_000)...),
		"text, noise, the same": append(append(layertest.Text(6, 150_000), layertest.Noise(6, 2*maxBlock)...), layertest.Text(6, 150_000)...),
		"text, zeros, the same": append(append(layertest.Text(6, maxBlock), make([]byte, maxBlock)...), layertest.Text(6, maxBlock)...),
		"skewed":                layertest.Skewed(7, 1<<20),
		"few skewed":            layertest.Skewed(7, 900),
		"text":                  layertest.Text(8, 400_000),
		"program":               layertest.Program(t, 1<<20),
		"every byte":            layertest.Noise(10, 256),
		"header of two bytes":   layertest.Text(11, 255),
		"header of four":        layertest.Text(11, 256+1<<16),
	}
	for n := range 3 * lookahead {
		in[fmt.Sprintf("%d letters", n)] = []byte("abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc")[:n]
	}
	return in
})
