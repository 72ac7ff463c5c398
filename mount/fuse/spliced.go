package fuse

import (
	"cmp"
	"errors"
	"io"
	"os"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hanwen/go-fuse/v2/splice"
	"golang.org/x/sys/unix"
)

// maxCopy is how many bytes are rather copied than spliced, which takes a dozen system calls instead of two.
const maxCopy = 16 << 10

// content returns n bytes at off of the data file, copied to buf or in a pipe. Fewer are an error: go-fuse would take a file descriptor, too, but
// then a disk's error in the middle for the end of the file, and so would the kernel, for good.
func (m *Mount) content(buf []byte, off int64, n int) (gofuse.ReadResult, error) {
	if n > maxCopy && splice.Resizable() {
		pipe, err := m.load(off, n)
		if err == nil {
			return gofuse.ReadResultPipe(pipe, n), nil
		}
		if !errors.Is(err, errNoPipe) {
			return nil, err
		}
	}
	got, err := unix.Pread(m.data, buf[:n], off)
	if err != nil || got < n {
		return nil, cmp.Or(err, io.ErrUnexpectedEOF)
	}
	return gofuse.ReadResultData(buf[:n]), nil
}

// errNoPipe is an error of want of pipes, or of room in one, which is no reason not to read.
var errNoPipe = errors.New("no pipe")

// load returns a pipe with n bytes at off of the data file.
func (m *Mount) load(off int64, n int) (*splice.Pair, error) {
	pipe, err := splice.Get()
	if err != nil {
		return nil, errNoPipe
	}
	if err := pipe.Grow(n + os.Getpagesize()); err != nil { // a page for an end that isn't one's
		splice.Done(pipe)
		return nil, errNoPipe
	}
	if got, err := pipe.LoadFromAt(uintptr(m.data), n, off); err != nil || got < n {
		splice.Done(pipe)
		return nil, cmp.Or(err, io.ErrUnexpectedEOF)
	}
	return pipe, nil
}
