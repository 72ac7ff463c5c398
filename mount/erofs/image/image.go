// Package image writes the metadata of a lazy layer as an EROFS filesystem image.
//
// The image holds everything that stat(2), readdir(3), readlink(2) and getxattr(2) answer. The content of regular files is
// not in it: each file is one chunk of an external device, the data file, at the offset that [layer.Inode.Data] says.
// Mounted with -o device=<data file>, the kernel reads files from there, whatever is in it by then.
//
// # What becomes of a layer
//
// Hardlinks are several directory entries with one inode. A whiteout is the character device 0:0 that it already is in
// the model; an opaque directory has the extended attribute trusted.overlay.opaque (or user.overlay.opaque, see
// [Options]). Times keep their nanoseconds. An inode's number, as stat(2) shows it, is its place in the image; the
// field for 32-bit systems has its index in the layer and one. Extended attributes whose namespace EROFS has no number
// for are left out, as unpacking a layer leaves out what the filesystem refuses; what the image cannot hold otherwise is an
// error that wraps [ErrLayer] and names the file's inode.
//
// # Guarantees
//
// The same layer and options give the same bytes. The superblock's checksum is checked by the kernel at mount. Needed is
// Linux 5.16 (chunks, devices); a file-backed mount needs 6.12.
//
// # Why not go-erofs' writer
//
// github.com/erofs/go-erofs is built around paths that are added one by one: it has no hardlinks, and took 1.4 s and
// 175 MB for 100,000 files. A layer already is a table of inodes, which needs no paths, no sorting and no second
// copy: it is laid out in one pass and written in a second. go-erofs' reader is what the tests compare with, along with
// fsck.erofs and the kernel.
//
// The format is that of https://erofs.docs.kernel.org/en/latest/core_ondisk.html and Linux's fs/erofs/erofs_fs.h.
package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Options says how to write an image. The zero value works.
type Options struct {
	// UUID names the filesystem: the first bytes of the layer's TOC digest, say.
	UUID [16]byte
	// UserXattr marks opaque directories by user.overlay.opaque, for overlayfs mounts with the option userxattr.
	UserXattr bool
}

// ErrLayer is wrapped by errors that say why a layer cannot be an image.
var ErrLayer = errors.New("layer does not fit into an EROFS image")

// BlockSize is the size of a block of the image and of the data file, in bytes.
const BlockSize = layer.BlockSize

// Write writes the image of a layer, which isn't packed, to w. Its length is a multiple of BlockSize.
func Write(w io.Writer, l *layer.Layer, opt Options) error {
	p, err := lay(l, opt)
	if err != nil {
		return err
	}
	out := &writer{w: w, buf: make([]byte, 0, flushSize+2*BlockSize)}
	p.superblock(out)
	p.inodes(out)
	p.directories(out)
	p.sharedXattrs(out)
	return out.flush()
}

// flushSize is how much is written at once, in bytes.
const flushSize = 256 << 10

// A writer collects what is written, and puts the checksum into the first block. It remembers the first error.
type writer struct {
	w     io.Writer
	buf   []byte
	start int64 // of buf in the image
	err   error
}

func (w *writer) pos() int64 { return w.start + int64(len(w.buf)) }

// padTo fills up with zeros.
func (w *writer) padTo(pos int64) {
	for n := pos - w.pos(); n > 0; n = pos - w.pos() {
		w.buf = append(w.buf, zeros[:min(n, BlockSize)]...)
		w.mayFlush()
	}
}

var zeros [BlockSize]byte

// mayFlush is called between inodes and blocks, so the first flush has the first block.
func (w *writer) mayFlush() {
	if len(w.buf) >= flushSize {
		_ = w.flush() // kept in w.err
	}
}

func (w *writer) flush() error {
	if w.err != nil {
		w.start, w.buf = w.pos(), w.buf[:0]
		return w.err
	}
	if w.start == 0 {
		// Seeded with ^0 and not inverted at the end: the complement of what Go calls the checksum.
		sum := ^crc32.Checksum(w.buf[superOffset:BlockSize], castagnoli)
		binary.LittleEndian.PutUint32(w.buf[superOffset+4:], sum)
	}
	n, err := w.w.Write(w.buf)
	if err == nil && n < len(w.buf) {
		err = io.ErrShortWrite
	}
	if err != nil {
		w.err = fmt.Errorf("write EROFS image: %w", err)
	}
	w.start, w.buf = w.pos(), w.buf[:0]
	return w.err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
