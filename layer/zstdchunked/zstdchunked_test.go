package zstdchunked_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

var (
	dir     = layertest.Dir
	file    = layertest.File
	symlink = layertest.Symlink
	link    = layertest.Link
)

// writers are the ways in which a zstd:chunked layer comes into the world.
var writers = map[string]writer{
	"stargz":                      stargzBuild(),
	"stargz, chunks":              stargzBuild(stargz.WithChunkSize(1000)),
	"stargz, min chunk":           stargzBuild(stargz.WithChunkSize(1000), stargz.WithMinChunkSize(2500)),
	"stargz, lossless":            stargzLossless(0, 0),
	"stargz, lossless, chunks":    stargzLossless(300, 0),
	"stargz, lossless, min chunk": stargzLossless(1000, 2500),
	"podman":                      podman(1 << 30),
	"podman, chunks":              podman(1000),
	"podman, tiny chunks":         podman(100),
}

// layers are contents that somebody might have an opinion on.
var layers = map[string][]layertest.Entry{
	"empty": {},
	"usual": {
		dir("./"), dir("a/").Modified(1700000000), file("a/b", "content"), file("a/empty", ""), file("a/d", strings.Repeat("0123456789", 333)),
		symlink("a/s", "../x"), link("a/l", "a/b"), file("z", strings.Repeat("z", 3000)), file("last", "x"),
	},
	"nodes": {layertest.Char("null", 1, 3), layertest.Block("sda", 8, 0), layertest.Fifo("p"), file("su", "x").Perm(0o4755).Owner(1000, 1<<31)},
	"xattrs": {
		file("ping", "elf").Xattr("security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00").Xattr("user.é", "ü"),
		dir("d/").Xattr("user.a", ""),
	},
	"whiteouts": {file(".wh.gone", ""), dir("d/"), file("d/.wh..wh..opq", ""), file("d/new", "x")},
	"zeros": {
		file("all", strings.Repeat("\x00", 300_000)), file("begin", strings.Repeat("\x00", 5000)+"x"), file("end", "x"+strings.Repeat("\x00", 5000)),
		file("middle", strings.Repeat("a", 3000)+strings.Repeat("\x00", 70_000)+strings.Repeat("b", 3000)), file("one", "\x00"),
	},
}

func TestOracle(t *testing.T) {
	for content, entries := range layers {
		for name, write := range writers {
			t.Run(content+"/"+name, func(t *testing.T) {
				in := layertest.Tar(t, entries...)
				compare(t, write(t, in), in, entries)
			})
		}
	}
}

func TestOracleRandom(t *testing.T) {
	names := slices.Sorted(maps.Keys(writers))
	for seed := range layertest.Seeds(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			entries := layertest.Random(r, r.IntN(80))
			in := layertest.Tar(t, entries...)
			compare(t, writers[names[int(seed)%len(names)]](t, in), in, entries)
		})
	}
}

// compare opens what a writer has made of a tar, and compares it with the same tar as eStargz, whose reader is compared with
// stargz-snapshotter's. It returns the layer and its data space.
func compare(t *testing.T, b blob, in []byte, entries []layertest.Entry) (*zstdchunked.Blob, []byte) {
	t.Helper()
	r := &layertest.Counted{ReaderAt: bytes.NewReader(b.data)}
	got := open(t, b, r)
	if len(r.Reads) != 1 {
		t.Errorf("read %v, want the TOC and nothing else", r.Reads)
	}
	layertest.Check(t, got.Layer)
	want := reference(t, in)
	if tree := layertest.Tree(got.Layer); !slices.Equal(tree, layertest.Tree(want)) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(tree, "\n"), strings.Join(layertest.Tree(want), "\n"))
	}
	data := layertest.Fill(t, got.Layer, bytes.NewReader(b.data))
	for _, e := range entries {
		if e.Size == 0 {
			continue
		}
		content, err := layertest.Content(got.Layer, data, strings.TrimPrefix(e.Name, "./"))
		if err != nil || content != e.Content {
			t.Errorf("%s has %.40q…, want %.40q… (%v)", e.Name, content, e.Content, err)
		}
	}
	again, err := zstdchunked.Parse(got.TOC, got.End, zstdchunked.Options{TOCDigest: got.TOCDigest})
	if err != nil || again.Dialect != got.Dialect || !slices.Equal(layertest.Tree(again.Layer), layertest.Tree(got.Layer)) || !slices.Equal(again.Layer.Frames, got.Layer.Frames) {
		t.Errorf("parsed again it's another layer: %v", err)
	}
	byFooter, err := zstdchunked.Open(bytes.NewReader(b.data), int64(len(b.data)), zstdchunked.Options{TOCDigest: got.TOCDigest})
	if err != nil || byFooter.End != got.End || !bytes.Equal(byFooter.TOC, got.TOC) {
		t.Errorf("by its footer it's another layer: %v", err)
	}
	anonymous, err := zstdchunked.Open(bytes.NewReader(b.data), int64(len(b.data)), zstdchunked.Options{})
	if err != nil || anonymous.TOCDigest != got.TOCDigest || anonymous.Dialect != got.Dialect {
		t.Errorf("without a digest it's another layer: %v", err)
	}
	return got, data
}

