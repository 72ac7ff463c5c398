// Package toc reads tables of contents: the JSON that eStargz and zstd:chunked have in common, which says what is in a layer, and where in
// its blob. Where the JSON is, and how it's compressed, is for the packages of the formats to say.
//
// [Read] takes no more of it into memory than the entry at hand. Nothing is to be used of one whose digest isn't the one that the caller
// expects, which Read compares if it is told. Content without a digest is [ErrUnverifiable], a name that JSON can't have [ErrLossy];
// whatever else is wrong is an error that wraps [io/fs.ErrInvalid], from here or from package layer.
//
// A table of contents has no name that isn't UTF-8. Chunks of zeros, which Podman's writer marks, are in the blob like others; those of any
// size are taken.
package toc

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

const (
	// Name is that of the table of contents in the tar of an eStargz layer.
	Name = "stargz.index.json"
	// PrefetchLandmark stands in the root, behind what is to be fetched at once. With [Options.Landmarks] it is hidden, like the table of contents.
	PrefetchLandmark = ".prefetch.landmark"
	// NoPrefetchLandmark stands in the root of a layer that has nothing to be fetched at once. It is hidden as the other one is.
	NoPrefetchLandmark = ".no.prefetch.landmark"

	// MaxCompressed bounds what is read of a table of contents into memory, in bytes: twice what [layer.MaxEntries] files take, at 60
	// bytes each.
	MaxCompressed = 64 << 20
	// MaxSize bounds what that is decompressed to, some at a time: as many files with two chunks each, at 400 and 250 bytes.
	MaxSize = 512 << 20
)

// NoLandmark is the [Table.Prefetch] of a layer without landmarks.
const NoLandmark = -1

var (
	// Err is a table of contents that can't be understood.
	Err = layer.Invalid("invalid table of contents")
	// ErrUnverifiable is a layer with content for which there is no SHA-256.
	ErrUnverifiable = layer.Invalid("no SHA-256 in the table of contents")
	// ErrLossy is a name from which bytes that aren't UTF-8 have gone: only the tar knows it.
	ErrLossy = layer.Invalid("not UTF-8")
)

// A DigestError is a table of contents other than the expected one.
type DigestError struct {
	Want, Got digest.Digest
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("table of contents: digest mismatch: want %s, got %s", e.Want, e.Got)
}

// Options of [Read].
type Options struct {
	// Digest is what the JSON must have. Empty is any.
	Digest digest.Digest
	// MaxRatio is how many bytes the blob's codec can at most make of one: see [layer.BuilderOptions].
	MaxRatio int64
	// Landmarks says that the files in the root which eStargz has names for are what it means by them, and hidden.
	Landmarks bool
}

// A Table is what has been read.
type Table struct {
	// Digest is what the JSON has.
	Digest digest.Digest
	// Prefetch is how many bytes at the beginning of the blob its maker wants to be fetched ahead of use, by the landmark that
	// stands there: 0 when it says that none are, [NoLandmark] when it says nothing.
	Prefetch int64

	builder *layer.Builder
}

// Read reads a table of contents to its end. One that has another digest than it should is a *DigestError, whatever else is wrong with it.
func Read(r io.Reader, opt Options) (*Table, error) {
	sum := sha256.New()
	r = io.TeeReader(r, sum)
	t := &tree{builder: layer.NewBuilder(layer.BuilderOptions{MaxRatio: opt.MaxRatio}), landmarks: opt.Landmarks, prefetch: NoLandmark}
	err := t.read(r)
	if err != nil && opt.Digest != "" {
		// A wrong TOC isn't to be blamed for what is in it.
		if _, cerr := io.Copy(io.Discard, r); cerr != nil {
			return nil, fmt.Errorf("%w: %w", Err, cerr)
		}
	}
	got := digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(sum.Sum(nil)))
	if opt.Digest != "" && got != opt.Digest {
		return nil, &DigestError{Want: opt.Digest, Got: got}
	}
	if err != nil {
		return nil, err
	}
	return &Table{Digest: got, Prefetch: t.prefetch, builder: t.builder}, nil
}

// Layer makes the layer. Its frames end at the latest at an offset of the blob, and codec decompresses them. It is called once.
func (t *Table) Layer(end int64, codec layer.Codec) (*layer.Layer, error) {
	return t.builder.Build(end, codec)
}
