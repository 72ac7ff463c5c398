package image

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A plan says where in the image everything is: inodes from firstInode on, then whole blocks of directories, then
// shared extended attributes.
type plan struct {
	l   *layer.Layer
	opt Options

	// Compact inodes have no time of their own before Linux 6.15: they have these, the commonest of the layer.
	epoch     int64
	epochNsec uint32

	nids    []uint32 // of inodes, in slots
	parents []uint32 // of directories, as indices of inodes
	dirs    []dir    // of directories, in the order of inodes
	shared  sharedXattrs

	dirBlock   int64 // the first block of directories
	xattrBlock int64 // the first block of shared extended attributes
	blocks     int64 // of the image
}

// A dir is the size of a directory: whole blocks, then a tail.
type dir struct {
	block  uint32 // its first, counted from plan.dirBlock
	blocks uint32 // how many, without the tail
	tail   uint16 // bytes behind the inode
	size   int64
}

func lay(l *layer.Layer, opt Options) (*plan, error) {
	if len(l.Inodes) == 0 || !l.Inodes[layer.Root].IsDir() {
		return nil, fmt.Errorf("%w: the root is not a directory", ErrLayer)
	}
	// Block numbers have 32 bits, and all ones mean a hole.
	if l.DataSize < 0 || l.DataSize/BlockSize >= math.MaxUint32 {
		return nil, fmt.Errorf("%w: %d bytes of content", ErrLayer, l.DataSize)
	}
	p := &plan{l: l, opt: opt, nids: make([]uint32, len(l.Inodes))}
	if err := p.findParents(); err != nil {
		return nil, err
	}
	p.chooseEpoch()
	p.shareXattrs()

	pos, dirBlocks := int64(firstInode), int64(0)
	for i, in := range l.All() {
		size, tail := in.Size, int64(0)
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			d, err := p.layDir(i)
			if err != nil {
				return nil, err
			}
			d.block = uint32(dirBlocks)
			dirBlocks += int64(d.blocks)
			p.dirs = append(p.dirs, d)
			size, tail = d.size, int64(d.tail)
		case unix.S_IFLNK:
			if len(in.Target) == 0 || len(in.Target) > maxTarget {
				return nil, fmt.Errorf("%w: inode %d: a symlink's target has 1 to %d bytes, not %d", ErrLayer, i, maxTarget, len(in.Target))
			}
			size, tail = int64(len(in.Target)), int64(len(in.Target))
			if tail > maxTail { // a block of its own, among those of directories
				tail = 0
				dirBlocks++
			}
		default:
			if err := p.check(i); err != nil {
				return nil, err
			}
		}
		xattrs, err := p.xattrSize(i)
		if err != nil {
			return nil, err
		}

		head := int64(compactSize)
		if !p.compact(in, size) {
			head = extendedSize
		}
		pos = place(pos, head, int64(xattrs), tail)
		p.nids[i] = uint32(pos / slotSize)
		pos += head + int64(xattrs) + tail
		if chunked(in) {
			pos = align(pos, indexSize) + indexSize
		}
		pos = align(pos, slotSize)
		if pos/slotSize >= math.MaxUint32 {
			return nil, fmt.Errorf("%w: more than %d inodes", ErrLayer, i)
		}
	}
	p.dirBlock = align(pos, BlockSize) / BlockSize
	p.xattrBlock = p.dirBlock + dirBlocks
	p.blocks = p.xattrBlock + align(p.shared.size, BlockSize)/BlockSize
	if p.blocks >= math.MaxUint32 {
		return nil, fmt.Errorf("%w: %d blocks of metadata", ErrLayer, p.blocks)
	}
	return p, nil
}

// place returns where at or behind pos an inode may begin. Its first bytes must not cross blocks for the sake of speed, its
// tail must not for the kernel's.
func place(pos, head, xattrs, tail int64) int64 {
	if together := head + xattrs + tail; tail > 0 && together <= BlockSize {
		if pos%BlockSize+together > BlockSize {
			return align(pos, BlockSize)
		}
		return pos
	}
	for pos%BlockSize+head > BlockSize || (pos+head+xattrs)%BlockSize+tail > BlockSize {
		pos += slotSize
	}
	return pos
}

// chunked reports whether an inode is followed by the index of its content.
func chunked(in *layer.Inode) bool { return in.IsRegular() && in.Size > 0 }

// compact reports whether an inode fits the short form.
func (p *plan) compact(in *layer.Inode, size int64) bool {
	return in.UID <= math.MaxUint16 && in.GID <= math.MaxUint16 && in.Nlink <= math.MaxUint16 && size <= math.MaxUint32 &&
		in.Mtime == p.epoch && in.MtimeNsec == p.epochNsec
}

// check says why an inode that is neither directory nor symlink cannot be written.
func (p *plan) check(i uint32) error {
	in := &p.l.Inodes[i]
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		switch {
		case in.Size == 0:
		case in.Size < 0 || in.Size > p.l.DataSize || in.Data < 0 || in.Data > p.l.DataSize-in.Size || in.Data%BlockSize != 0:
			return fmt.Errorf("%w: inode %d: %d bytes at %d of %d bytes of content", ErrLayer, i, in.Size, in.Data, p.l.DataSize)
		case chunkBits(in.Size) > maxChunkBits:
			return fmt.Errorf("%w: inode %d: %d bytes are more than one chunk", ErrLayer, i, in.Size)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		// new_encode_dev() of Linux's kdev_t.h.
		if in.Major >= 1<<12 || in.Minor >= 1<<20 {
			return fmt.Errorf("%w: inode %d: device %d:%d", ErrLayer, i, in.Major, in.Minor)
		}
	case unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return fmt.Errorf("%w: inode %d: mode %#o", ErrLayer, i, in.Mode)
	}
	return nil
}

// chooseEpoch finds the commonest time, and of several the one that comes first.
func (p *plan) chooseEpoch() {
	type instant struct {
		sec  int64
		nsec uint32
	}
	seen, best := make(map[instant]int), 0
	for _, in := range p.l.All() {
		seen[instant{in.Mtime, in.MtimeNsec}]++
	}
	for _, in := range p.l.All() {
		if n := seen[instant{in.Mtime, in.MtimeNsec}]; n > best {
			best, p.epoch, p.epochNsec = n, in.Mtime, in.MtimeNsec
		}
	}
}

// align rounds n up to a multiple of a power of two.
func align(n, to int64) int64 { return (n + to - 1) &^ (to - 1) }
