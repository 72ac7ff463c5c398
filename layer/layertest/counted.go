package layertest

import (
	"fmt"
	"io"
)

// Counted writes down what is read of a blob, as "100 at 5000". It isn't safe for concurrent use.
type Counted struct {
	io.ReaderAt
	Reads []string
	// Err is what reads come to, if it's set.
	Err error
}

// ReadAt implements io.ReaderAt.
func (c *Counted) ReadAt(p []byte, off int64) (int, error) {
	c.Reads = append(c.Reads, fmt.Sprintf("%d at %d", len(p), off))
	if c.Err != nil {
		return 0, c.Err
	}
	return c.ReaderAt.ReadAt(p, off)
}
