package integration

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
)

// noise returns n bytes that do not compress and are the same in every run.
func noise(seed uint64, n int) string {
	rng := rand.New(rand.NewPCG(seed, 77))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return string(b)
}

// bigLayer is a layer of files of 1 MiB that do not compress: big/0, big/1, and so on.
func bigLayer(t *testing.T, n int) baseimage.Layer {
	t.Helper()
	entries := []baseimage.Entry{baseimage.Dir("big")}
	for i := range n >> 20 {
		entries = append(entries, baseimage.File(fmt.Sprintf("big/%d", i), noise(uint64(i), 1<<20)))
	}
	return layer(t, "big", entries...)
}
