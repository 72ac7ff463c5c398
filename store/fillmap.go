package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// identity is what a map knows of its data file. Whatever changes the file changes the time of its last
// change, which can't be set from outside; a copy has another inode.
type identity struct {
	Inode uint64   `json:"inode"`
	Size  int64    `json:"size"`
	Ctime [2]int64 `json:"ctime"` // seconds, nanoseconds
	Mtime [2]int64 `json:"mtime"`
}

func identify(st *unix.Stat_t) identity {
	return identity{
		Inode: st.Ino, Size: st.Size,
		Ctime: [2]int64{int64(st.Ctim.Sec), int64(st.Ctim.Nsec)},
		Mtime: [2]int64{int64(st.Mtim.Sec), int64(st.Mtim.Nsec)},
	}
}

// fillMap is the content of the file "map".
type fillMap struct {
	// Generation counts the maps of a layer, for people who look at it.
	Generation uint64   `json:"generation"`
	Data       identity `json:"data"`
	// Table is the SHA-256 of the table of chunks, as tableSum has it.
	Table []byte `json:"table"`
	// Have are the chunks that are there, Maybe those that have to be verified first.
	Chunks int    `json:"chunks"`
	Have   []byte `json:"have"`
	Maybe  []byte `json:"maybe,omitempty"`
}

var errMap = errors.New("malformed map")

// decodeMap decodes a map of n chunks with that table into have and maybe.
func decodeMap(p []byte, table [sha256.Size]byte, n int, have, maybe bitmap) (fillMap, error) {
	var m fillMap
	d := json.NewDecoder(bytes.NewReader(p))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return m, fmt.Errorf("%w: %w", errMap, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return m, fmt.Errorf("%w: more than one value", errMap)
	}
	switch {
	case m.Chunks != n || !bytes.Equal(m.Table, table[:]):
		return m, errors.New("map is of another table of chunks")
	case !have.load(m.Have, n):
		return m, fmt.Errorf("%w: have: not a set of %d chunks", errMap, n)
	case len(m.Maybe) > 0 && !maybe.load(m.Maybe, n):
		return m, fmt.Errorf("%w: maybe: not a set of %d chunks", errMap, n)
	}
	for i := range have {
		if have[i].Load()&maybe[i].Load() != 0 {
			return m, fmt.Errorf("%w: a chunk both there and in doubt", errMap)
		}
	}
	return m, nil
}

// tableSum is the SHA-256 of the size of the data space and of place, size and digest of all chunks.
func tableSum(l *layer.Layer) (sum [sha256.Size]byte) {
	h := sha256.New()
	var b [16 + sha256.Size]byte
	binary.LittleEndian.PutUint64(b[:], uint64(l.DataSize))
	h.Write(b[:8])
	for i := range l.Chunks {
		c := &l.Chunks[i]
		binary.LittleEndian.PutUint64(b[:], uint64(c.Data))
		binary.LittleEndian.PutUint64(b[8:], uint64(c.Size))
		digest := l.Digest(i)
		copy(b[16:], digest[:])
		h.Write(b[:])
	}
	h.Sum(sum[:0])
	return sum
}

// padded returns where the padding behind chunk i ends: at the next multiple of layer.BlockSize if the file
// ends with the chunk, else at the end of the chunk.
func padded(l *layer.Layer, i int) int64 {
	end := l.Chunks[i].End()
	pad := min((end+layer.BlockSize-1)/layer.BlockSize*layer.BlockSize, l.DataSize)
	if i+1 < len(l.Chunks) && l.Chunks[i+1].Data < pad {
		return end
	}
	return pad
}

// checkTable refuses tables by which one chunk would overwrite another.
func checkTable(l *layer.Layer) error {
	var end int64
	for i := range l.Chunks {
		c := &l.Chunks[i]
		if c.Data < end || c.Size < 1 || c.Size > l.DataSize-c.Data {
			return fmt.Errorf("chunk %d: %d bytes at %d: not between the chunk before, which ends at %d, and the end, %d",
				i, c.Size, c.Data, end, l.DataSize)
		}
		if c.Data != end && c.Data%layer.BlockSize != 0 {
			return fmt.Errorf("chunk %d: begins a file at %d, which is no multiple of %d", i, c.Data, layer.BlockSize)
		}
		end = c.End()
	}
	if l.DataSize < 0 {
		return fmt.Errorf("a data space of %d bytes", l.DataSize)
	}
	return nil
}
