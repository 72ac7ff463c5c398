package toc

import (
	"errors"
	"fmt"
	"io"
)

// ReadFull reads len(p) bytes of a blob at off, in one go, or none if p is empty. A blob that ends before is an error that wraps
// [io.ErrUnexpectedEOF]; others are the reader's.
func ReadFull(r io.ReaderAt, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("%d of %d bytes: %w", n, len(p), io.ErrUnexpectedEOF)
	}
	return err
}
