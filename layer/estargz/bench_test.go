package estargz_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// randomTOC has n files, whose names, sizes and places are about a Debian system's.
func randomTOC(t testing.TB, n int) string {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	random := func() string {
		b := make([]byte, 32)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return digest.NewDigestFromBytes(digest.SHA256, b).String()
	}
	entries := []stargz.TOCEntry{}
	offset := int64(0)
	for i := range n {
		dir := fmt.Sprintf("usr/lib/python3/dist-packages/package%d", i/25)
		if i%25 == 0 {
			entries = append(entries, stargz.TOCEntry{Type: "dir", Name: dir + "/", Mode: 0o755, ModTime3339: "2026-01-02T03:04:05Z"})
			continue
		}
		offset += int64(r.IntN(500) + 100)
		sum := random()
		entries = append(entries, stargz.TOCEntry{
			Type: "reg", Name: fmt.Sprintf("%s/module_%x.py", dir, r.Uint32()), Mode: 0o644, ModTime3339: "2026-01-02T03:04:05Z",
			Size: int64(r.IntN(90_000) + 1), Offset: offset, Digest: sum, ChunkDigest: sum,
		})
	}
	return tocOf(t, entries...)
}

// A layer of 100,000 entries, opened by us and by stargz-snapshotter; packed, as a daemon keeps it. That must take less than half a second.
func BenchmarkOpen100k(b *testing.B) {
	toc := randomTOC(b, 100_000)
	blob := blobOf(b, 100<<20, toc)
	open := func() *layer.Layer {
		opened, err := estargz.Open(blob.reader(), int64(len(blob.data)), estargz.Options{TOCDigest: blob.tocDigest})
		if err != nil {
			b.Fatal(err)
		}
		return opened.Layer
	}
	b.Run("layer", func(b *testing.B) {
		b.SetBytes(int64(len(toc)))
		b.ReportAllocs()
		for b.Loop() {
			open()
		}
		reportHeld(b, func() any { return open() })
	})
	b.Run("packed", func(b *testing.B) {
		b.SetBytes(int64(len(toc)))
		b.ReportAllocs()
		root := b.TempDir()
		pack := func() any {
			f, err := os.CreateTemp(root, "")
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			if err := os.Remove(f.Name()); err != nil {
				b.Fatal(err)
			}
			packed, err := open().Pack(f)
			if err != nil {
				b.Fatal(err)
			}
			return packed
		}
		for b.Loop() {
			pack()
		}
		if took := b.Elapsed() / time.Duration(b.N); took > time.Second/2 {
			b.Errorf("%v, want at most 500ms", took)
		}
		reportHeld(b, pack)
	})
	b.Run("stargz", func(b *testing.B) {
		b.SetBytes(int64(len(toc)))
		b.ReportAllocs()
		open := func() any {
			r, err := memory.NewReader(blob.reader())
			if err != nil {
				b.Fatal(err)
			}
			return r
		}
		for b.Loop() {
			open()
		}
		reportHeld(b, open)
	})
}

// What opening a layer leaves to the garbage collector is bounded, by entry: its name is copied once, and what holds all entries
// doesn't grow by copying itself.
func TestOpenLeavesLittleGarbage(t *testing.T) {
	const entries = 20_000
	blob := blobOf(t, 100<<20, randomTOC(t, entries))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	opened, err := estargz.Open(blob.reader(), int64(len(blob.data)), estargz.Options{TOCDigest: blob.tocDigest})
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	perEntry := func(n uint64) float64 { return float64(n) / entries }
	if n := perEntry(after.Mallocs - before.Mallocs); n > 1.5 {
		t.Errorf("%.2f allocations an entry, want at most 1.5", n)
	}
	if n := perEntry(after.TotalAlloc - before.TotalAlloc); n > 1000 {
		t.Errorf("%.0f bytes allocated an entry, want at most 1000", n)
	}
	runtime.KeepAlive(opened)
}

// reportHeld reports how much memory a result takes as long as it's in use.
func reportHeld(b *testing.B, open func() any) {
	b.Helper()
	held := func() uint64 {
		runtime.GC()
		runtime.GC() // what was in a sync.Pool outlives the first
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := held()
	result := open()
	b.ReportMetric(float64(held())-float64(before), "B-held")
	runtime.KeepAlive(result)
}

// One frame of 64 KiB after the other, as a scheduler decodes them.
func BenchmarkDecompress(b *testing.B) {
	content := make([]byte, 64<<10)
	for i := range content {
		content[i] = byte(i * i >> 8)
	}
	frame := gzipped(b, string(content))
	b.SetBytes(int64(len(content)))
	b.ReportAllocs()
	for b.Loop() {
		r, err := estargz.Codec{}.Decompress(bytes.NewReader(frame))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err != nil {
			b.Fatal(err)
		}
		r.Close()
	}
}

// goTree is a tar of Go's own sources and tools, which whoever runs this has: 12,000 small files and some large ones.
func goTree(b *testing.B) []byte {
	b.Helper()
	root, err := exec.CommandContext(b.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	tar, err := exec.CommandContext(b.Context(), "tar", "-C", strings.TrimSpace(string(root)), "--sort=name", "-c", "src", "bin").Output()
	if err != nil {
		b.Fatal(err)
	}
	return tar
}

// The same layer, written by us and as BuildKit does it with stargz-snapshotter's writer, which it has decompress all of it again. Run
// with -cpu 1,2 it says what the second CPU is good for.
func BenchmarkWrite(b *testing.B) {
	tar := goTree(b)
	b.Run("ours", func(b *testing.B) {
		b.SetBytes(int64(len(tar)))
		for b.Loop() {
			w, err := estargz.Write(b.Context(), io.Discard, bytes.NewReader(tar), estargz.WriteOptions{})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(w.Size), "B-blob")
		}
	})
	b.Run("stargz", func(b *testing.B) {
		b.SetBytes(int64(len(tar)))
		for b.Loop() {
			r, pw := io.Pipe()
			read := make(chan error)
			go func() {
				gz, err := gzip.NewReader(r)
				if err == nil {
					_, err = io.Copy(io.Discard, gz)
				}
				read <- err
			}()
			size := &counter{w: pw}
			w := stargz.NewWriterLevel(size, gzip.DefaultCompression)
			if err := w.AppendTarLossLess(bytes.NewReader(tar)); err != nil {
				b.Fatal(err)
			}
			if _, err := w.Close(); err != nil {
				b.Fatal(err)
			}
			pw.Close()
			if err := <-read; err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(size.n), "B-blob")
		}
	})
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.w.Write(p)
}

// BenchmarkWriteFrame writes one frame after the other, of a small file or of a chunk each, on one CPU.
func BenchmarkWriteFrame(b *testing.B) {
	for _, size := range []int{16 << 10, 64 << 10, 4 << 20} {
		content := strings.Repeat(noise(1, 300)+"some text that comes again", size/326+1)[:size]
		var files []layertest.Entry
		for i := range 8 << 20 / size {
			files = append(files, file(fmt.Sprint(i), content))
		}
		tar := layertest.Tar(b, files...)
		opt := estargz.WriteOptions{Pool: estargz.NewPool(1), MinChunkSize: 1}
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.SetBytes(int64(len(tar)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := estargz.Write(b.Context(), io.Discard, bytes.NewReader(tar), opt); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
