package zstdchunked_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// packed is a layer of ours, and where the headers of its tar are.
func packed(t testing.TB, in []byte, chunk int64) (b blob, headers []byte) {
	t.Helper()
	var out bytes.Buffer
	w, err := zstdchunked.Write(t.Context(), &out, bytes.NewReader(in), zstdchunked.WriteOptions{ChunkSize: chunk})
	if err != nil {
		t.Fatal(err)
	}
	at, err := zstdchunked.ParsePosition(w.Annotations[zstdchunked.TarSplitAnnotation])
	if err != nil {
		t.Fatal(err)
	}
	return blob{out.Bytes(), w.Annotations}, out.Bytes()[at.Offset:][:at.Size]
}

// chunksOf returns chunks out of a layer's data space, all in one buffer.
func chunksOf(l *layer.Layer, data []byte) func(int) ([]byte, error) {
	var buf []byte
	return func(i int) ([]byte, error) {
		c := l.Chunks[i]
		buf = append(buf[:0], data[c.Data:c.End()]...)
		return buf, nil
	}
}

// A tar comes out of a layer as it went in.
func TestTar(t *testing.T) {
	for seed := range layertest.Seeds(40) {
		r := rand.New(rand.NewPCG(seed, 5))
		entries := layertest.Random(r, r.IntN(60))
		in := layertest.Tar(t, entries...)
		b, headers := packed(t, in, []int64{0, 1000, 300}[seed%3])
		l := open(t, b, bytes.NewReader(b.data)).Layer
		tr, err := zstdchunked.OpenTar(bytes.NewReader(headers), l, chunksOf(l, layertest.Fill(t, l, bytes.NewReader(b.data))))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(iotest.OneByteReader(tr))
		if err != nil || !bytes.Equal(got, in) {
			t.Errorf("%d: %d bytes, want %d: %v", seed, len(got), len(in), err)
		}
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Headers that don't go with the layer are an error, and so is a chunk that can't be had.
func TestTarFails(t *testing.T) {
	in := layertest.Tar(t, layertest.File("a", "content"), layertest.Dir("d"))
	b, headers := packed(t, in, 0)
	l := open(t, b, bytes.NewReader(b.data)).Layer
	chunk := chunksOf(l, layertest.Fill(t, l, bytes.NewReader(b.data)))
	split, err := decompress(headers)
	if err != nil {
		t.Fatal(err)
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	change := func(old, new string) []byte {
		return enc.EncodeAll(bytes.Replace(split, []byte(old), []byte(new), 1), nil)
	}
	for name, c := range map[string]struct {
		headers []byte
		chunk   func(int) ([]byte, error)
		want    string
	}{
		"another name": {change(`"name":"a"`, `"name":"b"`), chunk, "b"},
		"outside":      {change(`"name":"a"`, `"name":"../../a/b"`), chunk, "a/b"},
		"a directory":  {change(`"name":"a"`, `"name":"d"`), chunk, `"d"`},
		"another size": {change(`"size":7`, `"size":8`), chunk, "8 bytes"},
		"no JSON":      {change(`"type":`, `"type"`), chunk, "headers of the tar"},
		"not zstd":     {[]byte("no zstd"), chunk, "headers of the tar"},
		"cut off":      {headers[:len(headers)-5], chunk, "headers of the tar"},
		"chunk":        {headers, func(int) ([]byte, error) { return nil, gone }, gone.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			tr, err := zstdchunked.OpenTar(bytes.NewReader(c.headers), l, c.chunk)
			if err == nil {
				defer tr.Close()
				_, err = io.ReadAll(tr)
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
		})
	}
}

// TestTarInPieces reads headers of which each entry is small enough to be in memory, and all together aren't; one that is too large is an error.
func TestTarInPieces(t *testing.T) {
	in := layertest.Tar(t, layertest.File("a", "content"))
	b, _ := packed(t, in, 0)
	l := open(t, b, bytes.NewReader(b.data)).Layer
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	segment := func(size int) string { return `{"type":2,"payload":"` + strings.Repeat("AAAA", size/3) + `"}` }
	for name, c := range map[string]struct {
		split string
		want  int64
		err   error
	}{
		"many":          {strings.Repeat(segment(6<<20), 6), 36 << 20, nil},
		"large":         {segment(3) + segment(15<<20), 3, layer.ErrLimit},
		"a large name":  {`{"type":1,"name":"` + strings.Repeat("a", 17<<20) + `"}`, 0, layer.ErrLimit},
		"a large field": {segment(3) + `{"other":` + strings.Repeat(" ", 17<<20) + `1}`, 3, layer.ErrLimit},
	} {
		t.Run(name, func(t *testing.T) {
			tr, err := zstdchunked.OpenTar(bytes.NewReader(enc.EncodeAll([]byte(c.split), nil)), l, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer tr.Close()
			if n, err := io.Copy(io.Discard, tr); n != c.want || !errors.Is(err, c.err) {
				t.Errorf("%d bytes, %v; want %d, %v", n, err, c.want, c.err)
			}
		})
	}
}

// Headers are anything: what comes of them is bounded, and made of chunks that there are.
func FuzzTar(f *testing.F) {
	in := layertest.Tar(f, layertest.File("a", "content"), layertest.Dir("d"), layertest.File("d/b", strings.Repeat("b", 2000)))
	b, _ := packed(f, in, 300)
	l := open(f, b, bytes.NewReader(b.data)).Layer
	data := layertest.Fill(f, l, bytes.NewReader(b.data))
	// Headers as they are take minutes to minimize.
	f.Add([]byte(`{"type":2,"payload":"AAAA"}{"type":1,"name":"a","size":7,"payload":""}{"type":2,"payload":"AA=="}{"type":1,"name":"d/b","size":2000}`))
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, split []byte) {
		tr, err := zstdchunked.OpenTar(bytes.NewReader(enc.EncodeAll(split, nil)), l, chunksOf(l, data))
		if err != nil {
			t.Fatal(err)
		}
		defer tr.Close()
		if n, _ := io.Copy(io.Discard, tr); n > int64(len(split)+len(in)) {
			t.Errorf("%d bytes of headers of %d and a tar of %d", n, len(split), len(in))
		}
	})
}
