package estargz_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// options are those that layers are cut into frames by.
var options = map[string]estargz.WriteOptions{
	"default":   {},
	"alone":     {MinChunkSize: 1},
	"chunks":    {ChunkSize: 1000, MinChunkSize: 1},
	"shared":    {ChunkSize: 1000, MinChunkSize: 2500},
	"one frame": {ChunkSize: 5000, MinChunkSize: estargz.MaxChunkSize},
	"stored":    {Level: new(0)},
	"huffman":   {Level: new(-2)},
	"best":      {Level: new(9), ChunkSize: 7777},
}

// written is a layer that Write has made.
func written(t testing.TB, tar []byte, opt estargz.WriteOptions) (blob, estargz.Written) {
	t.Helper()
	var b bytes.Buffer
	w, err := estargz.Write(t.Context(), &b, bytes.NewReader(tar), opt)
	if err != nil {
		t.Fatal(err)
	}
	return blob{data: b.Bytes(), tocDigest: w.TOCDigest}, w
}

// wantLossless checks that a blob is what Write says, holds the tar and nothing but the TOC behind it.
func wantLossless(t testing.TB, b blob, w estargz.Written, in []byte) {
	t.Helper()
	if got := digest.FromBytes(b.data); w.Digest != got || w.Size != int64(len(b.data)) {
		t.Errorf("the blob is %s of %d bytes, not %s of %d", got, len(b.data), w.Digest, w.Size)
	}
	out := gunzip(t, b.data)
	if got := digest.FromBytes(out); w.DiffID != got || w.TarSize != int64(len(out)) {
		t.Errorf("the diff ID is %s of %d bytes, not %s of %d", got, len(out), w.DiffID, w.TarSize)
	}
	if !bytes.HasPrefix(out, in) {
		t.Fatal("the blob doesn't begin with the tar")
	}
	tr := tar.NewReader(bytes.NewReader(out[len(in):]))
	h, err := tr.Next()
	if err != nil || h.Name != "stargz.index.json" {
		t.Fatalf("behind the tar: %v, %v", h, err)
	}
	toc, err := io.ReadAll(tr)
	if got := digest.FromBytes(toc); err != nil || got != w.TOCDigest {
		t.Errorf("the TOC has %s, not %s (%v)", got, w.TOCDigest, err)
	}
	if _, err := tr.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("behind the TOC: %v", err)
	}
	r, err := stargz.Unpack(b.reader(), new(stargz.GzipDecompressor))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, in) {
		t.Errorf("stargz-snapshotter unpacks %d bytes of %d (%v)", len(got), len(in), err)
	}
}

func gunzip(t testing.TB, b []byte) []byte {
	t.Helper()
	gz, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(gz)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Every layer, cut in every way, is its tar and nothing but the TOC behind it, has the TOC that stargz-snapshotter writes, and gives the
// same tree and files, verified, through our reader and through both of stargz-snapshotter's.
func TestWrite(t *testing.T) {
	for content, entries := range layers {
		for name, opt := range options {
			t.Run(content+"/"+name, func(t *testing.T) {
				b, w := wantLayer(t, entries, opt)
				if w.Lossy != "" {
					t.Errorf("lossy because of %q", w.Lossy)
				}
				if name != "default" {
					return
				}
				cmd := exec.CommandContext(t.Context(), "tar", "-tz")
				cmd.Stdin = bytes.NewReader(b.data)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("tar -tz: %v\n%s", err, out)
				}
			})
		}
	}
}

func TestWriteRandom(t *testing.T) {
	names := slices.Sorted(maps.Keys(options))
	for seed := range layertest.Seeds(80) {
		name := names[int(seed)%len(names)]
		t.Run(fmt.Sprintf("%d, %s", seed, name), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			wantLayer(t, layertest.Random(r, r.IntN(120)), options[name])
		})
	}
}

// wantLayer writes a layer, and checks all that is promised of it.
func wantLayer(t *testing.T, entries []layertest.Entry, opt estargz.WriteOptions) (blob, estargz.Written) {
	t.Helper()
	in := layertest.Tar(t, entries...)
	b, w := written(t, in, opt)
	wantLossless(t, b, w, in)
	compare(t, b, entries)
	wantVerified(t, b, entries)
	wantUpstreamTOC(t, b, in, opt)
	if len(entries) > 0 { // what is empty has no root there
		if err := mounted(b, entries); err != nil {
			t.Error(err)
		}
	}
	return b, w
}

