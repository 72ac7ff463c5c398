package layer

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
)

// Build returns the layer of all that has been added. The last frame ends at end, an offset of the blob.
func (b *Builder) Build(end int64, codec Codec) (*Layer, error) {
	if err := b.endFile(); err != nil {
		return nil, err
	}
	if err := b.resolveLinks(); err != nil {
		return nil, err
	}
	for _, w := range b.whiteouts {
		if _, ok := b.byName[w.direntKey]; !ok {
			b.setName(w.direntKey, w.inode)
		}
	}
	l := &Layer{Codec: codec}
	final := b.layTree(l)
	if err := b.layContent(l, final, end); err != nil {
		return nil, err
	}
	return l, nil
}

// gone is the final number of an inode that no name leads to.
const gone = ^uint32(0)

// layTree makes the inodes of the layer out of those that can be reached, in the order in which they came. It returns their
// numbers in the layer.
func (b *Builder) layTree(l *Layer) (final []uint32) {
	// One allocation holds the entries of all directories: counted, laid out, filled.
	begin := make([]uint32, b.inodes.len()+1)
	for _, name := range b.names.all {
		begin[name.dir+1]++
	}
	for i := range b.inodes.len() {
		begin[i+1] += begin[i]
	}
	entries := make([]Entry, b.names.len())
	next := slices.Clone(begin)
	for _, name := range b.names.all {
		entries[next[name.dir]] = Entry{name.name, name.inode}
		next[name.dir]++
	}
	of := func(dir uint32) []Entry { return entries[begin[dir]:begin[dir+1]:begin[dir+1]] }

	nlink := make([]uint32, b.inodes.len())
	nlink[Root] = 2
	for dirs := []uint32{Root}; len(dirs) > 0; {
		dir := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		for _, e := range of(dir) {
			nlink[e.Inode]++
			if b.inodes.at(e.Inode).IsDir() {
				nlink[e.Inode]++
				nlink[dir]++
				dirs = append(dirs, e.Inode)
			}
		}
	}

	final = make([]uint32, b.inodes.len())
	alive := uint32(0)
	for i, n := range nlink {
		final[i] = gone
		if n > 0 {
			final[i] = alive
			alive++
		}
	}
	l.Inodes = make([]Inode, 0, alive)
	for i, in := range b.inodes.all {
		if final[i] == gone {
			continue
		}
		in.Nlink = nlink[i]
		if in.IsDir() {
			in.Entries = of(i)
			for j := range in.Entries {
				in.Entries[j].Inode = final[in.Entries[j].Inode]
			}
			slices.SortFunc(in.Entries, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
		}
		l.Inodes = append(l.Inodes, *in)
	}
	return final
}

// layContent lays out the data space, and the chunks and frames of what is in it.
func (b *Builder) layContent(l *Layer, final []uint32, end int64) error {
	chunks, frames := 0, 0
	last := -1
	for _, c := range b.chunks.all {
		if final[c.owner] == gone {
			continue
		}
		chunks++
		if f := int(c.Frame); f != last {
			frames, last = frames+1, f
		}
	}
	l.Chunks = make([]Chunk, 0, chunks)
	l.Digests = make([][sha256.Size]byte, 0, chunks)
	l.Frames = make([]Frame, 0, frames)

	last = -1
	pos := int64(0) // end of the last chunk in the data space
	for _, owned := range b.chunks.all {
		c, n := owned.Chunk, final[owned.owner]
		if n == gone {
			continue
		}
		in := &l.Inodes[n]
		fail := func(sentinel error, format string, args ...any) error {
			path, _ := l.Path(n)
			return &EntryError{path, fmt.Errorf("%w: "+format, append([]any{sentinel}, args...)...)}
		}
		if in.NumChunks == 0 {
			pos = (pos + BlockSize - 1) &^ (BlockSize - 1)
			in.Data, in.FirstChunk = pos, uint32(len(l.Chunks))
		}
		in.NumChunks++
		if f := int(c.Frame); f != last {
			last = f
			from, to := *b.frames.at(c.Frame), end
			if f+1 < b.frames.len() {
				to = *b.frames.at(c.Frame + 1)
			}
			if from >= to {
				return fail(ErrContent, "frame at %d, which is behind the content of the blob", from)
			}
			l.Frames = append(l.Frames, Frame{Offset: from, Size: to - from, FirstChunk: uint32(len(l.Chunks))})
		}
		frame := &l.Frames[len(l.Frames)-1]
		frame.NumChunks++
		// The first clause keeps the product from overflowing.
		if r := b.opt.MaxRatio; r > 0 && frame.Size < MaxDataSize/r && int64(c.Inner)+c.Size > r*frame.Size {
			return fail(ErrContent, "chunk ends at %d of a frame of %d bytes", int64(c.Inner)+c.Size, frame.Size)
		}
		c.Data, c.Frame = pos, uint32(len(l.Frames)-1)
		if pos += c.Size; pos > MaxDataSize-BlockSize {
			return fail(ErrLimit, "more than %d bytes of content", int64(MaxDataSize))
		}
		l.Chunks, l.Digests = append(l.Chunks, c), append(l.Digests, owned.digest)
	}
	l.DataSize = (pos + BlockSize - 1) &^ (BlockSize - 1)
	return nil
}

type linkState uint8

const (
	unresolved linkState = iota
	resolving
	resolved
)

// resolveLinks lets the hardlinks that came before their targets lead there.
func (b *Builder) resolveLinks() error {
	for _, name := range b.names.all {
		if name.inode&pending == 0 {
			continue
		}
		n, err := b.resolve(name.inode)
		if err != nil {
			return err
		}
		name.inode = n
	}
	return nil
}

// resolve follows links to links, as far as they go.
func (b *Builder) resolve(n uint32) (uint32, error) {
	var chain []*link
	for n&pending != 0 {
		l := &b.links[n&^pending]
		if l.state == resolved {
			n = l.inode
			break
		}
		fail := func(why string) (uint32, error) {
			return 0, &EntryError{l.name, fmt.Errorf("%w: to %q, %s", ErrLink, l.target, why)}
		}
		if l.state == resolving {
			return fail("in a circle")
		}
		l.state = resolving
		chain = append(chain, l)
		var ok bool
		if n, ok = b.lookup(l.target); !ok {
			return fail("which isn't there")
		}
		if n&pending == 0 && b.inodes.at(n).IsDir() {
			return fail("a directory")
		}
	}
	for _, l := range chain {
		l.inode, l.state = n, resolved
	}
	return n, nil
}
