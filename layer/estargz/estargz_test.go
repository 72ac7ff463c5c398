package estargz_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"strings"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

func TestReads(t *testing.T) {
	const content, guess = 8 << 20, 308 << 10
	random := randomTOC(t, 20_000) // larger than the guess
	small := blobOf(t, 512<<10, `{"version":1,"entries":[]}`)
	some := blobOf(t, 2<<20, `{"version":1,"entries":[]}`)
	large := blobOf(t, content, random)
	size := int64(len(large.data))
	toc := size - content - 51
	if toc < 800<<10 {
		t.Fatalf("the large TOC takes %d bytes", toc)
	}
	ext := external(t, layertest.Tar(t, layers["content"]...))
	for name, tc := range map[string]struct {
		blob blob
		tail int64
		want []string
	}{
		"smaller than the guess": {blob: build()(t, layertest.Tar(t)), want: []string{"%d at 0"}},
		"within the least guess": {blob: small, want: []string{fmt.Sprintf("131072 at %d", len(small.data)-131072)}},
		"within an eighth":       {blob: some, want: []string{fmt.Sprintf("%d at %d", len(some.data)/8, len(some.data)-len(some.data)/8)}},
		"not within the guess":   {blob: large, want: []string{fmt.Sprintf("%d at %d", guess, size-guess), fmt.Sprintf("%d at %d", toc+51-guess, content)}},
		"known size":             {blob: large, tail: toc + 51, want: []string{fmt.Sprintf("%d at %d", toc+51, content)}},
		"known size, but too little": {
			blob: large, tail: 1, want: []string{fmt.Sprintf("51 at %d", size-51), fmt.Sprintf("%d at %d", toc, content)},
		},
		"external TOC": {blob: ext, want: []string{fmt.Sprintf("51 at %d", len(ext.data)-51)}},
	} {
		t.Run(name, func(t *testing.T) {
			r := &layertest.Counted{ReaderAt: tc.blob.reader()}
			if _, err := estargz.Open(r, int64(len(tc.blob.data)), estargz.Options{TOCDigest: tc.blob.tocDigest, Tail: tc.tail, ExternalTOC: tc.blob.toc}); err != nil {
				t.Fatal(err)
			}
			for i, w := range tc.want {
				tc.want[i] = strings.ReplaceAll(w, "%d", fmt.Sprint(len(tc.blob.data)))
			}
			if !slices.Equal(r.Reads, tc.want) {
				t.Errorf("read %v, want %v", r.Reads, tc.want)
			}
		})
	}
}

