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
	for c := p.cursor(i); ; {
		size := c.block().size
		if c.more() {
			d.blocks++
			d.size += BlockSize
			continue
		}
		d.size += int64(size)
		if size <= maxTail {
			d.tail = uint16(size)
		} else {
			d.blocks++
		}
		return d, nil
	}
}

// A cursor goes through the entries of a directory, "." and ".." in their places among them: names such as "+" come
// before.
type cursor struct {
	entries []layer.Entry
	dots    []layer.Entry
}

func (p *plan) cursor(i uint32) cursor {
	return cursor{p.l.Inodes[i].Entries, []layer.Entry{{Name: ".", Inode: i}, {Name: "..", Inode: p.parents[i]}}}
}

func (c *cursor) more() bool { return len(c.entries) > 0 || len(c.dots) > 0 }

// peek returns the next entry, and the list that it is the first of.
func (c *cursor) peek() (layer.Entry, *[]layer.Entry) {
	if len(c.dots) > 0 && (len(c.entries) == 0 || c.dots[0].Name < c.entries[0].Name) {
		return c.dots[0], &c.dots
	}
	return c.entries[0], &c.entries
}

// A block is as many entries as fit into one.
type block struct {
	from cursor
	n    int // entries
	size int // bytes in use
}

// block returns the next block, and moves behind it.
func (c *cursor) block() block {
	b := block{from: *c}
	for c.more() {
		e, list := c.peek()
		size := direntSize + len(e.Name)
		if b.size+size > BlockSize {
			break
		}
		*list = (*list)[1:]
		b.size += size
		b.n++
	}
	return b
}

// appendBlock appends a block of a directory, without padding: first its entries, then their names.
func (p *plan) appendBlock(buf []byte, b block) []byte {
	name := b.n * direntSize
	c := b.from
	for range b.n {
		e, list := c.peek()
		*list = (*list)[1:]
		buf = le.AppendUint64(buf, uint64(p.nids[e.Inode]))
		buf = le.AppendUint16(buf, uint16(name))
		buf = append(buf, fileType(p.l.Inodes[e.Inode].Mode), 0)
		name += len(e.Name)
	}
	c = b.from
	for range b.n {
		e, list := c.peek()
		*list = (*list)[1:]
		buf = append(buf, e.Name...)
	}
	return buf
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
			c := p.cursor(i)
			for range dirs[0].blocks {
				w.buf = p.appendBlock(w.buf, c.block())
				w.padTo(align(w.pos(), BlockSize))
				w.mayFlush()
			}
			dirs = dirs[1:]
		}
	}
}
