package store

import (
	"fmt"
	"io/fs"

	"github.com/opencontainers/go-digest"
)

// A Key is what a layer is known by.
type Key struct {
	// Blob is the digest of the layer's blob.
	Blob digest.Digest `json:"blob"`
	// TOC is the digest of its table of contents, or of whatever takes its place.
	TOC digest.Digest `json:"toc"`
}

// String returns the digest of the blob, which is what users know, and the beginning of that of the TOC.
func (k Key) String() string { return fmt.Sprintf("%s (TOC %.12s)", k.Blob, k.TOC.Encoded()) }

func (k Key) validate() error {
	for _, d := range []digest.Digest{k.Blob, k.TOC} {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("store: key %q, %q: %w: %w", k.Blob, k.TOC, fs.ErrInvalid, err)
		}
	}
	return nil
}
