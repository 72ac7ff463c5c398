package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// The formats of lazy layers, as LabelFormats and reports have them.
const (
	FormatEStargz     = "estargz"
	FormatZstdChunked = "zstd:chunked"
)

// FormatLabel returns what LabelFormats has of a zstd:chunked layer whose table of contents is at a position, the zero value if that isn't known.
func FormatLabel(at zstdchunked.Position) string {
	if at == (zstdchunked.Position{}) {
		return FormatZstdChunked
	}
	return FormatZstdChunked + "@" + at.String()
}

// Format returns the format of the lazy layer that a snapshot with these labels has.
func Format(labels map[string]string) string {
	name, _, _ := strings.Cut(formatsOf(labels, "")[labels[LabelDigest]], "@")
	if name == "" {
		return FormatEStargz
	}
	return name
}

// formatsOf returns the formats of LabelLayers by the digests of the blobs, as far as they are known.
func formatsOf(labels map[string]string, suffix string) map[string]string {
	formats := strings.Split(labels[LabelFormats+suffix], ",")
	by := map[string]string{}
	for i, l := range strings.Split(labels[LabelLayers+suffix], ",") {
		if i < len(formats) {
			by[l] = formats[i]
		}
	}
	return by
}

// A table is what a format has made of a layer's table of contents.
type table struct {
	format   string // FormatEStargz or FormatZstdChunked
	layer    *layer.Layer
	packed   []byte // the table, compressed, as the store keeps it
	end      int64  // of the frames in the blob
	prefetch int64
}

// A format opens layers. Where the table of contents is, it knows, or finds out by the end of the blob.
type format struct {
	name string
	at   zstdchunked.Position
}

func parseFormat(s string) (format, error) {
	name, where, given := strings.Cut(s, "@")
	f := format{name: name}
	if !slices.Contains([]string{"", FormatEStargz, FormatZstdChunked}, name) {
		return f, fmt.Errorf("label %s: format %q is not known", LabelFormats, name)
	}
	var err error
	if given {
		if f.at, err = zstdchunked.ParsePosition(where); err != nil {
			return f, fmt.Errorf("label %s: %w", LabelFormats, err)
		}
	}
	return f, nil
}

// formatOf returns the format of a table of contents that the store has kept: of zstd:chunked it is a zstd frame.
func formatOf(packed []byte) format {
	if bytes.HasPrefix(packed, []byte("\x28\xb5\x2f\xfd")) {
		return format{name: FormatZstdChunked}
	}
	return format{name: FormatEStargz}
}

// parse makes a layer of a table of contents that the store has kept.
func (f format) parse(packed []byte, end int64, toc digest.Digest) (table, error) {
	if f.name == FormatZstdChunked {
		return ofZstdChunked(zstdchunked.Parse(packed, end, zstdchunked.Options{TOCDigest: toc}))
	}
	return ofEStargz(estargz.Parse(packed, end, estargz.Options{TOCDigest: toc}))
}

// open makes a layer of a blob. Last are its last bytes, as far as they are known; external is asked for a table of contents that stands
// elsewhere.
func (f format) open(r io.ReaderAt, size int64, toc digest.Digest, last []byte, external func() ([]byte, error)) (table, error) {
	if f.name == FormatZstdChunked {
		return ofZstdChunked(zstdchunked.Open(r, size, zstdchunked.Options{TOCDigest: toc, Position: f.at}))
	}
	opt := estargz.Options{TOCDigest: toc, Tail: estargz.TailOf(last, size)}
	b, err := estargz.Open(r, size, opt)
	if errors.Is(err, estargz.ErrExternalTOC) {
		if opt.ExternalTOC, err = external(); err == nil {
			b, err = estargz.Open(r, size, opt)
		}
	}
	return ofEStargz(b, err)
}

func ofEStargz(b *estargz.Blob, err error) (table, error) {
	if err != nil {
		return table{}, err
	}
	return table{FormatEStargz, b.Layer, b.TOC, b.End, b.Prefetch}, nil
}

func ofZstdChunked(b *zstdchunked.Blob, err error) (table, error) {
	if err != nil {
		return table{}, err
	}
	return table{FormatZstdChunked, b.Layer, b.TOC, b.End, b.Prefetch}, nil
}