// wantVerified reads every file as stargz-snapshotter does, and compares digests with the TOC's.
func wantVerified(t *testing.T, b blob, entries []layertest.Entry) {
	t.Helper()
	r, err := stargz.Open(b.reader())
	if err != nil {
		t.Fatal(err)
	}
	if got := r.TOCDigest(); got != b.tocDigest {
		t.Errorf("TOC digest %s, want %s", got, b.tocDigest)
	}
	shared := false
	for _, e := range entries {
		if e.Typeflag != tar.TypeReg {
			continue
		}
		f, err := r.OpenFile(e.Name)
		if err != nil {
			t.Errorf("%q: %v", e.Name, err)
			continue
		}
		sum := digest.FromString(e.Content)
		if top, ok := r.Lookup(e.Name); !ok || top.Digest != sum.String() || top.Size != int64(len(e.Content)) {
			t.Errorf("%q: %+v, want %s of %d bytes", e.Name, top, sum, len(e.Content))
		}
		for off := int64(0); off < int64(len(e.Content)); {
			c, ok := r.ChunkEntryForOffset(e.Name, off)
			if !ok || c.ChunkOffset != off {
				t.Fatalf("%q has no chunk at %d: %+v", e.Name, off, c)
			}
			shared = shared || c.InnerOffset > 0
			p := make([]byte, c.ChunkSize)
			if _, err := f.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
				t.Errorf("%q: chunk at %d: %v", e.Name, off, err)
			}
			if string(p) != e.Content[off:][:len(p)] || digest.FromBytes(p).String() != c.ChunkDigest {
				t.Errorf("%q: chunk at %d has %s, want %s", e.Name, off, digest.FromBytes(p), c.ChunkDigest)
			}
			off += c.ChunkSize
		}
	}
	// VerifyTOC doesn't know frames that are shared, not even of stargz-snapshotter's own writer.
	if !shared {
		if _, err := r.VerifyTOC(b.tocDigest); err != nil {
			t.Error(err)
		}
	}
}

// wantUpstreamTOC compares a TOC with that of stargz-snapshotter's writer, but for where things are in the blob.
func wantUpstreamTOC(t *testing.T, b blob, in []byte, opt estargz.WriteOptions) {
	t.Helper()
	got, want := tocLines(t, b), tocLines(t, lossless(int(opt.ChunkSize), 0)(t, in))
	if !slices.Equal(got, want) {
		t.Errorf("TOC\n%s\nstargz-snapshotter's\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func tocLines(t *testing.T, b blob) (lines []string) {
	t.Helper()
	offset, _, err := stargz.OpenFooter(b.reader())
	if err != nil {
		t.Fatal(err)
	}
	toc, _, err := new(stargz.GzipDecompressor).ParseTOC(bytes.NewReader(b.data[offset:]))
	if err != nil {
		t.Fatal(err)
	}
	if toc.Version != 1 {
		t.Errorf("version %d", toc.Version)
	}
	for _, e := range toc.Entries {
		if (e.Type == "reg" && e.Size > 0 || e.Type == "chunk") != (e.Offset > 0) {
			t.Errorf("%s %q at %d", e.Type, e.Name, e.Offset)
		}
		e.Offset, e.InnerOffset = 0, 0
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, string(line))
	}
	return lines
}

// What a blob is doesn't depend on how many CPUs make it, on how the tar comes, or on what was written before.
func TestWriteIsDeterministic(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	in := layertest.Tar(t, layertest.Random(r, 100)...)
	for name, opt := range options {
		t.Run(name, func(t *testing.T) {
			want, w := written(t, in, opt)
			for _, cpus := range []int{1, 3, 16} {
				opt := opt
				opt.Pool = estargz.NewPool(cpus)
				var b bytes.Buffer
				got, err := estargz.Write(t.Context(), &b, iotest.HalfReader(bytes.NewReader(in)), opt)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(b.Bytes(), want.data) || !reflect.DeepEqual(got, w) {
					t.Errorf("%d CPUs make %+v, not %+v", cpus, got, w)
				}
			}
		})
	}
}

// A frame of several files isn't large, and one of a large file has no other.
func TestWriteFrames(t *testing.T) {
	const least = 64 << 10
	var entries []layertest.Entry
	for i := range 300 {
		size := 1000
		if i%10 == 0 {
			size = 3 * least
		}
		entries = append(entries, file(fmt.Sprintf("f%d", i), noise(i, size)))
	}
	b, _ := written(t, layertest.Tar(t, entries...), estargz.WriteOptions{MinChunkSize: least})
	got, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if frames := len(got.Layer.Frames); frames > 62 {
		t.Errorf("%d frames for 30 large files and 9 small ones in between", frames)
	}
	for i, f := range got.Layer.Frames {
		sum := int64(0)
		for _, c := range got.Layer.Chunks[f.FirstChunk:][:f.NumChunks] {
			sum += c.Size
		}
		if f.NumChunks > 1 && sum > 2*least {
			t.Errorf("frame %d has %d chunks of %d bytes", i, f.NumChunks, sum)
		}
	}
}

func noise(seed, size int) string {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b) // it never fails
	return string(b)
}

