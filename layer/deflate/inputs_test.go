package deflate

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// inputs are by what they are good for.
var inputs = layertest.Once(func(t testing.TB) map[string][]byte {
	far := layertest.Noise(1, window)
	in := map[string][]byte{
		"empty":              {},
		"one byte":           {7},
		"one byte, 9 times":  bytes.Repeat([]byte{7}, 9),
		"zeros":              make([]byte, 1<<20),
		"longest match":      append(bytes.Repeat([]byte("x"), maxMatch+1), 'y'),
		"two letters":        bytes.Repeat([]byte("ab"), 70_000),
		"farthest match":     append(far[:window:window], far[:100]...),
		"one too far":        append(append(far[:window:window], '!'), far[:100]...),
		"positions wrap":     append(append(layertest.Text(1, 1<<16+5), layertest.Noise(2, 1<<15)...), layertest.Text(1, 1<<16)...),
		"noise":              layertest.Noise(3, 300_000),
		"a block of stored":  layertest.Noise(4, maxStored),
		"one byte more":      layertest.Noise(4, maxStored+1),
		"noise then text":    append(layertest.Noise(5, 150_000), layertest.Text(5, 150_000)...),
		"text then noise":    append(layertest.Text(6, 150_000), layertest.Noise(6, 150_000)...),
		"skewed":             layertest.Skewed(7, 2<<20),
		"text":               layertest.Text(8, 400_000),
		"program":            layertest.Program(t, 1<<20),
		"long literal block": append(layertest.Noise(9, 3<<20), layertest.Text(9, 1000)...),
		"every byte":         layertest.Noise(10, 256),
	}
	for n := range 3 * lookahead {
		in[fmt.Sprintf("%d letters", n)] = []byte("abcabcabcabcabcabcabcabcabcabcabcabc")[:n]
	}
	return in
})
