package store

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
)

var (
	// ErrLocked says that another process has the root.
	ErrLocked = errors.New("in use by another process")
	// ErrInUse says that a layer is held, and so can't be removed.
	ErrInUse = errors.New("layer is in use")
	// ErrMissing says that bytes haven't arrived.
	ErrMissing = errors.New("not there yet")
	// ErrDamaged says that a file isn't what was written. It is an fs.ErrNotExist: the file has to be made again.
	ErrDamaged = fmt.Errorf("damaged (%w)", fs.ErrNotExist)
	// ErrUnbound says that [Layer.Bind] hasn't been called.
	ErrUnbound = errors.New("layer isn't bound to its table of contents")
	// ErrClosed says that the store is closed.
	ErrClosed = fmt.Errorf("store: %w", fs.ErrClosed)
)

// A DigestError is bytes that are not those of the chunk. Nothing of them was written.
type DigestError struct {
	Key       Key
	Chunk     int
	Want, Got [sha256.Size]byte
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("layer %s: chunk %d: digest mismatch: want sha256:%x, got sha256:%x", e.Key, e.Chunk, e.Want, e.Got)
}

// cause strips the path from what package os returns, where the message names layer and root already.
func cause(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}
