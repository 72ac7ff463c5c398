package estargz_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

var (
	dir     = layertest.Dir
	file    = layertest.File
	symlink = layertest.Symlink
	link    = layertest.Link
	char    = layertest.Char
	block   = layertest.Block
	fifo    = layertest.Fifo
)

// A blob is what stargz-snapshotter's writer has made.
type blob struct {
	data      []byte
	toc       []byte // when it stands elsewhere
	tocDigest digest.Digest
}

func (b blob) reader() *io.SectionReader {
	return io.NewSectionReader(bytes.NewReader(b.data), 0, int64(len(b.data)))
}

// A writer makes a blob of a tar.
type writer func(t testing.TB, tar []byte) blob

// build is what stargz-snapshotter's and nerdctl's converters use.
func build(opts ...stargz.Option) writer {
	return func(t testing.TB, tar []byte) blob {
		t.Helper()
		b, err := stargz.Build(io.NewSectionReader(bytes.NewReader(tar), 0, int64(len(tar))), opts...)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		return blob{data: data, tocDigest: b.TOCDigest()}
	}
}

// lossless is what BuildKit uses.
func lossless(chunk, minChunk int) writer {
	return func(t testing.TB, tar []byte) blob {
		t.Helper()
		var b bytes.Buffer
		return blob{tocDigest: write(t, stargz.NewWriter(&b), tar, chunk, minChunk), data: b.Bytes()}
	}
}

func write(t testing.TB, w *stargz.Writer, tar []byte, chunk, minChunk int) digest.Digest {
	t.Helper()
	w.ChunkSize, w.MinChunkSize = chunk, minChunk
	if err := w.AppendTarLossLess(bytes.NewReader(tar)); err != nil {
		t.Fatal(err)
	}
	d, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// external puts the TOC elsewhere.
func external(t testing.TB, tar []byte) blob {
	t.Helper()
	var data, toc bytes.Buffer
	c := externaltoc.NewGzipCompressor()
	d := write(t, stargz.NewWriterWithCompressor(&data, c), tar, 1000, 0)
	if _, err := c.WriteTOCTo(&toc); err != nil {
		t.Fatal(err)
	}
	return blob{data: data.Bytes(), toc: toc.Bytes(), tocDigest: d}
}

// legacy has stargz's footer. Its writer isn't kept any more.
func legacy(t testing.TB, tar []byte) blob {
	t.Helper()
	b := build(stargz.WithChunkSize(1000))(t, tar)
	offset, size, err := stargz.OpenFooter(b.reader())
	if err != nil {
		t.Fatal(err)
	}
	b.data = append(b.data[:len(b.data)-int(size)], legacyFooter(t, offset)...)
	return b
}

func legacyFooter(t testing.TB, offset int64) []byte {
	t.Helper()
	var b bytes.Buffer
	gz, err := gzip.NewWriterLevel(&b, gzip.NoCompression)
	if err != nil {
		t.Fatal(err)
	}
	gz.Extra = fmt.Appendf(nil, "%016xSTARGZ", offset)
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// blobOf is a blob with a made-up TOC, behind so many bytes of content.
func blobOf(t testing.TB, content int, toc string) blob {
	t.Helper()
	return blob{
		data:      append(make([]byte, content), tocAndFooter(t, int64(content), []byte(toc))...),
		tocDigest: digest.FromString(toc),
	}
}

func tocAndFooter(t testing.TB, offset int64, toc []byte) []byte {
	t.Helper()
	b := packTOC(t, toc)
	extra := append([]byte("SG\x16\x00"), fmt.Sprintf("%016xSTARGZ", offset)...)
	return append(b, stargz.CreateGzipFooter(extra)...)
}

func packTOC(t testing.TB, toc []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	gz := gzip.NewWriter(&b)
	if _, err := gz.Write(layertest.Tar(t, file("stargz.index.json", string(toc)))); err != nil {
		t.Fatal(err)
	}
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tocOf is a TOC as stargz-snapshotter would write it.
func tocOf(t testing.TB, entries ...stargz.TOCEntry) string {
	t.Helper()
	toc := stargz.JTOC{Version: 1}
	for i := range entries {
		toc.Entries = append(toc.Entries, &entries[i])
	}
	b, err := json.MarshalIndent(toc, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func externalDecompressor(toc []byte) stargz.Decompressor {
	return externaltoc.NewGzipDecompressor(func() ([]byte, error) { return toc, nil })
}
