package estargz_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

func TestWriteRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		entry layertest.Entry
		want  error
	}{
		"TOC":              {file("stargz.index.json", "{}"), estargz.ErrReserved},
		"TOC, with a dot":  {file("./stargz.index.json", "{}"), estargz.ErrReserved},
		"TOC, a directory": {dir("stargz.index.json/"), estargz.ErrReserved},
		"landmark, other":  {file(".prefetch.landmark", "y"), estargz.ErrReserved},
		"landmark, long":   {file("/.no.prefetch.landmark", "\x0f\x0f"), estargz.ErrReserved},
		"landmark, a link": {symlink(".prefetch.landmark", "x"), estargz.ErrReserved},
	} {
		t.Run(name, func(t *testing.T) {
			in := layertest.Tar(t, file("first", "x"), c.entry, file("last", "y"))
			_, err := estargz.Write(t.Context(), io.Discard, bytes.NewReader(in), estargz.WriteOptions{})
			e, ok := errors.AsType[*layer.EntryError](err)
			if !errors.Is(err, c.want) || !ok || e.Name != c.entry.Name {
				t.Errorf("got %v, want %q: %v", err, c.entry.Name, c.want)
			}
		})
	}
	for name, opt := range map[string]estargz.WriteOptions{
		"level too high":      {Level: new(10)},
		"level too low":       {Level: new(-3)},
		"chunk too large":     {ChunkSize: estargz.MaxChunkSize + 1},
		"chunk below nothing": {ChunkSize: -1},
		"frame too large":     {MinChunkSize: estargz.MaxChunkSize + 1},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := estargz.Write(t.Context(), io.Discard, bytes.NewReader(nil), opt); err == nil {
				t.Error("no error")
			}
		})
	}
}

// A tar that ends anywhere but between entries is an error; the padding of the last file belongs to it.
func TestWriteTruncated(t *testing.T) {
	in := layertest.Tar(t, dir("d/"), file("d/a", strings.Repeat("x", 700)).Xattr("user.x", "y"), file("b", "z"))
	whole := map[int]bool{}
	for at := 0; at <= len(in); at += 512 {
		whole[at] = true
	}
	for at := range len(in) {
		if at%8 != 0 && at%512 > 8 {
			continue
		}
		var b bytes.Buffer
		w, err := estargz.Write(t.Context(), &b, bytes.NewReader(in[:at]), estargz.WriteOptions{ChunkSize: 300, MinChunkSize: 1})
		switch {
		case err == nil && !whole[at]:
			t.Errorf("%d bytes of %d are a layer", at, len(in))
		case err != nil && !errors.Is(err, io.ErrUnexpectedEOF):
			t.Errorf("%d bytes: %v", at, err)
		case err == nil:
			wantPrefix(t, b.Bytes(), in[:at], w)
		}
	}
}

func wantPrefix(t *testing.T, blob, in []byte, w estargz.Written) {
	t.Helper()
	if out := gunzip(t, blob); !bytes.HasPrefix(out, in) || digest.FromBytes(out) != w.DiffID {
		t.Errorf("%d bytes aren't in the blob, or it's another than %s", len(in), w.DiffID)
	}
}

func TestWriteLossy(t *testing.T) {
	for name, c := range map[string]struct {
		entry layertest.Entry
		want  string
	}{
		"name":   {file("caf\xe9", "x"), "caf\xe9"},
		"target": {symlink("l", "caf\xe9"), "l"},
		"xattr":  {file("a", "x").Xattr("user.\xe9", "y"), "a"},
		"value":  {file("a", "x").Xattr("user.x", "\xe9"), ""},
		"UTF-8":  {file("caf\u00e9", "x"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			in := layertest.Tar(t, c.entry)
			b, w := written(t, in, estargz.WriteOptions{})
			if w.Lossy != c.want {
				t.Errorf("lossy because of %q, want %q", w.Lossy, c.want)
			}
			wantLossless(t, b, w, in)
		})
	}
}

