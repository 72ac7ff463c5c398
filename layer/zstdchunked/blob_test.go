package zstdchunked_test

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	stargzchunked "github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// A blob is a layer and the annotations of its descriptor.
type blob struct {
	data        []byte
	annotations map[string]string
}

// A writer makes a blob of a tar.
type writer func(t testing.TB, tar []byte) blob

// stargzBuild is what ctr-remote and nerdctl use.
func stargzBuild(opts ...stargz.Option) writer {
	return func(t testing.TB, tar []byte) blob {
		t.Helper()
		annotations := map[string]string{}
		c := struct {
			*stargzchunked.Compressor
			*stargzchunked.Decompressor
		}{&stargzchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: annotations}, &stargzchunked.Decompressor{}}
		b, err := stargz.Build(io.NewSectionReader(bytes.NewReader(tar), 0, int64(len(tar))), append(opts, stargz.WithCompression(c))...)
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
		annotations[zstdchunked.StargzTOCAnnotation] = b.TOCDigest().String()
		return blob{data, annotations}
	}
}

// stargzLossless is what BuildKit would use.
func stargzLossless(chunk, minChunk int) writer {
	return func(t testing.TB, tar []byte) blob {
		t.Helper()
		var b bytes.Buffer
		annotations := map[string]string{}
		w := stargz.NewWriterWithCompressor(&b, &stargzchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: annotations})
		w.ChunkSize, w.MinChunkSize = chunk, minChunk
		if err := w.AppendTarLossLess(bytes.NewReader(tar)); err != nil {
			t.Fatal(err)
		}
		d, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		annotations[zstdchunked.StargzTOCAnnotation] = d.String()
		return blob{b.Bytes(), annotations}
	}
}

// tocEntry is one as Podman's writer has it.
type tocEntry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	Linkname    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	Size        int64             `json:"size,omitempty"`
	UID         int               `json:"uid,omitempty"`
	GID         int               `json:"gid,omitempty"`
	ModTime     *time.Time        `json:"modtime,omitempty"`
	AccessTime  *time.Time        `json:"accesstime,omitempty"`
	Devmajor    int64             `json:"devMajor,omitempty"`
	Devminor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string]string `json:"xattrs,omitempty"`
	Digest      string            `json:"digest,omitempty"`
	Offset      int64             `json:"offset,omitempty"`
	EndOffset   int64             `json:"endOffset,omitempty"`
	ChunkSize   int64             `json:"chunkSize,omitempty"`
	ChunkOffset int64             `json:"chunkOffset,omitempty"`
	ChunkDigest string            `json:"chunkDigest,omitempty"`
	ChunkType   string            `json:"chunkType,omitempty"`
}

var podmanTypes = map[byte]string{
	tar.TypeReg: "reg", tar.TypeLink: "hardlink", tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeDir: "dir", tar.TypeFifo: "fifo",
	tar.TypeSymlink: "symlink",
}

// podman is how Podman's storage library lays out a layer, but for where it cuts files: here, after so many bytes, and before and
// behind runs of zeros that are as long. The library itself is asked in integration.
func podman(chunk int) writer {
	return func(t testing.TB, in []byte) blob {
		t.Helper()
		enc, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		frame := func(p []byte) (at int64) {
			at = int64(out.Len())
			out.Write(enc.EncodeAll(p, nil))
			return at
		}
		src := bytes.NewReader(in)
		tr := tar.NewReader(src)
		var entries []tocEntry
		done := 0
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			e := tocEntry{
				Type: podmanTypes[h.Typeflag], Name: h.Name, Linkname: h.Linkname, Mode: h.Mode, Size: h.Size, UID: h.Uid, GID: h.Gid,
				ModTime: &h.ModTime, AccessTime: &time.Time{}, Devmajor: h.Devmajor, Devminor: h.Devminor, Xattrs: map[string]string{},
			}
			for k, v := range h.PAXRecords {
				if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
					e.Xattrs[name] = base64.StdEncoding.EncodeToString([]byte(v))
				}
			}
			payload, err := io.ReadAll(tr)
			if err != nil {
				t.Fatal(err)
			}
			if len(payload) == 0 {
				entries = append(entries, e)
				continue
			}
			begin := len(in) - src.Len() - len(payload)
			frame(in[done:begin])
			done = begin + len(payload)
			e.Digest = digest.FromBytes(payload).String()
			pieces := cut(payload, chunk)
			at := int64(0)
			for i, p := range pieces {
				if i > 0 {
					e = tocEntry{Type: "chunk", Name: h.Name, ChunkOffset: at}
				}
				e.Offset = frame(p)
				if len(pieces) > 1 {
					e.ChunkSize, e.ChunkDigest = int64(len(p)), digest.FromBytes(p).String()
					if len(bytes.Trim(p, "\x00")) == 0 {
						e.ChunkType = "zeros"
					}
				}
				at += int64(len(p))
				entries = append(entries, e)
			}
		}
		frame(in[done:])
		j, err := json.Marshal(map[string]any{"version": 1, "entries": entries, "tarSplitDigest": digest.FromString("").String()})
		if err != nil {
			t.Fatal(err)
		}
		return podmanBlob(out.Bytes(), enc.EncodeAll(j, nil), len(j))
	}
}

// cut cuts a file into pieces of so many bytes, or of zeros.
func cut(p []byte, size int) (pieces [][]byte) {
	for len(p) > 0 {
		n := len(p) - len(bytes.TrimLeft(p, "\x00"))
		if n < size {
			n = min(size, len(p))
		}
		pieces = append(pieces, p[:n])
		p = p[n:]
	}
	return pieces
}

// podmanBlob puts a compressed TOC behind the frames of a tar.
func podmanBlob(frames, packed []byte, raw int) blob {
	at := len(frames) + 8
	data := append(frames, skip(packed)...)
	split := len(data) + 8
	data = append(data, skip([]byte("tar-split"))...)
	var footer []byte
	for _, n := range []int{at, len(packed), raw, 1, split, 9, 9} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	data = append(data, skip(append(footer, "GNUlInUx"...))...)
	return blob{data, map[string]string{
		zstdchunked.ChecksumAnnotation: digest.FromBytes(packed).String(),
		zstdchunked.PositionAnnotation: fmt.Sprintf("%d:%d:%d:1", at, len(packed), raw),
		zstdchunked.TarSplitAnnotation: fmt.Sprintf("%d:9:9", split),
	}}
}

// skip makes a skippable frame.
func skip(p []byte) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte("\x50\x2a\x4d\x18"), uint32(len(p))), p...)
}

// blobOf is a blob with a made-up TOC, behind 1000 bytes of content.
func blobOf(t testing.TB, toc string) blob {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return podmanBlob(make([]byte, 1000), enc.EncodeAll([]byte(toc), nil), len(toc))
}

// stargzOf is blobOf in the other dialect.
func stargzOf(t testing.TB, toc string) blob {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	packed := enc.EncodeAll([]byte(toc), nil)
	data := append(make([]byte, 1000), skip(packed)...)
	var footer []byte
	for _, n := range []int{1008, len(packed), len(toc), 1} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	return blob{append(data, skip(append(footer, "GnUlInUx"...))...), map[string]string{
		zstdchunked.StargzTOCAnnotation: digest.FromString(toc).String(),
	}}
}
