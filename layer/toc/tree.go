package toc

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math"
	"math/bits"
	"sync"
	"unicode/utf8"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A tree feeds a Builder with the entries of a TOC.
type tree struct {
	builder   *layer.Builder
	landmarks bool
	prefetch  int64

	// The regular file that chunks belong to, if there has been one.
	inFile bool
	name   string
	size   int64
	hidden bool
}

// read reads the JSON of a TOC: {"version": 1, "entries": [...]}.
func (t *tree) read(r io.Reader) error {
	w := &window{r: r}
	version, seen := int64(1), false
	if err := w.value(func(c *cursor) error { return c.expect('{') }); err != nil {
		return fmt.Errorf("%w: %w", Err, err)
	}
	for first := true; ; first = false {
		var key string
		more := false
		err := w.value(func(c *cursor) (err error) {
			var k []byte
			k, more, err = c.key(first)
			key = string(k)
			return err
		})
		if err == nil && !more {
			break
		}
		switch {
		case err != nil:
		case key == "version":
			err = w.value(func(c *cursor) (err error) {
				version, err = c.int()
				return err
			})
		case key == "entries" && seen:
			err = fmt.Errorf("byte %d: entries, for a second time", w.base+int64(w.i))
		case key == "entries":
			seen = true
			if err = t.entries(w); err != nil {
				return err
			}
		default:
			err = w.value(func(c *cursor) error { return c.skip(0) })
		}
		if err != nil {
			return fmt.Errorf("%w: %w", Err, err)
		}
	}
	if err := w.end(); err != nil {
		return fmt.Errorf("%w: %w", Err, err)
	}
	if version != 1 {
		return fmt.Errorf("%w: version %d, want 1", Err, version)
	}
	return nil
}

func (t *tree) entries(w *window) error {
	null := false
	err := w.value(func(c *cursor) (err error) {
		if null, err = c.null(); null || err != nil {
			return err
		}
		return c.expect('[')
	})
	var e entry
	for first := true; err == nil && !null; first = false {
		more := false
		err = w.value(func(c *cursor) (err error) {
			if more, err = c.more(first, ']'); !more || err != nil {
				return err
			}
			return e.parse(c)
		})
		if err != nil || !more {
			break
		}
		if err := t.add(&e); err != nil {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", Err, err)
	}
	return nil
}

func (t *tree) add(e *entry) error {
	if e.kind == chunk {
		if !t.inFile {
			return fmt.Errorf("%w: chunk before any file", Err)
		}
		return t.chunk(e)
	}
	name := string(e.name)
	if lossy(e.name) || lossy(e.linkName) {
		return &layer.EntryError{Name: name, Err: ErrLossy}
	}
	in, err := e.inode()
	if err != nil {
		return &layer.EntryError{Name: name, Err: err}
	}
	t.inFile, t.hidden = e.kind == reg, false
	switch e.kind {
	case hardlink:
		return t.builder.Link(name, string(e.linkName), in)
	case reg:
		t.name, t.size = name, e.size
		if t.hidden = t.landmarks && t.landmark(e); !t.hidden {
			if err := t.builder.Add(name, in); err != nil {
				return err
			}
		}
		if e.size == 0 {
			return nil
		}
		return t.chunk(e)
	}
	return t.builder.Add(name, in)
}

// landmark reports whether a file isn't to be seen, after it has taken note of what it means.
func (t *tree) landmark(e *entry) bool {
	switch string(bytes.TrimLeft(bytes.TrimPrefix(e.name, []byte("./")), "/")) {
	case PrefetchLandmark:
		t.prefetch = e.offset
	case NoPrefetchLandmark:
		t.prefetch = 0
	case Name:
	default:
		return false
	}
	return true
}

// chunk adds the chunk that an entry has, be it the first of a file or another.
func (t *tree) chunk(e *entry) error {
	if err := t.builder.Frame(e.offset); err != nil || t.hidden {
		return err
	}
	size := e.chunkSize
	if size == 0 {
		size = t.size - e.chunkOffset // up to the end; Chunk looks whether that makes sense
	}
	sum := e.chunkDigest
	if !sum.ok && size == t.size {
		sum = e.digest
	}
	if e.zeros && (!sum.ok || size > layer.MaxChunkSize) {
		return t.zeros(e, size)
	}
	if !sum.ok {
		return &layer.EntryError{Name: t.name, Err: fmt.Errorf("chunk at %d: %w", e.chunkOffset, ErrUnverifiable)}
	}
	return t.builder.Chunk(e.chunkOffset, size, e.innerOffset, sum.sum)
}

// zeros adds a chunk of zeros of any size, in pieces whose digests are known.
func (t *tree) zeros(e *entry, size int64) error {
	off, inner := e.chunkOffset, e.innerOffset
	if size <= 0 {
		return t.builder.Chunk(off, size, inner, hash{}.sum) // which says what is wrong with it
	}
	for size > 0 {
		piece := min(bits.Len64(uint64(size)), len(zeroSums())) - 1
		n := int64(1) << piece
		if err := t.builder.Chunk(off, n, inner, zeroSums()[piece]); err != nil {
			return err
		}
		off, inner, size = off+n, inner+n, size-n
	}
	return nil
}

// zeroSums are the digests of 1, 2, 4, 8 … zeros, up to 16 MiB.
var zeroSums = sync.OnceValue(func() (sums [25][sha256.Size]byte) {
	h, buf := sha256.New(), make([]byte, 64<<10)
	for i := range sums {
		h.Reset()
		for left := 1 << i; left > 0; left -= len(buf) {
			h.Write(buf[:min(left, len(buf))])
		}
		h.Sum(sums[i][:0])
	}
	return sums
})

// lossy reports whether a name isn't UTF-8, or was made so by a writer that puts U+FFFD for what isn't, as
// encoding/json does.
func lossy(name []byte) bool {
	return !utf8.Valid(name) || bytes.Contains(name, []byte("\uFFFD"))
}

// inode returns what the entry says about its inode. A hardlink's has no type.
func (e *entry) inode() (layer.Inode, error) {
	for _, id := range []int64{e.uid, e.gid, e.devMajor, e.devMinor} {
		// The last one is nobody's: chown(2) takes it for "as it is", and nothing can be done to a file that has it.
		if id < 0 || id >= math.MaxUint32 {
			return layer.Inode{}, fmt.Errorf("%w: %d", layer.ErrAttr, id)
		}
	}
	in := layer.Inode{
		Mode: uint32(e.mode) & 0o7777, UID: uint32(e.uid), GID: uint32(e.gid),
		Mtime: e.mtime, MtimeNsec: e.mtimeNsec,
		Major: uint32(e.devMajor), Minor: uint32(e.devMinor),
		Xattrs: e.xattrs,
	}
	switch e.kind {
	case hardlink:
		return in, nil
	case 0:
		return in, fmt.Errorf("%w: no type", layer.ErrAttr)
	case reg:
		in.Size = e.size
	case symlink:
		in.Target = string(e.linkName)
	}
	in.Mode |= uint32(e.kind)
	return in, nil
}
