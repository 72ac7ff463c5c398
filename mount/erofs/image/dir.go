package image

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// findParents fills p.parents, and refuses what is not a tree.
func (p *plan) findParents() error {
	p.parents = make([]uint32, len(p.l.Inodes))
	const none = ^uint32(0)
	for i := range p.parents {
		p.parents[i] = none
	}
	p.parents[layer.Root] = layer.Root
	for i, in := range p.l.All() {
		if !in.IsDir() {
			continue
		}
		for _, e := range in.Entries {
			if int64(e.Inode) >= int64(len(p.l.Inodes)) {
				return fmt.Errorf("%w: inode %d: entry %q is of inode %d", ErrLayer, i, e.Name, e.Inode)
			}
			if !p.l.Inodes[e.Inode].IsDir() {
				continue
			}
			if p.parents[e.Inode] != none {
				return fmt.Errorf("%w: inode %d: directory %q has another name", ErrLayer, i, e.Name)
			}
			p.parents[e.Inode] = i
		}
	}
	for i, in := range p.l.All() {
		if in.IsDir() && p.parents[i] == none {
			return fmt.Errorf("%w: inode %d: directory without a name", ErrLayer, i)
		}
	}
	return nil
}

// layDir says how large a directory is, and refuses entries that the kernel would.
func (p *plan) layDir(i uint32) (dir, error) {
	entries := p.l.Inodes[i].Entries
	for k, e := range entries {
		switch {
		case e.Name == "" || e.Name == "." || e.Name == ".." || len(e.Name) > maxName || strings.ContainsAny(e.Name, "/\x00"):
			return dir{}, fmt.Errorf("%w: inode %d: entry named %q", ErrLayer, i, e.Name)
		case k > 0 && entries[k-1].Name >= e.Name:
			return dir{}, fmt.Errorf("%w: inode %d: entry %q comes behind %q", ErrLayer, i, e.Name, entries[k-1].Name)
		}
	}
	var d dir
	for b := p.newBlocks(i); ; {
		size := b.next().size
		if !b.more() {
			if size <= maxTail {
				d.tail = uint16(size)
			} else {
				d.blocks++
			}
			d.size += int64(size)
			return d, nil
		}
		d.blocks++
		d.size += BlockSize
	}
}

// dirBlocks cuts the entries of a directory, with "." and ".." in their places, into blocks.
type dirBlocks struct {
	entries     []layer.Entry
	dot, dotdot uint32 // inodes
	dots        int    // how many of the two are done
}

// dirBlock is a block of a directory: entries, the first of which may be preceded by dots.
type dirBlock struct {
	rest []layer.Entry // the block's entries and those behind it
	dots int           // of the two, done before this block
	n    int           // names, dots included
	size int           // bytes in use
}

func (p *plan) newBlocks(i uint32) *dirBlocks {
	return &dirBlocks{entries: p.l.Inodes[i].Entries, dot: i, dotdot: p.parents[i]}
}

func (b *dirBlocks) more() bool { return len(b.entries) > 0 || b.dots < 2 }

// dotNames are ordered as entries are; names such as "+" come before them.
var dotNames = [2]string{".", ".."}

func (b *dirBlocks) next() dirBlock {
	block := dirBlock{rest: b.entries, dots: b.dots}
	for b.more() {
		dot := b.dots < 2 && (len(b.entries) == 0 || dotNames[b.dots] < b.entries[0].Name)
		var size int
		if dot {
			size = direntSize + len(dotNames[b.dots])
		} else {
			size = direntSize + len(b.entries[0].Name)
		}
		if block.size+size > BlockSize {
			break
		}
		block.size += size
		block.n++
		if dot {
			b.dots++
		} else {
			b.entries = b.entries[1:]
		}
	}
	return block
}

// appendBlock appends a block of a directory without padding, and returns how long it is.
func (p *plan) appendBlock(b []byte, block dirBlock, dot, dotdot uint32) (_ []byte, size int) {
	start, name := len(b), block.n*direntSize
	inodes := [2]uint32{dot, dotdot}
	each := func(f func(name string, inode uint32)) {
		rest, dots := block.rest, block.dots
		for range block.n {
			if dots < 2 && (len(rest) == 0 || dotNames[dots] < rest[0].Name) {
				f(dotNames[dots], inodes[dots])
				dots++
				continue
			}
			f(rest[0].Name, rest[0].Inode)
			rest = rest[1:]
		}
	}
	each(func(s string, inode uint32) {
		b = le.AppendUint64(b, uint64(p.nids[inode]))
		b = le.AppendUint16(b, uint16(name))
		b = append(b, fileType(p.l.Inodes[inode].Mode), 0)
		name += len(s)
	})
	each(func(s string, _ uint32) { b = append(b, s...) })
	return b, len(b) - start
}

// directories writes the whole blocks of directories, and long symlinks among them.
func (p *plan) directories(w *writer) {
	w.padTo(p.dirBlock * BlockSize)
	dirs := p.dirs
	for i, in := range p.l.All() {
		switch {
		case in.Mode&unix.S_IFMT == unix.S_IFLNK && len(in.Target) > maxTail:
			w.buf = append(w.buf, in.Target...)
			w.padTo(align(w.pos(), BlockSize))
		case in.IsDir():
			b := p.newBlocks(i)
			for range dirs[0].blocks {
				w.buf, _ = p.appendBlock(w.buf, b.next(), b.dot, b.dotdot)
				w.padTo(align(w.pos(), BlockSize))
				w.mayFlush()
			}
			dirs = dirs[1:]
		}
	}
}
