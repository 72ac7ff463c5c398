package zstdchunked

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

// The annotations of a layer's descriptor.
const (
	// Podman's: the digest of the compressed TOC, where that is, and where the headers of the tar are, which are compressed too.
	ChecksumAnnotation = "io.github.containers.zstd-chunked.manifest-checksum"
	PositionAnnotation = "io.github.containers.zstd-chunked.manifest-position"
	TarSplitAnnotation = "io.github.containers.zstd-chunked.tarsplit-position"

	// stargz-snapshotter's: the digest of the JSON, which is that of eStargz, and where the TOC is.
	StargzTOCAnnotation      = "containerd.io/snapshot/stargz/toc.digest"
	StargzPositionAnnotation = "io.containers.zstd-chunked.manifest-position"
)

// A Position is where a TOC is in the blob.
type Position struct {
	// Offset and Size are in bytes. A frame's header of 8 bytes is in front.
	Offset, Size int64
}

// String returns what [ParsePosition] takes.
func (p Position) String() string { return fmt.Sprintf("%d:%d", p.Offset, p.Size) }

// ParsePosition reads OFFSET:SIZE, and what else there may be behind a colon.
func ParsePosition(s string) (Position, error) {
	fields := strings.Split(s, ":")
	if len(fields) < 2 {
		return Position{}, fmt.Errorf("position %q, want OFFSET:SIZE", s)
	}
	off, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		return Position{}, fmt.Errorf("position %q: %w", s, err)
	}
	size, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return Position{}, fmt.Errorf("position %q: %w", s, err)
	}
	return Position{off, size}, nil
}

// within refuses a position that is none in a blob of so many bytes.
func (p Position) within(blob int64) error {
	switch {
	case p.Size > toc.MaxCompressed:
		return fmt.Errorf("%w: %d bytes compressed: %w", toc.Err, p.Size, layer.ErrLimit)
	case p.Offset < frameHeader || p.Size <= 0 || p.Offset > blob-p.Size:
		return fmt.Errorf("%w: at %s of %d bytes", toc.Err, p, blob)
	}
	return nil
}

// Find returns the digest of the TOC of a layer whose media type says zstd, and its position, the zero value if the annotations don't have
// it. The digest is "" if there is no TOC. That of two TOCs is an error, as it is for Podman: there is no way to say which of them
// a layer is.
func Find(annotations map[string]string) (dgst digest.Digest, at Position, err error) {
	podman, isPodman := annotations[ChecksumAnnotation]
	stargz, isStargz := annotations[StargzTOCAnnotation]
	key, where := ChecksumAnnotation, PositionAnnotation
	switch {
	case isPodman && isStargz:
		return "", Position{}, fmt.Errorf("annotations %s and %s, of which a layer can have one", ChecksumAnnotation, StargzTOCAnnotation)
	case isStargz:
		key, where = StargzTOCAnnotation, StargzPositionAnnotation
		podman = stargz
	case !isPodman:
		return "", Position{}, nil
	}
	if dgst, err = digest.Parse(podman); err != nil {
		return "", Position{}, fmt.Errorf("annotation %s: %q is no digest", key, podman)
	}
	if v, ok := annotations[where]; ok {
		if at, err = ParsePosition(v); err != nil {
			return "", Position{}, fmt.Errorf("annotation %s: %w", where, err)
		}
	}
	return dgst, at, nil
}
