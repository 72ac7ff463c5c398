package fill

import (
	"cmp"
	"hash/maphash"
	"slices"
	"strings"
	"sync"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// names finds entries of a layer by the stems of their names, in whatever directory they are. It's made when it is asked for first.
type names struct {
	layer *layer.Layer
	once  sync.Once
	// entries are ordered by hash. maybe has the hashes that there are, modulo its size, since most words are no names.
	entries []namedEntry
	maybe   bitmap
	mask    uint32
}

// namedEntry is an entry of a directory, the one at pos, and the hash of its stem.
type namedEntry struct{ hash, dir, pos uint32 }

var nameSeed = maphash.MakeSeed()

func hashOf(stem string) uint32 { return uint32(maphash.String(nameSeed, stem)) }

// stemOf returns a name up to its first dot, but for one that begins it.
func stemOf(name string) string {
	if i := strings.IndexByte(name, '.'); i > 0 {
		return name[:i]
	}
	return name
}

func (n *names) index() {
	for dir, in := range n.layer.All() {
		for pos, e := range in.Entries {
			n.entries = append(n.entries, namedEntry{hashOf(stemOf(e.Name)), dir, uint32(pos)})
		}
	}
	n.entries = slices.Clip(n.entries)
	slices.SortFunc(n.entries, func(a, b namedEntry) int { return cmp.Compare(a.hash, b.hash) })
	size := 64
	for size < 8*len(n.entries) {
		size *= 2
	}
	n.maybe, n.mask = newBitmap(size), uint32(size-1)
	for _, e := range n.entries {
		n.maybe.set(int(e.hash & n.mask))
	}
}

// each calls found for every entry that has the stem.
func (n *names) each(stem string, found func(dir uint32, e layer.Entry)) {
	n.once.Do(n.index)
	hash := hashOf(stem)
	if !n.maybe.has(int(hash & n.mask)) {
		return
	}
	at, _ := slices.BinarySearchFunc(n.entries, hash, func(e namedEntry, hash uint32) int { return cmp.Compare(e.hash, hash) })
	for _, e := range n.entries[at:] {
		if e.hash != hash {
			return
		}
		if entry, _ := n.layer.Entry(e.dir, int(e.pos)); stemOf(entry.Name) == stem {
			found(e.dir, entry)
		}
	}
}

// nameOf returns the name of an entry of a directory.
func (f *Filler) nameOf(dir, inode uint32) string { return f.layer.NameIn(dir, inode) }

// pathOf returns the path of a directory, "" for the root.
func (f *Filler) pathOf(dir uint32) string {
	var parts []string
	for dir != layer.Root {
		top, ok := f.parents[dir]
		if !ok {
			break
		}
		parts = append(parts, f.nameOf(top, dir))
		dir = top
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}
