package snapshot

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
)

// MountError says that a layer could not be mounted from its table of contents.
// It can be pulled.
type MountError struct {
	Layer digest.Digest
	Err   error
}

func (e *MountError) Error() string {
	return fmt.Sprintf("mount layer %s lazily: %v", e.Layer, e.Err)
}

// Unwrap returns Err.
func (e *MountError) Unwrap() error { return e.Err }

// Reason is the error in words for a user who knows which layer is meant.
func (e *MountError) Reason() string {
	if errors.Is(e.Err, blob.ErrNoRange) {
		return "the registry " + blob.ErrNoRange.Error()
	}
	return "its table of contents can't be used: " + e.Err.Error()
}

// MismatchError says that a layer carries another table of contents than its
// manifest promises. Such a layer must not be used, neither lazily nor eagerly:
// somebody changed one of the two.
type MismatchError struct {
	Layer     digest.Digest
	Want, Got digest.Digest // of the TOC, as the manifest says and as the blob has it
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("layer %s: TOC digest mismatch: the manifest says %s, the layer carries %s; refusing to use the layer",
		e.Layer, e.Want, e.Got)
}