// open opens a blob by its annotations.
func open(t testing.TB, b blob, r io.ReaderAt) *zstdchunked.Blob {
	t.Helper()
	dgst, at, err := zstdchunked.Find(b.annotations)
	if err != nil || dgst == "" {
		t.Fatalf("%v: no TOC: %v", b.annotations, err)
	}
	got, err := zstdchunked.Open(r, int64(len(b.data)), zstdchunked.Options{TOCDigest: dgst, Position: at})
	if err != nil {
		t.Fatal(err)
	}
	if got.TOCDigest != dgst {
		t.Errorf("TOC digest %s, want %s", got.TOCDigest, dgst)
	}
	return got
}

func reference(t testing.TB, in []byte) *layer.Layer {
	t.Helper()
	var b bytes.Buffer
	if _, err := estargz.Write(t.Context(), &b, bytes.NewReader(in), estargz.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	l, err := estargz.Open(bytes.NewReader(b.Bytes()), int64(b.Len()), estargz.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l.Layer
}

// Without a position the end is read, and what lacks of the TOC.
func TestReads(t *testing.T) {
	// JSON that zstd makes nothing smaller of.
	r := rand.New(rand.NewPCG(1, 1))
	name := func() string {
		return fmt.Sprintf("%x%x%x%x", r.Uint64(), r.Uint64(), r.Uint64(), r.Uint64())
	}
	var entries []string
	for range 30_000 {
		entries = append(entries, `{"type":"fifo","name":"`+name()+`"}`)
	}
	b := blobOf(t, `{"version":1,"entries":[`+strings.Join(entries, ",")+`]}`)
	dgst, at, err := zstdchunked.Find(b.annotations)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(b.data))
	const tail = 512 << 10
	if at.Size < tail {
		t.Fatalf("a TOC of %d bytes is too small for this test", at.Size)
	}
	c := &layertest.Counted{ReaderAt: bytes.NewReader(b.data)}
	if _, err := zstdchunked.Open(c, size, zstdchunked.Options{TOCDigest: dgst}); err != nil {
		t.Fatal(err)
	}
	want := []string{fmt.Sprintf("%d at %d", tail, size-tail), fmt.Sprintf("%d at %d", size-tail-at.Offset, at.Offset)}
	if !slices.Equal(c.Reads, want) {
		t.Errorf("read %v, want %v", c.Reads, want)
	}
	gone := errors.New("registry is gone")
	for _, at := range []zstdchunked.Position{at, {}} {
		if _, err := zstdchunked.Open(&layertest.Counted{Err: gone}, size, zstdchunked.Options{TOCDigest: dgst, Position: at}); !errors.Is(err, gone) || errors.Is(err, fs.ErrInvalid) {
			t.Error(err)
		}
		// The blob is shorter than its descriptor says.
		short := bytes.NewReader(b.data[:100])
		if _, err := zstdchunked.Open(short, size, zstdchunked.Options{TOCDigest: dgst, Position: at}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
	}
}

func TestDigestMismatch(t *testing.T) {
	other := digest.FromString("other")
	for name, b := range map[string]blob{
		"Podman's":             blobOf(t, `{"version":1,"entries":[]}`),
		"stargz-snapshotter's": stargzOf(t, `{"version":1,"entries":[]}`),
		"invalid":              blobOf(t, `{"version":1,"entries":[{"name":"../x","type":"dir"}],"more":"after that"}`),
	} {
		_, err := zstdchunked.Open(bytes.NewReader(b.data), int64(len(b.data)), zstdchunked.Options{TOCDigest: other})
		if mismatch, ok := errors.AsType[*toc.DigestError](err); !ok || mismatch.Want != other {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What can't be decompressed isn't a wrong TOC but a damaged one.
	b := blobOf(t, `{"version":1,"entries":[]}`)
	dgst, at, err := zstdchunked.Find(b.annotations)
	if err != nil {
		t.Fatal(err)
	}
	b.data[at.Offset] ^= 1
	if _, err := zstdchunked.Open(bytes.NewReader(b.data), int64(len(b.data)), zstdchunked.Options{TOCDigest: dgst, Position: at}); !errors.Is(err, toc.Err) {
		t.Errorf("damaged: %v", err)
	}
}

func TestFooter(t *testing.T) {
	podmans, stargzs := blobOf(t, `{"version":1}`).data, stargzOf(t, `{"version":1}`).data
	change := func(b []byte, fromEnd int, to string) []byte {
		b = slices.Clone(b)
		copy(b[len(b)-fromEnd:], to)
		return b
	}
	const large = "\xff\xff\xff\xff\xff\xff\xff\xff"
	for name, tc := range map[string]struct {
		in   []byte
		want error
	}{
		"empty blob":               {nil, zstdchunked.ErrFooter},
		"magic alone":              {[]byte("GNUlInUx"), zstdchunked.ErrFooter},
		"zeros":                    {make([]byte, 1000), zstdchunked.ErrFooter},
		"no skippable frame":       {change(podmans, 72, "\x51"), zstdchunked.ErrFooter},
		"other frame size":         {change(podmans, 68, "\x3f"), zstdchunked.ErrFooter},
		"other magic":              {change(podmans, 8, "gnulinux"), zstdchunked.ErrFooter},
		"other kind of JSON":       {change(podmans, 40, "\x02"), zstdchunked.ErrFooter},
		"offset overflows":         {change(podmans, 64, large), zstdchunked.ErrFooter},
		"size overflows":           {change(podmans, 56, large), zstdchunked.ErrFooter},
		"offset behind the end":    {change(podmans, 64, "\x00\x00\x00\x01"), toc.Err},
		"offset of nothing":        {change(podmans, 64, "\x00\x00"), toc.Err},
		"size of nothing":          {change(podmans, 56, "\x00\x00"), toc.Err},
		"size up to behind":        {change(podmans, 56, "\x00\x04"), toc.Err},
		"large size":               {change(podmans, 56, "\x00\x00\x00\x10"), layer.ErrLimit},
		"stargz, other frame size": {change(stargzs, 44, "\x3f"), zstdchunked.ErrFooter},
		"stargz, offset":           {change(stargzs, 40, large), zstdchunked.ErrFooter},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := zstdchunked.Open(bytes.NewReader(tc.in), int64(len(tc.in)), zstdchunked.Options{})
			if !errors.Is(err, tc.want) || !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
	if _, err := zstdchunked.Open(bytes.NewReader(nil), -1, zstdchunked.Options{}); err == nil {
		t.Error("a blob of -1 bytes")
	}
}

// A position is what a stranger's manifest says.
func TestPosition(t *testing.T) {
	b := blobOf(t, `{"version":1}`)
	size := int64(len(b.data))
	for _, at := range []zstdchunked.Position{{-1, 10}, {7, 10}, {size, 1}, {1 << 62, 1 << 62}, {1008, size}, {1008, -1}, {1008, 0}, {1008, 1 << 40}} {
		_, err := zstdchunked.Open(bytes.NewReader(b.data), size, zstdchunked.Options{Position: at})
		if !errors.Is(err, toc.Err) {
			t.Errorf("%s: %v", at, err)
		}
	}
}

func TestFind(t *testing.T) {
	const sum, other = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	for name, tc := range map[string]struct {
		in   map[string]string
		dgst digest.Digest
		at   zstdchunked.Position
		fail bool
	}{
		"nothing": {},
		"Podman's": {
			in:   map[string]string{zstdchunked.ChecksumAnnotation: sum, zstdchunked.PositionAnnotation: "8:9:10:1"},
			dgst: sum, at: zstdchunked.Position{Offset: 8, Size: 9},
		},
		"Podman's, without a position": {in: map[string]string{zstdchunked.ChecksumAnnotation: sum}, dgst: sum},
		"stargz-snapshotter's": {
			in:   map[string]string{zstdchunked.StargzTOCAnnotation: sum, zstdchunked.StargzPositionAnnotation: "8:9:10:1"},
			dgst: sum, at: zstdchunked.Position{Offset: 8, Size: 9},
		},
		"a position of nothing": {in: map[string]string{zstdchunked.PositionAnnotation: "8:9:10:1"}},
		"both":                  {in: map[string]string{zstdchunked.ChecksumAnnotation: sum, zstdchunked.StargzTOCAnnotation: other}, fail: true},
		"no digest":             {in: map[string]string{zstdchunked.ChecksumAnnotation: "x"}, fail: true},
		"no digest, stargz":     {in: map[string]string{zstdchunked.StargzTOCAnnotation: ""}, fail: true},
		"no position":           {in: map[string]string{zstdchunked.ChecksumAnnotation: sum, zstdchunked.PositionAnnotation: "8"}, fail: true},
		"no number":             {in: map[string]string{zstdchunked.ChecksumAnnotation: sum, zstdchunked.PositionAnnotation: "8:x"}, fail: true},
	} {
		dgst, at, err := zstdchunked.Find(tc.in)
		if dgst != tc.dgst || at != tc.at || (err != nil) != tc.fail {
			t.Errorf("%s: %s at %s, %v", name, dgst, at, err)
		}
	}
}

func TestInvalid(t *testing.T) {
	const sum = `"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"`
	for name, tc := range map[string]struct {
		in   string
		want error
	}{
		"empty":                 {``, toc.Err},
		"not JSON":              {`<xml>`, toc.Err},
		"another version":       {`{"version":2,"entries":[]}`, toc.Err},
		"upwards":               {`{"entries":[{"type":"reg","name":"../x"}]}`, layer.ErrName},
		"no digest":             {`{"entries":[{"type":"reg","name":"x","size":1,"offset":9}]}`, toc.ErrUnverifiable},
		"another hash":          {`{"entries":[{"type":"reg","name":"x","size":1,"offset":9,"digest":"sha512:00"}]}`, toc.ErrUnverifiable},
		"behind the end":        {`{"entries":[{"type":"reg","name":"x","size":1,"offset":1000,` + sum + `}]}`, layer.ErrContent},
		"bomb":                  {`{"entries":[{"type":"reg","name":"x","size":99999999,"offset":999,` + sum + `}]}`, layer.ErrContent},
		"unknown kind of chunk": {`{"entries":[{"type":"reg","name":"x","size":1,"chunkType":"ones"}]}`, toc.Err},
		"negative zeros":        {`{"entries":[{"type":"reg","name":"x","size":9,"offset":9,"chunkSize":-1,"chunkType":"zeros"}]}`, layer.ErrContent},
		"too many zeros":        {`{"entries":[{"type":"reg","name":"x","size":9,"offset":9,"chunkSize":10,"chunkType":"zeros"}]}`, layer.ErrContent},
		"zeros without end":     {`{"entries":[{"type":"reg","name":"x","size":4398046511104,"offset":9,"chunkSize":4398046511104,"chunkType":"zeros"}]}`, layer.ErrLimit},
	} {
		t.Run(name, func(t *testing.T) {
			for _, b := range []blob{blobOf(t, tc.in), stargzOf(t, tc.in)} {
				_, err := zstdchunked.Open(bytes.NewReader(b.data), int64(len(b.data)), zstdchunked.Options{})
				if !errors.Is(err, tc.want) || !errors.Is(err, fs.ErrInvalid) {
					t.Errorf("got %v, want %v", err, tc.want)
				}
			}
		})
	}
}

// A table of contents that grows beyond all limits when it's decompressed is refused, whoever's it is.
func TestTOCBomb(t *testing.T) {
	var bomb bytes.Buffer
	enc, err := zstd.NewWriter(&bomb)
	if err != nil {
		t.Fatal(err)
	}
	blank := bytes.Repeat([]byte(" "), 1<<20)
	for range toc.MaxSize>>20 + 1 {
		if _, err := enc.Write(blank); err != nil {
			t.Fatal(err)
		}
	}
	if err := enc.Close(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []digest.Digest{digest.FromBytes(bomb.Bytes()), digest.FromString("stargz-snapshotter's")} {
		if _, err := zstdchunked.Parse(bomb.Bytes(), 1000, zstdchunked.Options{TOCDigest: want}); !errors.Is(err, layer.ErrLimit) || !errors.Is(err, toc.Err) {
			t.Errorf("%d bytes: %v", bomb.Len(), err)
		}
	}
}

// A run of zeros is one chunk to Podman, however long it is.
func TestManyZeros(t *testing.T) {
	const size = 76<<20 + 5
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	frames := append(make([]byte, 9), enc.EncodeAll(make([]byte, size), nil)...)
	j := fmt.Sprintf(`{"entries":[{"type":"reg","name":"x","size":%d,"offset":9,"chunkSize":%d,"chunkType":"zeros"}]}`, size, size)
	b := podmanBlob(frames, enc.EncodeAll([]byte(j), nil), len(j))
	got := open(t, b, bytes.NewReader(b.data))
	layertest.Check(t, got.Layer)
	if len(got.Layer.Frames) != 1 || len(got.Layer.Chunks) != 76/16+2+2 { // 12 MiB and 5 bytes are two chunks each
		t.Errorf("%d chunks in %d frames", len(got.Layer.Chunks), len(got.Layer.Frames))
	}
	if data := layertest.Fill(t, got.Layer, bytes.NewReader(b.data)); len(bytes.Trim(data, "\x00")) > 0 {
		t.Error("zeros that aren't")
	}
}

// A landmark is one to stargz-snapshotter; to Podman it's a file.
func TestLandmarks(t *testing.T) {
	const sum = `"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"`
	const j = `{"entries":[{"type":"reg","name":"a","size":1,"offset":9,` + sum + `},{"type":"reg","name":".prefetch.landmark","size":1,"offset":20,` + sum + `}]}`
	podmans, stargzs := blobOf(t, j), stargzOf(t, j)
	if b := open(t, podmans, bytes.NewReader(podmans.data)); b.Dialect != zstdchunked.Podman || b.Prefetch != toc.NoLandmark || len(layertest.Tree(b.Layer)) != 2 {
		t.Errorf("Podman's: %q, prefetch %d", layertest.Tree(b.Layer), b.Prefetch)
	}
	if b := open(t, stargzs, bytes.NewReader(stargzs.data)); b.Dialect != zstdchunked.Stargz || b.Prefetch != 20 || len(layertest.Tree(b.Layer)) != 1 {
		t.Errorf("stargz-snapshotter's: %q, prefetch %d", layertest.Tree(b.Layer), b.Prefetch)
	}
}

func TestCodec(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	frame := enc.EncodeAll([]byte("content"), nil)
	r, err := zstdchunked.Codec{}.Decompress(bytes.NewReader(append(slices.Clone(frame), "garbage"...)))
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 7)
	if _, err := io.ReadFull(r, p); err != nil || string(p) != "content" {
		t.Errorf("%q, %v", p, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := r.Read(p); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	// A decoder that has failed is used again.
	for _, bad := range [][]byte{nil, []byte("garbage"), frame[:len(frame)-3]} {
		r, err := zstdchunked.Codec{}.Decompress(bytes.NewReader(bad))
		if err == nil {
			if n, err := io.ReadFull(r, p); err == nil {
				t.Errorf("%q: %d bytes", bad, n)
			}
			r.Close()
		}
	}
}
