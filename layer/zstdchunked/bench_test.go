package zstdchunked_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// BenchmarkWriteFrame writes one frame after the other, of a small file or of a chunk each, on one CPU.
func BenchmarkWriteFrame(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	for _, size := range []int{16 << 10, 64 << 10, 4 << 20} {
		content := strings.Repeat(string(noise)+"some text that comes again", size/326+1)[:size]
		var files []layertest.Entry
		for i := range 8 << 20 / size {
			files = append(files, layertest.File(fmt.Sprint(i), content))
		}
		tar := layertest.Tar(b, files...)
		opt := zstdchunked.WriteOptions{Pool: frames.NewPool(1), NoDiffID: true}
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.SetBytes(int64(len(tar)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := zstdchunked.Write(b.Context(), io.Discard, bytes.NewReader(tar), opt); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