// rawTar makes a tar in the format of the header, with whatever is behind.
func rawTar(t *testing.T, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(bytes.Repeat([]byte("x"), int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWriteOddTars(t *testing.T) {
	long := strings.Repeat("long/", 60) + "name"
	for name, c := range map[string]struct {
		tar  []byte
		want []string
	}{
		"GNU's long names": {
			rawTar(t, &tar.Header{Typeflag: tar.TypeReg, Name: long, Mode: 0o644, Size: 3, Format: tar.FormatGNU},
				&tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: long, Format: tar.FormatGNU}),
			[]string{"- 644 " + long + " 3", "l 777 l -> " + long},
		},
		"global header": {
			rawTar(t, &tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": strings.Repeat("c", 2000)}},
				&tar.Header{Typeflag: tar.TypeReg, Name: "a", Mode: 0o644, Size: 1}),
			[]string{"- 644 a 1"},
		},
		"fractions of seconds": {
			rawTar(t, &tar.Header{Typeflag: tar.TypeReg, Name: "a", Mode: 0o644, Size: 1, ModTime: time.Unix(1700000000, 5e8), Format: tar.FormatPAX}),
			[]string{"- 644 a 1 mtime:1700000000.500000000"},
		},
		"years without an end": {
			rawTar(t, &tar.Header{Typeflag: tar.TypeReg, Name: "a", Mode: 0o644, Size: 1, ModTime: time.Unix(1e12, 0), Format: tar.FormatPAX}),
			[]string{"- 644 a 1"},
		},
		"no end mark": {
			rawTar(t, &tar.Header{Typeflag: tar.TypeReg, Name: "a", Mode: 0o644, Size: 512})[:1024],
			[]string{"- 644 a 512"},
		},
		"more behind the end": {
			append(rawTar(t, &tar.Header{Typeflag: tar.TypeReg, Name: "a", Mode: 0o644, Size: 1}), bytes.Repeat([]byte("junk"), 100_000)...),
			[]string{"- 644 a 1"},
		},
		"nothing":     {nil, nil},
		"only zeros":  {make([]byte, 10240), nil},
		"many links":  {rawTar(t, manyLinks(2000)...), nil},
		"a landmark":  {layertest.Tar(t, file("a", "x"), file(".prefetch.landmark", "\x0f"), file("b", "y")), []string{"- 644 a 1", "- 644 b 1"}},
		"no prefetch": {layertest.Tar(t, file("./.no.prefetch.landmark", "\x0f")), nil},
	} {
		t.Run(name, func(t *testing.T) {
			b, w := written(t, c.tar, estargz.WriteOptions{})
			if name == "no end mark" {
				return // whoever unpacks it sees the TOC, as with stargz-snapshotter's
			}
			out := gunzip(t, b.data)
			if !bytes.HasPrefix(out, c.tar) || digest.FromBytes(out) != w.DiffID {
				t.Error("the blob isn't the tar")
			}
			got, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{TOCDigest: w.TOCDigest})
			if err != nil {
				t.Fatal(err)
			}
			layertest.Check(t, got.Layer)
			if tree := layertest.Tree(got.Layer); name != "many links" && !contains(tree, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(tree, "\n"), strings.Join(c.want, "\n"))
			}
			if landmark := strings.Contains(name, "landmark"); landmark != (got.Prefetch > 0) {
				t.Errorf("prefetch up to %d", got.Prefetch)
			}
		})
	}
}

func contains(lines, want []string) bool {
	for _, w := range want {
		if !slices.Contains(lines, strings.Replace(w, "l 777 ", "l ", 1)) {
			return false
		}
	}
	return true
}

func manyLinks(n int) (hs []*tar.Header) {
	for i := range n {
		hs = append(hs, &tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprintf("l%d", i), Linkname: "x", Mode: 0o777})
	}
	return append(hs, &tar.Header{Typeflag: tar.TypeReg, Name: "last", Mode: 0o644, Size: 7})
}
