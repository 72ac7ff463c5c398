package order_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// BenchmarkTar orders a layer of 3,000 files, 60 MB, of which a list names every tenth.
func BenchmarkTar(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	content := make([]byte, 40<<10)
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	var entries []layertest.Entry
	var list bytes.Buffer
	for i := range 3000 {
		name := fmt.Sprintf("usr/lib/%d/%d", i/100, i)
		entries = append(entries, file(name, string(content[:r.IntN(len(content))])))
		if i%10 == 0 {
			fmt.Fprintln(&list, name)
		}
	}
	in, l, dir := layertest.Tar(b, entries...), parse(b, list.String()), b.TempDir()
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		o, err := l.Tar(b.Context(), bytes.NewReader(in), dir)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, o); err != nil {
			b.Fatal(err)
		}
		if err := o.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