// What a TOC has no place for has none: the blob is the tar, gzip'ed. A hole takes no time, and what there is no room in memory either.
func TestWriteUntold(t *testing.T) {
	tars, names := layertest.Sparse(t), map[string]string{}
	for name := range tars {
		names[name] = "hole"
	}
	tars["type"] = layertest.Tar(t, file("first", "x"), layertest.Entry{Header: tar.Header{Typeflag: 'Q', Name: "odd"}}, file("caf\xe9", "y"))
	names["type"] = "odd"
	for name, in := range tars {
		for _, external := range []bool{false, true} {
			b, w := written(t, in, estargz.WriteOptions{ExternalTOC: external})
			if w.Lossy != names[name] || w.TOCDigest != "" || w.TOC != nil {
				t.Errorf("%s: %+v", name, w)
			}
			if sum := digest.FromBytes(in); w.DiffID != sum || w.Tar != sum || w.TarSize != int64(len(in)) || w.Digest != digest.FromBytes(b.data) || !bytes.Equal(gunzip(t, b.data), in) {
				t.Errorf("%s: the blob isn't the tar: %+v", name, w)
			}
			if _, err := estargz.Open(b.reader(), w.Size, estargz.Options{}); !errors.Is(err, estargz.ErrFooter) {
				t.Errorf("%s: opened as a layer: %v", name, err)
			}
		}
		if name == "type" {
			continue
		}
		// One that ends in the middle of the file.
		if _, err := estargz.Write(t.Context(), io.Discard, bytes.NewReader(in[:1<<20]), estargz.WriteOptions{}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: half of it: %v", name, err)
		}
		if _, err := estargz.Write(t.Context(), &failingWriter{left: 1 << 20, err: io.ErrShortWrite}, bytes.NewReader(in), estargz.WriteOptions{}); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("%s: the disk is full: %v", name, err)
		}
	}
}

// failingWriter fails after so many bytes.
type failingWriter struct {
	left int
	err  error
}

func (w *failingWriter) Write(p []byte) (int, error) {
	if len(p) > w.left {
		return w.left, w.err
	}
	w.left -= len(p)
	return len(p), nil
}

// What fails leaves neither goroutines nor room of the pool behind.
func TestWriteFails(t *testing.T) {
	// Ten of it are more than the pool has room for.
	part := layertest.Tar(t, file("a", noise(1, 300_000)), file("b", noise(2, 100)), file("c", noise(3, 9_000_000)))
	part = part[:len(part)-1024]
	bad := layertest.Tar(t, file("stargz.index.json", "x"))
	many := func() io.Reader { return bytes.NewReader(bytes.Repeat(part, 10)) }
	full, stop := errors.New("disk full"), errors.New("stopped")
	pool := estargz.NewPool(2)
	opt := estargz.WriteOptions{Pool: pool, Level: new(1)}
	before := runtime.NumGoroutine()
	for i := range 18 {
		ctx, cancel := context.WithCancelCause(t.Context())
		var err error
		var want error
		switch i % 3 {
		case 0:
			want = full
			_, err = estargz.Write(ctx, &failingWriter{left: i * 300_000, err: full}, many(), opt)
		case 1:
			want = stop
			r, w := io.Pipe()
			go func() {
				_, _ = io.CopyN(w, many(), int64(i)*1_000_000) // it fails once nobody reads any more
				cancel(stop)
				w.CloseWithError(stop)
			}()
			_, err = estargz.Write(ctx, io.Discard, r, opt)
		case 2:
			want = estargz.ErrReserved
			_, err = estargz.Write(ctx, io.Discard, io.MultiReader(bytes.NewReader(part[:i/9*len(part)]), bytes.NewReader(bad)), opt)
		}
		cancel(nil)
		if !errors.Is(err, want) {
			t.Errorf("%d: %v, want %v", i, err, want)
		}
	}
	in := layertest.Tar(t, file("a", noise(1, 20<<20)))
	if _, err := estargz.Write(t.Context(), io.Discard, bytes.NewReader(in), estargz.WriteOptions{Pool: pool}); err != nil {
		t.Error(err)
	}
	for range 1000 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines, before there were %d", runtime.NumGoroutine(), before)
}

// zeros is a tar of a file of so many bytes, made as it's read.
func zeros(t *testing.T, size int64) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: size}); err != nil {
		t.Fatal(err)
	}
	return io.MultiReader(&b, io.LimitReader(zeroReader{}, size+1024))
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Layers of any size take the memory of the pool, also several at a time.
func TestWriteMemory(t *testing.T) {
	pool := estargz.NewPool(2)
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	before := m.HeapAlloc
	errs := make(chan error)
	for range 3 {
		in := zeros(t, 96<<20)
		go func() {
			_, err := estargz.Write(t.Context(), io.Discard, in, estargz.WriteOptions{Pool: pool, Level: new(1)})
			errs <- err
		}()
	}
	peak, done := uint64(0), 0
	for done < 3 {
		select {
		case err := <-errs:
			if err != nil {
				t.Fatal(err)
			}
			done++
		case <-time.After(5 * time.Millisecond):
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapAlloc-min(before, m.HeapAlloc))
		}
	}
	if peak > 128<<20 {
		t.Errorf("288 MiB in three layers took %d MiB", peak>>20)
	}
}
