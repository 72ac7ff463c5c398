package zstdchunked_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	splittar "github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

func TestWrite(t *testing.T) {
	for content, entries := range layers {
		for _, chunk := range []int64{0, 1000, 300} {
			t.Run(fmt.Sprint(content, chunk), func(t *testing.T) { wantLayer(t, entries, chunk) })
		}
	}
}

func TestWriteRandom(t *testing.T) {
	for seed := range layertest.Seeds(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			wantLayer(t, layertest.Random(r, r.IntN(80)), []int64{0, 1000, 300}[seed%3])
		})
	}
}

// wantLayer writes a layer, compares it, decompresses it, and makes the tar of it once more as Podman does: of the files that the TOC says,
// and of the headers.
func wantLayer(t *testing.T, entries []layertest.Entry, chunk int64) {
	t.Helper()
	in := layertest.Tar(t, entries...)
	var out bytes.Buffer
	w, err := zstdchunked.Write(t.Context(), &out, bytes.NewReader(in), zstdchunked.WriteOptions{ChunkSize: chunk})
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := decompress(out.Bytes()); err != nil || !bytes.Equal(plain, in) {
		t.Errorf("decompresses to %d bytes, of %d (%v)", len(plain), len(in), err)
	}
	if w.Digest != digest.FromBytes(out.Bytes()) || w.Size != int64(out.Len()) || w.DiffID != digest.FromBytes(in) || w.TarSize != int64(len(in)) {
		t.Errorf("%+v", w)
	}
	var at, size, raw int64
	if _, err := fmt.Sscanf(w.Annotations[zstdchunked.TarSplitAnnotation], "%d:%d:%d", &at, &size, &raw); err != nil {
		t.Fatal(err)
	}
	split, err := decompress(out.Bytes()[at:][:size])
	if err != nil || int64(len(split)) != raw {
		t.Fatalf("tar-split of %d bytes, want %d: %v", len(split), raw, err)
	}
	b, data := compare(t, blob{out.Bytes(), w.Annotations}, in, entries)
	var again bytes.Buffer
	if err := asm.WriteOutputTarStream(files{b.Layer, data}, storage.NewJSONUnpacker(bytes.NewReader(split)), &again); err != nil || !bytes.Equal(again.Bytes(), in) {
		t.Errorf("made again it has %d bytes, want %d: %v", again.Len(), len(in), err)
	}
	var names []string
	if err := asm.IterateHeaders(storage.NewJSONUnpacker(bytes.NewReader(split)), func(h *splittar.Header) error {
		names = append(names, h.Name)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var want []string
	for tr := tar.NewReader(bytes.NewReader(in)); ; {
		h, err := tr.Next()
		if err != nil {
			break
		}
		want = append(want, h.Name)
	}
	if !slices.Equal(names, want) {
		t.Errorf("headers of %q, want %q", names, want)
	}
}

// Podman reads of each chunk from its offset to its end, and decompresses that by itself: whatever was compressed in one go with it.
func TestFrames(t *testing.T) {
	content := map[string]string{"d/a": "a", "d/b": strings.Repeat("b", 3000), "d/c": strings.Repeat("large", 50_000), "e": strings.Repeat("e", 200), "f": "f"}
	entries := []layertest.Entry{dir("d/"), dir("d/d/")}
	for _, name := range slices.Sorted(maps.Keys(content)) {
		entries = append(entries, file(name, content[name]), file(name+".empty", ""))
	}
	var out bytes.Buffer
	w, err := zstdchunked.Write(t.Context(), &out, bytes.NewReader(layertest.Tar(t, entries...)), zstdchunked.WriteOptions{ChunkSize: 100_000})
	if err != nil {
		t.Fatal(err)
	}
	_, at, err := zstdchunked.Find(w.Annotations)
	if err != nil {
		t.Fatal(err)
	}
	blob := out.Bytes()
	packed, err := decompress(blob[at.Offset:][:at.Size])
	if err != nil {
		t.Fatal(err)
	}
	var toc struct{ Entries []tocEntry }
	if err := json.Unmarshal(packed, &toc); err != nil {
		t.Fatal(err)
	}
	var end int64
	chunks := 0
	for _, e := range toc.Entries {
		if e.Offset == 0 {
			continue
		}
		chunks++
		if e.Offset < end || e.EndOffset <= e.Offset {
			t.Errorf("%s is at %d to %d, behind %d", e.Name, e.Offset, e.EndOffset, end)
			continue
		}
		if gap, err := decompress(blob[end:e.Offset]); err != nil || end > 0 && len(gap) > 0 {
			t.Errorf("between the frames of %s and what is before are %d bytes of the tar (%v)", e.Name, len(gap), err)
		}
		end = e.EndOffset
		plain, err := decompress(blob[e.Offset:e.EndOffset])
		want := content[e.Name][e.ChunkOffset:]
		if e.ChunkSize > 0 {
			want = want[:e.ChunkSize]
		}
		if err != nil || !strings.HasPrefix(string(plain), want) {
			t.Errorf("%s at %d: decompresses to %.20q…, want %.20q… (%v)", e.Name, e.ChunkOffset, plain, want, err)
		}
	}
	if chunks != len(content)+2 {
		t.Errorf("%d chunks, want those of %d files, of which one has three", chunks, len(content))
	}
}

// files are those of a layer.
type files struct {
	layer *layer.Layer
	data  []byte
}

func (f files) Get(name string) (io.ReadCloser, error) {
	s, err := layertest.Content(f.layer, f.data, strings.TrimPrefix(path.Clean("/"+name), "/"))
	return io.NopCloser(strings.NewReader(s)), err
}

// A layer depends on the tar and the options alone.
func TestDeterministic(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	in := layertest.Tar(t, layertest.Random(r, 400)...)
	var want []byte
	for _, cpus := range []int{1, 2, 7, 1} {
		pool := frames.NewPool(cpus)
		for range 2 {
			var out bytes.Buffer
			if _, err := zstdchunked.Write(t.Context(), &out, bytes.NewReader(in), zstdchunked.WriteOptions{Pool: pool, ChunkSize: 5000, NoDiffID: true}); err != nil {
				t.Fatal(err)
			}
			if want == nil {
				want = bytes.Clone(out.Bytes())
			}
			if !bytes.Equal(out.Bytes(), want) {
				t.Errorf("with %d CPUs it's another layer", cpus)
			}
		}
	}
}

// What Podman would refuse, as the TOC can't say it, is a layer without a TOC.
func TestLossy(t *testing.T) {
	twice := layertest.Tar(t, file("a", "x"), file("b", "y"), file("./a", "z"))
	var global bytes.Buffer
	tw := tar.NewWriter(&global)
	for _, h := range []*tar.Header{{Typeflag: tar.TypeXGlobalHeader, Name: "globals", PAXRecords: map[string]string{"a": "b"}}, {Typeflag: tar.TypeDir, Name: "d/"}} {
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	late := file("late", "x")
	late.ModTime = time.Date(12345, 1, 1, 0, 0, 0, 0, time.UTC)
	type lossy struct {
		in   []byte
		want string
	}
	layers := map[string]lossy{
		"not UTF-8": {layertest.Tar(t, file("a", "x"), file("caf\xe9", "y")), "caf\xe9"},
		"twice":     {twice, "./a"},
		"global":    {global.Bytes(), "globals"},
		"late":      {layertest.Tar(t, late), "late"},
		"type":      {layertest.Tar(t, file("a", "x"), layertest.Entry{Header: tar.Header{Typeflag: 'Q', Name: "odd"}}), "odd"},
	}
	for name, in := range layertest.Sparse(t) {
		layers["sparse "+name] = lossy{in, "hole"}
	}
	for name, tc := range layers {
		var out bytes.Buffer
		w, err := zstdchunked.Write(t.Context(), &out, bytes.NewReader(tc.in), zstdchunked.WriteOptions{})
		if err != nil || w.Lossy != tc.want || w.Annotations != nil {
			t.Errorf("%s: lossy %q, annotations %v, %v", name, w.Lossy, w.Annotations, err)
		}
		if plain, err := decompress(out.Bytes()); err != nil || !bytes.Equal(plain, tc.in) {
			t.Errorf("%s: decompresses to %d bytes, of %d (%v)", name, len(plain), len(tc.in), err)
		}
		if _, err := zstdchunked.Open(bytes.NewReader(out.Bytes()), int64(out.Len()), zstdchunked.Options{}); !errors.Is(err, zstdchunked.ErrFooter) {
			t.Errorf("%s: opened as a layer: %v", name, err)
		}
	}
}

func TestWriteFails(t *testing.T) {
	in := layertest.Tar(t, file("a", strings.Repeat("a", 10_000)), file("b", strings.Repeat("b", 10_000)))
	full := errors.New("disk is full")
	gone, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("nobody wants it"))
	for name, tc := range map[string]struct {
		ctx  context.Context
		w    io.Writer
		in   []byte
		opt  zstdchunked.WriteOptions
		want error
	}{
		"early end":  {t.Context(), io.Discard, in[:15_000], zstdchunked.WriteOptions{}, io.ErrUnexpectedEOF},
		"full disk":  {t.Context(), failing{full}, in, zstdchunked.WriteOptions{}, full},
		"cancelled":  {gone, io.Discard, in, zstdchunked.WriteOptions{}, context.Cause(gone)},
		"level":      {t.Context(), io.Discard, in, zstdchunked.WriteOptions{Level: new(23)}, nil},
		"chunk size": {t.Context(), io.Discard, in, zstdchunked.WriteOptions{ChunkSize: 1 << 40}, nil},
	} {
		_, err := zstdchunked.Write(tc.ctx, tc.w, bytes.NewReader(tc.in), tc.opt)
		if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// A tar is anything: it's refused, or becomes a layer that holds it.
func FuzzWrite(f *testing.F) {
	for _, name := range slices.Sorted(maps.Keys(layers)) {
		if in := layertest.Tar(f, layers[name]...); len(in) <= 4096 { // what is larger takes minutes to minimize
			f.Add(in, uint16(1000))
		}
	}
	pool := frames.NewPool(1)
	f.Fuzz(func(t *testing.T, in []byte, chunk uint16) {
		var out bytes.Buffer
		w, err := zstdchunked.Write(t.Context(), &out, bytes.NewReader(in), zstdchunked.WriteOptions{ChunkSize: int64(chunk) + 200, Level: new(1), Pool: pool})
		if err != nil {
			return
		}
		if plain, err := decompress(out.Bytes()); err != nil || !bytes.Equal(plain, in) || digest.FromBytes(in) != w.DiffID {
			t.Errorf("decompresses to %d bytes, of %d (%v)", len(plain), len(in), err)
		}
		if w.Annotations == nil {
			return
		}
		dgst, at, err := zstdchunked.Find(w.Annotations)
		if err != nil {
			t.Fatal(err)
		}
		b, err := zstdchunked.Open(bytes.NewReader(out.Bytes()), int64(out.Len()), zstdchunked.Options{TOCDigest: dgst, Position: at})
		if err != nil {
			return // names that no layer can have
		}
		layertest.Check(t, b.Layer)
		layertest.Fill(t, b.Layer, bytes.NewReader(out.Bytes()))
	})
}

// Any tree of files goes through: it is what it is as eStargz, and the tar can be made of its files again, as Podman does.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint64(1), uint8(40), uint16(1000))
	f.Add(uint64(2), uint8(3), uint16(0))
	f.Add(uint64(3), uint8(120), uint16(9000))
	f.Fuzz(func(t *testing.T, seed uint64, n uint8, chunk uint16) {
		wantLayer(t, layertest.Random(rand.New(rand.NewPCG(seed, 4)), int(n)), int64(chunk)+100)
	})
}

// BenchmarkWrite writes text and programs, as it were.
func BenchmarkWrite(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	in := layertest.Tar(b, layertest.Random(r, 3000)...)
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		if _, err := zstdchunked.Write(b.Context(), io.Discard, bytes.NewReader(in), zstdchunked.WriteOptions{NoDiffID: true}); err != nil {
			b.Fatal(err)
		}
	}
}
