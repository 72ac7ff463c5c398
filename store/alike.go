package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// maxCompared is how many layers one is compared with.
const maxCompared = 64

// Alike is a layer that has chunks which another one is missing.
type Alike struct {
	Key Key
	// Chunks are those that it has, by their indices in the other layer's model. Only the beginnings of their digests have been
	// compared: one in thousands may be another chunk.
	Chunks []uint32
	// Data is how many bytes of it are on the disk.
	Data int64
}

// Alike returns layers which nobody holds and which have chunks that this one, which is bound, is missing, if that can be so many bytes at least. None of
// them is opened: what is read is the order of their digests, 8 bytes a chunk, and their maps, of no more than the 64 that were used last. Without
// a map, as after an unclean stop, all chunks are taken for being there. This layer keeps its own order, for others to be compared with it later on.
func (l *Layer) Alike(least int64) []Alike {
	c := l.content.Load()
	if c == nil {
		return nil
	}
	order := c.model.Order()
	if c.model.Err() != nil {
		return nil
	}
	if _, err := os.Lstat(l.path(orderFile)); errors.Is(err, fs.ErrNotExist) {
		err := l.write(orderFile, l.label(orderFile), func(f *os.File) error { return binary.Write(f, binary.LittleEndian, order) })
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // else it has been removed
			l.tell(fmt.Errorf("no other layer will be compared with it: %w", err))
		}
	}
	var size int64
	missing := slices.DeleteFunc(order, func(k uint64) bool {
		i := int(uint32(k))
		if c.have.has(i) || c.maybe.has(i) {
			return true
		}
		size += c.model.Chunks[i].Size
		return false
	})
	if size < least {
		return nil
	}
	var alike []Alike
	for _, o := range l.s.unheld(maxCompared) {
		var st unix.Stat_t
		if unix.Lstat(o.DataPath(), &st) != nil || st.Blocks*512 < least {
			continue
		}
		theirs, err := o.read(orderFile)
		if err != nil {
			continue // it is from before there was such a file, it is being removed, or what is wrong with it was told
		}
		if common := inCommon(missing, theirs, o.mapped()); len(common) > 0 {
			alike = append(alike, Alike{o.key, common, st.Blocks * 512})
		}
	}
	return alike
}

// inCommon returns the chunks of an order that another one has too, where it's there.
func inCommon(mine []uint64, theirs []byte, there func(chunk int) bool) (common []uint32) {
	for i, k := 0, 0; i < len(mine) && k+8 <= len(theirs); {
		other := binary.LittleEndian.Uint64(theirs[k:])
		switch a, b := mine[i]>>32, other>>32; {
		case a < b:
			i++
		case a > b || !there(int(uint32(other))):
			k += 8
		default:
			common = append(common, uint32(mine[i]))
			i++
		}
	}
	return common
}

// mapped returns a function that reports whether a chunk may be there, as the map has it.
func (l *Layer) mapped() func(chunk int) bool {
	p, err := readSealed(l.path(mapFile), l.label(mapFile))
	var m fillMap
	if err != nil || json.Unmarshal(p, &m) != nil {
		return func(int) bool { return true }
	}
	in := func(set []byte, chunk int) bool { return chunk/8 < len(set) && set[chunk/8]&(1<<(chunk%8)) != 0 }
	return func(chunk int) bool { return in(m.Have, chunk) || in(m.Maybe, chunk) }
}

// unheld returns the layers that nobody holds, no more than n, most recently used first.
func (s *Store) unheld(n int) []*Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var layers []*Layer
	for _, l := range s.layers {
		if l.refs == 0 {
			layers = append(layers, l)
		}
	}
	slices.SortFunc(layers, func(a, b *Layer) int { return b.used.Compare(a.used) })
	return layers[:min(n, len(layers))]
}
