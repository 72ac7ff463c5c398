// Package zstdchunked opens and writes zstd:chunked layers: zstd-compressed tars whose files begin zstd frames of their own, and whose table of contents
// (TOC), the JSON of package toc, stands behind them in a frame that decompressors skip. There are two dialects, which cannot read each
// other:
//
//	            written by                    the manifest has the SHA-256 of    footer
//	[Podman]    Podman, Buildah, Skopeo       the compressed TOC                 64 bytes, "GNUlInUx"
//	[Stargz]    ctr-remote, nerdctl           the JSON                           40 bytes, "GnUlInUx"
//
// The first is that of https://github.com/containers/storage/blob/main/docs/containers-storage-zstd-chunked.md, the second that of
// estargz/zstdchunked in stargz-snapshotter. [Find] says what annotations have of either, and with it [Open] reads the TOC and nothing else.
// Without a position, it is looked for by the footer.
//
// Whose digest it is that the TOC has tells which dialect a layer is of: what both mean would have to have the same SHA-256. A file that
// eStargz would take for a landmark is one in the dialect of stargz-snapshotter only.
//
// A frame holds a chunk of a file as a rule, and may have more behind it, which is left alone. Nothing is used of a TOC whose
// digest isn't the one that the caller expects. A layer that can't be had chunk by chunk with a digest for each is [toc.ErrUnverifiable];
// a hostile or damaged one is an error that wraps [io/fs.ErrInvalid], from here or from the packages toc and layer. In all these cases the
// layer may still be pulled as a whole. Errors of the io.ReaderAt come through.
//
// [Write] makes a layer of a tar in Podman's dialect, without loss and on all CPUs: see package frames. It decompresses to that tar and nothing
// else, so the DiffID is the tar's. The bytes of one blob could serve readers of both dialects; its descriptor can't, as Podman refuses a
// layer with the annotations of both, and stargz-snapshotter uses none without its own.
package zstdchunked

import (
	"bytes"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

// A Dialect is one of the two.
type Dialect int

// The dialects.
const (
	Podman Dialect = iota + 1
	Stargz
)

// Options of [Open] and [Parse].
type Options struct {
	// TOCDigest is what the manifest says that the TOC has. Empty is any: the caller must have another reason to trust the blob.
	TOCDigest digest.Digest
	// Position is where the TOC is. The zero value is what the footer says.
	Position Position
}

// A Blob is an opened zstd:chunked layer.
type Blob struct {
	Layer   *layer.Layer
	Dialect Dialect
	// TOCDigest is what the TOC has, as the dialect has it.
	TOCDigest digest.Digest
	// TOC is the compressed TOC, and End where the frames of the blob end: with them and its digest, [Parse] makes the same Blob again.
	TOC []byte
	End int64
	// Prefetch is as [toc.Table] has it.
	Prefetch int64
}

// ErrFooter is a blob that doesn't end as a zstd:chunked layer does: it's of another format.
var ErrFooter = layer.Invalid("no zstd:chunked footer")

// tail is how much of the end of a blob is read when nobody says where the TOC is. Behind the TOC there may be the headers of the tar.
const tail = 512 << 10

// Open opens a blob of the given size. With a position, it calls r.ReadAt once; without one, a second time for what lacks of a TOC
// that begins before what it has read of the end. The Layer doesn't use r.
func Open(r io.ReaderAt, size int64, opt Options) (*Blob, error) {
	if opt.Position != (Position{}) {
		if err := opt.Position.within(size); err != nil {
			return nil, err
		}
		packed := make([]byte, opt.Position.Size)
		if err := toc.ReadFull(r, packed, opt.Position.Offset); err != nil {
			return nil, fmt.Errorf("read %d bytes of the table of contents at %d: %w", len(packed), opt.Position.Offset, err)
		}
		return parse(packed, opt.Position.Offset-frameHeader, opt.TOCDigest, 0)
	}
	last := make([]byte, min(tail, max(size, 0)))
	start := size - int64(len(last))
	if err := toc.ReadFull(r, last, start); err != nil {
		return nil, fmt.Errorf("read the last %d bytes of the blob: %w", len(last), err)
	}
	at, dialect, err := parseFooter(last)
	if err != nil {
		return nil, err
	}
	if err := at.within(size); err != nil {
		return nil, err
	}
	packed := make([]byte, at.Size)
	missing := packed[:min(at.Size, max(start-at.Offset, 0))]
	if err := toc.ReadFull(r, missing, at.Offset); err != nil {
		return nil, fmt.Errorf("read %d bytes of the table of contents at %d: %w", len(missing), at.Offset, err)
	}
	if rest := packed[len(missing):]; len(rest) > 0 {
		copy(rest, last[at.Offset+int64(len(missing))-start:])
	}
	return parse(packed, at.Offset-frameHeader, opt.TOCDigest, dialect)
}

// Parse makes a Blob of a compressed TOC, whose frames end at the latest at an offset of the blob.
func Parse(packed []byte, end int64, opt Options) (*Blob, error) {
	return parse(packed, end, opt.TOCDigest, 0)
}

// parse is Parse. The dialect counts only where the digest doesn't tell.
func parse(packed []byte, end int64, want digest.Digest, dialect Dialect) (*Blob, error) {
	sum := digest.FromBytes(packed)
	opt := toc.Options{MaxRatio: maxRatio}
	switch {
	case want == sum || want == "" && dialect != Stargz:
		dialect = Podman
	default:
		dialect, opt.Landmarks, opt.Digest = Stargz, true, want
	}
	zr, err := Codec{}.Decompress(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", toc.Err, err)
	}
	defer zr.Close()
	table, err := toc.Read(&limited{r: zr, max: toc.MaxSize}, opt)
	if err != nil {
		return nil, err
	}
	l, err := table.Layer(end, Codec{})
	if err != nil {
		return nil, err
	}
	b := &Blob{Layer: l, Dialect: dialect, TOCDigest: sum, TOC: packed, End: end, Prefetch: table.Prefetch}
	if dialect == Stargz {
		b.TOCDigest = table.Digest
	}
	return b, nil
}

// limited is an io.LimitedReader that says so.
type limited struct {
	r      io.Reader
	n, max int64
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.n += int64(n); l.n > l.max {
		return 0, fmt.Errorf("%w: more than %d bytes", layer.ErrLimit, l.max)
	}
	return n, err
}