func TestTailOf(t *testing.T) {
	large := blobOf(t, 1<<20, randomTOC(t, 1000))
	size := int64(len(large.data))
	ext := external(t, layertest.Tar(t, file("a", "x")))
	far := append(make([]byte, 100), stargz.CreateGzipFooter([]byte("SG\x16\x000000000000000000STARGZ"))...)
	for name, c := range map[string]struct {
		last       []byte
		size, want int64
	}{
		"all of a blob":      {large.data, size, size - 1<<20},
		"some of it":         {large.data[size-5000:], size, size - 1<<20},
		"the footer":         {large.data[size-51:], size, size - 1<<20},
		"less":               {large.data[size-50:], size, 0},
		"nothing":            {nil, size, 0},
		"external TOC":       {ext.data[len(ext.data)-60:], int64(len(ext.data)), 46},
		"legacy":             {legacyFooter(t, 40), 100, 60},
		"too large":          {far, 51 + estargz.MaxCompressedTOC + 1, 0},
		"behind the footer":  {large.data[size-51:], 1 << 20, 0},
		"something else":     {make([]byte, 1000), 1000, 0},
		"as large as may be": {far, 51 + estargz.MaxCompressedTOC, 51 + estargz.MaxCompressedTOC},
	} {
		if got := estargz.TailOf(c.last, c.size); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestReadErrors(t *testing.T) {
	b := blobOf(t, 1<<20, `{}`)
	gone := errors.New("registry is gone")
	_, err := estargz.Open(&layertest.Counted{Err: gone}, int64(len(b.data)), estargz.Options{})
	if !errors.Is(err, gone) || errors.Is(err, fs.ErrInvalid) {
		t.Error(err)
	}
	// The blob is shorter than its descriptor says.
	if _, err := estargz.Open(b.reader(), int64(len(b.data))+1, estargz.Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}

func TestDigestMismatch(t *testing.T) {
	other := digest.FromString("other")
	for name, toc := range map[string]string{
		"valid":             `{"version":1,"entries":[]}`,
		"invalid":           `{"version":1,"entries":[{"name":"../x","type":"dir"}],"more":"after that"}`,
		"stargz can't read": `{`,
	} {
		b := blobOf(t, 0, toc)
		_, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{TOCDigest: other})
		mismatch, ok := errors.AsType[*estargz.DigestError](err)
		if !ok || mismatch.Want != other || mismatch.Got != digest.FromString(toc) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExternalTOC(t *testing.T) {
	b := external(t, layertest.Tar(t, file("a", "x")))
	if _, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{TOCDigest: b.tocDigest}); !errors.Is(err, estargz.ErrExternalTOC) {
		t.Errorf("without a TOC: %v", err)
	}
	if _, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{TOCDigest: b.tocDigest, ExternalTOC: []byte{}}); !errors.Is(err, estargz.ErrTOC) {
		t.Errorf("with an empty one: %v", err)
	}
	inside := build()(t, layertest.Tar(t, file("a", "x")))
	opt := estargz.Options{TOCDigest: inside.tocDigest, ExternalTOC: []byte("not needed")}
	if _, err := estargz.Open(inside.reader(), int64(len(inside.data)), opt); err != nil {
		t.Errorf("where none is needed: %v", err)
	}
}

func TestFooter(t *testing.T) {
	good := stargz.CreateGzipFooter([]byte("SG\x16\x000000000000000000STARGZ"))
	change := func(at int, to string) []byte {
		b := slices.Clone(good)
		copy(b[at:], to)
		return b
	}
	for name, footer := range map[string][]byte{
		"empty blob":           {},
		"a byte":               {0x1f},
		"zeros":                make([]byte, 1000),
		"not gzip":             change(0, "\x1e"),
		"other flags":          change(3, "\x0c"),
		"other subfield":       change(12, "XG"),
		"other subfield size":  change(14, "\x15"),
		"other magic":          change(32, "stargz"),
		"other field size":     change(10, "\x1b"),
		"negative offset":      change(16, "-000000000000001"),
		"no offset":            change(16, "0x0g000000000000"),
		"offset overflows":     change(16, "ffffffffffffffff"),
		"offset of the footer": change(16, "00000000000003e8"),
		"offset behind":        change(16, "0000000000100000"),
		"legacy, behind":       legacyFooter(t, 1<<40),
		"legacy, overflows":    legacyFooter(t, math.MaxInt64),
		"zstd:chunked":         append(make([]byte, 32), "GNUlInUx"...),
	} {
		t.Run(name, func(t *testing.T) {
			b := footer
			if len(b) > 40 && len(b) < 100 {
				b = append(make([]byte, 1000), footer...)
			}
			_, err := estargz.Open(bytes.NewReader(b), int64(len(b)), estargz.Options{})
			if !errors.Is(err, estargz.ErrFooter) || !errors.Is(err, fs.ErrInvalid) {
				t.Error(err)
			}
		})
	}
	if _, err := estargz.Open(bytes.NewReader(nil), -1, estargz.Options{}); err == nil {
		t.Error("a blob of -1 bytes")
	}
}

// sum is a digest for those that aren't compared.
var sum = digest.FromString("").String()

func TestInvalid(t *testing.T) {
	reg := func(name string, size, offset int64) stargz.TOCEntry {
		return stargz.TOCEntry{Type: "reg", Name: name, Size: size, Offset: offset, ChunkDigest: sum}
	}
	chunk := func(at, size, offset, inner int64) stargz.TOCEntry {
		return stargz.TOCEntry{Type: "chunk", ChunkOffset: at, ChunkSize: size, Offset: offset, InnerOffset: inner, ChunkDigest: sum}
	}
	first := func(size, chunk, offset int64) stargz.TOCEntry {
		e := reg("f", size, offset)
		e.ChunkSize = chunk
		return e
	}
	hardlink := func(name, target string) stargz.TOCEntry {
		return stargz.TOCEntry{Type: "hardlink", Name: name, LinkName: target}
	}
	entries := func(e ...stargz.TOCEntry) string { return tocOf(t, e...) }
	for name, tc := range map[string]struct {
		toc  string
		want error
	}{
		"empty":                   {``, estargz.ErrTOC},
		"not JSON":                {`<xml>`, estargz.ErrTOC},
		"not an object":           {`[]`, estargz.ErrTOC},
		"cut off":                 {`{"version":1,"entries":[{"na`, estargz.ErrTOC},
		"cut off after an entry":  {`{"entries":[{"name":"a","type":"dir"}`, estargz.ErrTOC},
		"no comma":                {`{"entries":[{"name":"a" "type":"dir"}]}`, estargz.ErrTOC},
		"more after the end":      {`{"entries":[]}{}`, estargz.ErrTOC},
		"another version":         {`{"version":2,"entries":[]}`, estargz.ErrTOC},
		"entries twice":           {`{"entries":[],"entries":[]}`, estargz.ErrTOC},
		"null entry":              {`{"entries":[null]}`, estargz.ErrTOC},
		"fraction":                {`{"entries":[{"name":"a","type":"reg","size":1.5}]}`, estargz.ErrTOC},
		"number overflows":        {`{"entries":[{"name":"a","type":"reg","size":9223372036854775808}]}`, estargz.ErrTOC},
		"unknown type":            {`{"entries":[{"name":"a","type":"sock"}]}`, estargz.ErrTOC},
		"no type":                 {`{"entries":[{"name":"a"}]}`, layer.ErrAttr},
		"no time":                 {`{"entries":[{"name":"a","type":"dir","modtime":"yesterday"}]}`, estargz.ErrTOC},
		"xattr not base64":        {`{"entries":[{"name":"a","type":"dir","xattrs":{"user.a":"?"}}]}`, estargz.ErrTOC},
		"nested deeply":           {`{"x":` + strings.Repeat(`[`, 100_000) + strings.Repeat(`]`, 100_000) + `}`, estargz.ErrTOC},
		"large entry":             {`{"entries":[{"name":"` + strings.Repeat("a", 5<<20) + `"}]}`, layer.ErrLimit},
		"upwards":                 {entries(reg("../../etc/passwd", 0, 0)), layer.ErrName},
		"chunk first":             {entries(chunk(0, 1, 1, 0)), estargz.ErrTOC},
		"chunk of a directory":    {entries(stargz.TOCEntry{Type: "dir", Name: "d"}, chunk(0, 1, 1, 0)), estargz.ErrTOC},
		"chunk of an empty file":  {entries(reg("f", 0, 0), chunk(0, 1, 1, 0)), layer.ErrContent},
		"negative uid":            {entries(stargz.TOCEntry{Type: "dir", Name: "d", UID: -1}), layer.ErrAttr},
		"uid overflows":           {entries(stargz.TOCEntry{Type: "dir", Name: "d", UID: 1 << 32}), layer.ErrAttr},
		"uid of nobody":           {entries(stargz.TOCEntry{Type: "dir", Name: "d", UID: 1<<32 - 1}), layer.ErrAttr},
		"gid of nobody":           {entries(stargz.TOCEntry{Type: "dir", Name: "d", GID: 1<<32 - 1}), layer.ErrAttr},
		"device overflows":        {entries(stargz.TOCEntry{Type: "char", Name: "d", DevMinor: 1 << 33}), layer.ErrAttr},
		"negative size":           {entries(reg("f", -1, 1)), layer.ErrAttr},
		"size overflows":          {entries(reg("f", math.MaxInt64, 1)), layer.ErrLimit},
		"chunk size overflows":    {entries(first(100, math.MaxInt64, 1)), layer.ErrContent},
		"chunk overflows":         {entries(first(100, 50, 1), chunk(50, math.MaxInt64, 10, 0)), layer.ErrContent},
		"chunk at minus":          {entries(first(100, 50, 1), chunk(math.MinInt64, 0, 10, 0)), layer.ErrContent},
		"chunks overlap":          {entries(first(100, 50, 1), chunk(49, 51, 10, 0)), layer.ErrContent},
		"chunks leave a gap":      {entries(first(100, 50, 1), chunk(51, 49, 10, 0)), layer.ErrContent},
		"chunks missing":          {entries(first(100, 50, 1), reg("g", 1, 10)), layer.ErrContent},
		"negative offset":         {entries(reg("f", 1, -1)), layer.ErrContent},
		"offset behind the end":   {entries(reg("f", 1, 1<<50)), layer.ErrContent},
		"frames out of order":     {entries(reg("f", 1, 10), reg("g", 1, 9)), layer.ErrContent},
		"frames overlap":          {entries(reg("f", 9, 10), reg("g", 9, 10)), layer.ErrContent},
		"inner offset overflows":  {entries(first(100, 50, 1), chunk(50, 50, 1, math.MaxInt64)), layer.ErrContent},
		"bomb":                    {entries(reg("f", 100<<20, 10)), layer.ErrContent},
		"hardlinks in a circle":   {entries(hardlink("a", "b"), hardlink("b", "a")), layer.ErrLink},
		"hardlink to nothing":     {entries(hardlink("a", "b")), layer.ErrLink},
		"a million entries":       {`{"entries":[` + strings.Repeat(`{"name":"a","type":"fifo"},`, 1_000_000) + `{}]}`, layer.ErrLimit},
		"name of Latin-1":         {`{"entries":[{"name":"caf` + "\xe9" + `","type":"dir"}]}`, estargz.ErrLossy},
		"name that was Latin-1":   {entries(stargz.TOCEntry{Type: "dir", Name: "caf\xe9"}), estargz.ErrLossy},
		"xattr that was Latin-1":  {entries(stargz.TOCEntry{Type: "dir", Name: "d", Xattrs: map[string][]byte{"user.\xe9": nil}}), estargz.ErrLossy},
		"target that was Latin-1": {entries(stargz.TOCEntry{Type: "symlink", Name: "s", LinkName: "caf\xe9"}), estargz.ErrLossy},
	} {
		t.Run(name, func(t *testing.T) {
			b := blobOf(t, 1000, tc.toc)
			_, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{TOCDigest: b.tocDigest})
			if !errors.Is(err, tc.want) || !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestUnverifiable(t *testing.T) {
	reg := stargz.TOCEntry{Type: "reg", Name: "d/f", Size: 10, Offset: 1}
	chunk := stargz.TOCEntry{Type: "chunk", ChunkOffset: 5, Offset: 20}
	with := func(e stargz.TOCEntry, size int64, digest, chunkDigest string) stargz.TOCEntry {
		e.ChunkSize, e.Digest, e.ChunkDigest = size, digest, chunkDigest
		return e
	}
	sha512 := "sha512:" + strings.Repeat("0", 128)
	for name, tc := range map[string]struct {
		in []stargz.TOCEntry
		ok bool
	}{
		"chunk digest":                 {[]stargz.TOCEntry{with(reg, 0, "", sum)}, true},
		"digest of one chunk":          {[]stargz.TOCEntry{with(reg, 0, sum, "")}, true},
		"digest of one chunk, its own": {[]stargz.TOCEntry{with(reg, 10, sum, "")}, true},
		"two chunks":                   {[]stargz.TOCEntry{with(reg, 5, sum, sum), with(chunk, 0, "", sum)}, true},
		"empty file":                   {[]stargz.TOCEntry{{Type: "reg", Name: "e"}}, true},
		"landmark":                     {[]stargz.TOCEntry{{Type: "reg", Name: ".prefetch.landmark", Size: 1, Offset: 1}}, true},
		"none":                         {[]stargz.TOCEntry{with(reg, 0, "", "")}, false},
		"digest of two chunks":         {[]stargz.TOCEntry{with(reg, 5, sum, ""), with(chunk, 0, "", sum)}, false},
		"second chunk":                 {[]stargz.TOCEntry{with(reg, 5, sum, sum), with(chunk, 0, "", "")}, false},
		"sha512":                       {[]stargz.TOCEntry{with(reg, 0, "", sha512)}, false},
		"not hexadecimal":              {[]stargz.TOCEntry{with(reg, 0, "", "sha256:"+strings.Repeat("x", 64))}, false},
		"too short":                    {[]stargz.TOCEntry{with(reg, 0, "", "sha256:12")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := blobOf(t, 1000, tocOf(t, tc.in...))
			_, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{})
			if tc.ok {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if bad, ok := errors.AsType[*layer.EntryError](err); !ok || bad.Name != "d/f" || !errors.Is(err, estargz.ErrUnverifiable) {
				t.Error(err)
			}
		})
	}
}

// A TOC may say more than we understand, and say it in its own way.
func TestTolerant(t *testing.T) {
	toc := " {\n\"more\": {\"a\": [1, -2.5e9, true, false, null, \"}\\\"\", {}, []]}, \"entries\": [\n" +
		`{"name": "\u0064\/\ud83d\ude00\\\"\b\f\n\r\t", "type": "dir", "mode": 493, "userName": "root", "NumLink": 7, "new": {"x": [[]]}} ,` +
		`{"type": "reg", "name": "f", "size": null, "digest": null, "xattrs": {"user.a": null, "user.b": "YQ=="}, "modtime": "2023-11-14T23:13:20+01:00"}` +
		"],\t\"version\": 1 }\r\n"
	b := blobOf(t, 0, toc)
	got, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{TOCDigest: b.tocDigest})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"d 755 d/ implied", "d 755 d/😀\\\"\b\f\n\r\t/", "- 0 f 0 mtime:1700000000 user.a= user.b=a"}
	if tree := layertest.Tree(got.Layer); !slices.Equal(tree, want) {
		t.Errorf("got %q, want %q", tree, want)
	}
	var stock stargz.JTOC
	if err := json.Unmarshal([]byte(toc), &stock); err != nil {
		t.Errorf("encoding/json doesn't take it: %v", err)
	}
}

// A name that a layer's maker has put in the way of the TOC's isn't shown, as in stargz.
func TestHidden(t *testing.T) {
	b := blobOf(t, 1000, tocOf(t,
		stargz.TOCEntry{Type: "reg", Name: "./stargz.index.json", Size: 10, Offset: 10},
		stargz.TOCEntry{Type: "reg", Name: "a", Size: 10, Offset: 20, ChunkDigest: sum},
		stargz.TOCEntry{Type: "reg", Name: "/.prefetch.landmark", Size: 10, Offset: 30},
		stargz.TOCEntry{Type: "chunk", ChunkOffset: 5, Offset: 40},
		stargz.TOCEntry{Type: "reg", Name: "b", Size: 10, Offset: 40, InnerOffset: 600, ChunkDigest: sum},
	))
	got, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if tree := layertest.Tree(got.Layer); !slices.Equal(tree, []string{"- 0 a 10", "- 0 b 10"}) {
		t.Errorf("tree %q", tree)
	}
	want := []layer.Frame{{Offset: 20, Size: 10, NumChunks: 1}, {Offset: 40, Size: 960, FirstChunk: 1, NumChunks: 1}}
	if !slices.Equal(got.Layer.Frames, want) || got.Prefetch != 30 {
		t.Errorf("frames %+v, landmark at %d", got.Layer.Frames, got.Prefetch)
	}
}

// Tables of contents that are larger than any layer's are refused before they're fetched, or decompressed.
func TestLargeTOC(t *testing.T) {
	const size = 1 << 40
	footer := stargz.CreateGzipFooter([]byte("SG\x16\x000000000000000000STARGZ")) // all of the blob is a table of contents
	blob := &layertest.Counted{ReaderAt: readerAtFunc(func(p []byte, off int64) (int, error) {
		clear(p)
		if behind := size - off; behind <= int64(len(p)) {
			copy(p[behind-int64(len(footer)):], footer)
		}
		return len(p), nil
	})}
	_, err := estargz.Open(blob, size, estargz.Options{})
	if !errors.Is(err, estargz.ErrTOC) || !errors.Is(err, layer.ErrLimit) || !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("compressed: %v", err)
	}
	if len(blob.Reads) != 1 {
		t.Errorf("read %v", blob.Reads)
	}

	var packed bytes.Buffer
	gz := gzip.NewWriter(&packed)
	if err := tar.NewWriter(gz).WriteHeader(&tar.Header{Name: "stargz.index.json", Typeflag: tar.TypeReg, Size: toc.MaxSize + 1}); err != nil {
		t.Fatal(err)
	}
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := estargz.Parse(packed.Bytes(), 1000, estargz.Options{}); !errors.Is(err, estargz.ErrTOC) || !errors.Is(err, layer.ErrLimit) {
		t.Errorf("decompressed: %v", err)
	}
}

type readerAtFunc func(p []byte, off int64) (int, error)

func (f readerAtFunc) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }
