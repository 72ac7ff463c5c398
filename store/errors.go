package store

import (
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

// cause strips the path from what package os returns, where the message names layer and root already.
func cause(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}
