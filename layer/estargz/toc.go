package estargz

import (
	"archive/tar"
	"bytes"
	"fmt"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

const (
	// tocName is the TOC's own name in a tar, and in a layer that was converted twice.
	tocName = toc.Name

	// MaxCompressedTOC bounds what is read of a TOC into memory, in bytes.
	MaxCompressedTOC = toc.MaxCompressed
)

// Parse makes a Blob of a TOC, a gzip'ed tar, whose frames end at the latest at an offset of the blob.
func Parse(packed []byte, end int64, opt Options) (*Blob, error) {
	if len(packed) > MaxCompressedTOC {
		return nil, fmt.Errorf("%w: %d bytes compressed: %w", ErrTOC, len(packed), layer.ErrLimit)
	}
	gz, err := Codec{}.Decompress(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTOC, err)
	}
	defer gz.Close()
	tr := tar.NewReader(gz)
	head, err := tr.Next()
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrTOC, err)
	case head.Name != tocName:
		return nil, fmt.Errorf("%w: it's called %q, want %q", ErrTOC, head.Name, tocName)
	case head.Size > toc.MaxSize:
		return nil, fmt.Errorf("%w: of %d bytes: %w", ErrTOC, head.Size, layer.ErrLimit)
	}
	t, err := toc.Read(tr, toc.Options{Digest: opt.TOCDigest, MaxRatio: maxRatio, Landmarks: true})
	if err != nil {
		return nil, err
	}
	l, err := t.Layer(end, Codec{})
	if err != nil {
		return nil, err
	}
	return &Blob{Layer: l, TOCDigest: t.Digest, TOC: packed, End: end, Prefetch: t.Prefetch}, nil
}
