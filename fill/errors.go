package fill

import (
	"errors"
	"fmt"
)

// A CorruptError says that a chunk isn't what the layer's table of contents says, also after its frame was fetched
// again. Nothing of the chunk has been written. The next Fill of it fetches it anew.
type CorruptError struct {
	// Layer is the layer's name, File the path of a file that the chunk belongs to, Chunk its number
	// in that file, from 0.
	Layer, File string
	Chunk       int
	// Err is what is wrong.
	Err error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("read %s (layer %s): chunk %d: %v", e.File, e.Layer, e.Chunk, e.Err)
}

// Unwrap returns Err.
func (e *CorruptError) Unwrap() error { return e.Err }

// failed names what a frame that didn't arrive belongs to.
func (f *Filler) failed(frame int, err error) error {
	bad, ok := errors.AsType[*corrupt](err)
	if !ok {
		return fmt.Errorf("read %s (layer %s): %w", f.fileOf(int(f.layer.Frames[frame].FirstChunk)), f.opt.Name, err)
	}
	e := &CorruptError{Layer: f.opt.Name, File: f.fileOf(bad.chunk), Chunk: bad.chunk, Err: bad.err}
	if i, ok := f.layer.FileAt(bad.chunk); ok {
		e.Chunk -= int(f.layer.Inode(i).FirstChunk)
	}
	return e
}

// fileOf returns a path of a chunk's file.
func (f *Filler) fileOf(chunk int) string {
	if i, ok := f.layer.FileAt(chunk); ok {
		if path, ok := f.layer.Path(i); ok {
			return path
		}
	}
	return "?"
}
