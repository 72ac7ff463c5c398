package snapshot

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

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

// stargzMismatch is how stargz-snapshotter v0.19 words a TOC that isn't the one
// asked for (fs/reader, VerifiableReader.VerifyTOC); it has no type for it.
var stargzMismatch = regexp.MustCompile(`invalid TOC JSON "([a-z0-9:]+)"; want "([a-z0-9:]+)"`)

// stargzWrapping is what stargz-snapshotter puts around the reason why it can't
// open a layer, which its users know the name of.
var stargzWrapping = regexp.MustCompile(`(?s)^failed to resolve layer: failed to resolve layer "[^"]*" from "[^"]*": (.*): failed to resolve target$`)

// explain turns the file system's error into one for users. read is the last read
// that failed meanwhile, which the file system doesn't pass on.
func explain(ctx context.Context, dgst digest.Digest, err, read error) error {
	if m := stargzMismatch.FindStringSubmatch(err.Error()); m != nil {
		return &MismatchError{Layer: dgst, Got: digest.Digest(m[1]), Want: digest.Digest(m[2])}
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if read != nil {
		return read
	}
	if m := stargzWrapping.FindStringSubmatch(err.Error()); m != nil {
		return errors.New(strings.ReplaceAll(m[1], "\n", "; "))
	}
	return err
}
