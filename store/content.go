package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// content is the data file of a bound layer, and what is known of it.
//
// A chunk is in have, in maybe, or in neither. It comes into maybe when the file is opened, or when it can't be synced.
type content struct {
	of    *Layer
	model *layer.Layer
	table [sha256.Size]byte

	have, maybe bitmap
	missing     atomic.Int64 // chunks not in have
	filled      atomic.Int64 // bytes of those in have
	done        chan struct{}
	finish      sync.Once // closes done, when a map has been written by which nothing is missing

	// one is held by whoever writes or verifies a chunk, by its index: verifying must not see half of what is
	// written, nor punch out what has just been.
	one [64]sync.Mutex

	// changes counts changes of data, have and maybe, after they are made.
	changes atomic.Int64

	// gate is held for reading by whoever uses file, so that under the write lock nobody does.
	gate  sync.RWMutex
	file  *os.File // nil when closed
	clean bool     // there is a map, and data is as it says

	inMemory atomic.Int64 // bytes that were written since they were last written back

	settled atomic.Int64 // changes that the last map knows of
	mapped  atomic.Bool  // there has been one

	settling   sync.Mutex
	generation uint64

	// Of the store's keeper alone.
	seen int64 // changes, at its last look
	told bool  // that settling fails
}

// openContent opens data, gives it the size of the data space, and finds out which chunks are there. What only costs
// trust is told, and no error.
func openContent(l *Layer, m *layer.Layer, table [sha256.Size]byte) (*content, error) {
	c := &content{of: l, model: m, table: table, done: make(chan struct{})}
	f, err := l.s.openData(l.DataPath())
	if err != nil {
		return nil, err
	}
	c.file = f
	var st unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("%s is not a regular file: %w", f.Name(), fs.ErrInvalid)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	if said, err := c.trust(&st); err != nil {
		if !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDamaged) {
			l.tell(fmt.Errorf("no chunk is trusted before it is verified: %w", err))
		}
		if err := c.distrust(st.Size, said); err != nil {
			f.Close()
			return nil, err
		}
	}
	c.missing.Store(int64(len(m.Chunks) - c.have.count()))
	for i := c.have.next(0, len(m.Chunks), true); i < len(m.Chunks); i = c.have.next(i+1, len(m.Chunks), true) {
		c.filled.Add(m.Chunks[i].Size)
	}
	if c.clean || len(m.Chunks) == 0 {
		c.finished()
	}
	return c, nil
}

// openData opens a data file, which is made if it isn't there.
func (s *Store) openData(path string) (*os.File, error) {
	flags := os.O_RDWR | unix.O_NOFOLLOW
	f, err := os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case !errors.Is(err, fs.ErrExist):
		return f, err
	case s.opt.OpenData != nil:
		return s.opt.OpenData(path)
	}
	return os.OpenFile(path, flags, 0)
}

// trust takes over the map, if it is of this data file as it is now. If that is a copy of the map's, it returns the chunks that the map speaks
// of.
func (c *content) trust(st *unix.Stat_t) (copied bitmap, err error) {
	n := len(c.model.Chunks)
	c.have, c.maybe = newBitmap(n), newBitmap(n)
	if c.of.s.opt.Distrust {
		return nil, errors.New("told to distrust maps")
	}
	p, err := readSealed(c.of.path(mapFile), c.of.label(mapFile))
	if err != nil {
		return nil, err
	}
	m, err := decodeMap(p, c.table, n, c.have, c.maybe)
	if err != nil {
		return nil, err
	}
	c.generation = m.Generation
	if is := c.of.s.identify(st); m.Data != is || is.Size != c.model.DataSize {
		if m.Data.Inode != is.Inode {
			copied = newBitmap(n)
			for i := range copied {
				copied[i].Store(c.have[i].Load() | c.maybe[i].Load())
			}
		}
		return copied, fmt.Errorf("data has changed since its map was written: was %+v, is %+v", m.Data, is)
	}
	c.clean = true
	c.mapped.Store(true)
	return nil, nil
}

// distrust drops the map, gives data its size, and puts into maybe what it may hold. Of a copy, only what was there when it was made, if that
// is known: programs that know no holes put zeros where there were some, of which each chunk would be read, compared, and found missing when
// a step waits for it.
func (c *content) distrust(size int64, copied bitmap) error {
	n := len(c.model.Chunks)
	c.have, c.maybe = newBitmap(n), newBitmap(n)
	if err := os.Remove(c.of.path(mapFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if size != c.model.DataSize {
		if err := c.file.Truncate(c.model.DataSize); err != nil {
			return err
		}
	}
	c.forget()
	chunks := c.model.Chunks
	i, fd := 0, int(c.file.Fd())
	for off := int64(0); i < n; {
		start, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // holes up to the end
		}
		end := c.model.DataSize
		if err == nil {
			end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
		}
		if err != nil { // a filesystem that can't tell, or a bad disk: reading shows
			start, end = off, c.model.DataSize
		}
		for ; i < n && padded(c.model, i) <= start; i++ {
			continue
		}
		for ; i < n && chunks[i].Data < end; i++ {
			c.maybe.add(i)
		}
		off = end
	}
	if copied == nil {
		return nil
	}
	for i := copied.next(0, n, false); i < n; i = copied.next(i, n, false) {
		end := copied.next(i, n, true)
		start := chunks[i].Data
		if unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, start, padded(c.model, end-1)-start) == nil {
			for ; i < end; i++ {
				c.maybe.remove(i)
			}
		}
		i = end
	}
	return nil
}

func (c *content) wrap(verb string, i int, err error) error {
	return fmt.Errorf("%s chunk %d of layer %s in %s: %w", verb, i, c.of.key, c.of.s.root, cause(err))
}

// change locks the gate for reading, for a change of data: no map says any more that nothing changes.
func (c *content) change() error {
	for {
		c.gate.RLock()
		if c.file == nil {
			c.gate.RUnlock()
			return ErrClosed
		}
		if !c.clean {
			return nil
		}
		c.gate.RUnlock()

		c.gate.Lock()
		if c.clean {
			// If the machine stops now, the map may come back. What it says is true nevertheless.
			if err := os.Remove(c.of.path(mapFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				c.gate.Unlock()
				return err
			}
			c.clean = false
		}
		c.gate.Unlock()
	}
}

func (c *content) write(v layer.Verified) error {
	i := v.Chunk()
	if !v.Of(c.model) {
		return c.wrap("write", i, fmt.Errorf("verified as one of another layer: %w", fs.ErrInvalid))
	}
	if c.have.has(i) {
		return nil
	}
	chunk := &c.model.Chunks[i]
	one := &c.one[i%len(c.one)]
	one.Lock()
	defer one.Unlock()
	if c.have.has(i) {
		return nil
	}
	if err := c.change(); err != nil {
		return c.wrap("write", i, err)
	}
	defer c.gate.RUnlock()
	defer c.changes.Add(1) // also what is written half
	if c.maybe.has(i) {
		if err := c.clear(chunk.End(), padded(c.model, i)); err != nil {
			return c.wrap("clear the padding of", i, err)
		}
	}
	if _, err := c.file.WriteAt(v.Bytes(), chunk.Data); err != nil {
		return c.wrap("write", i, err)
	}
	c.arrived(i)
	c.wrote(chunk.Size)
	return nil
}

// arrived takes note of a chunk that is there. Under the chunk's lock.
func (c *content) arrived(i int) {
	c.have.add(i)
	c.maybe.remove(i)
	c.filled.Add(c.model.Chunks[i].Size)
	c.of.s.grow(c.model.Chunks[i].Size)
	c.missing.Add(-1)
}

// finished tells who waits that all chunks are there, if they are. By who knows that they have been synced.
func (c *content) finished() {
	if c.missing.Load() == 0 {
		c.finish.Do(func() { close(c.done) })
	}
}

// clear makes the bytes from off up to end a hole, or zeros where there can't be one.
func (c *content) clear(off, end int64) error {
	if off == end {
		return nil
	}
	if unix.Fallocate(int(c.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, end-off) == nil {
		return nil
	}
	zeros := make([]byte, min(end-off, 1<<20))
	for off < end {
		n, err := c.file.WriteAt(zeros[:min(end-off, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// verify reports whether chunk i is there, after reading what may be the chunk.
func (c *content) verify(i int) bool {
	if i < 0 || i >= len(c.model.Chunks) {
		return false
	}
	if c.have.has(i) || !c.maybe.has(i) {
		return c.have.has(i)
	}
	one := &c.one[i%len(c.one)]
	one.Lock()
	defer one.Unlock()
	if c.have.has(i) || !c.maybe.has(i) {
		return c.have.has(i)
	}
	c.gate.RLock()
	if c.file == nil {
		c.gate.RUnlock()
		return false
	}
	right, err := c.right(i)
	if right {
		c.arrived(i)
		c.changes.Add(1)
	}
	c.gate.RUnlock()
	if right || err != nil { // what can't be read is missing; maybe stays, for the padding's sake
		if err != nil {
			c.of.tell(c.wrap("verify", i, err))
		}
		return right
	}
	if err := c.change(); err != nil {
		c.of.tell(c.wrap("drop", i, err))
		return false
	}
	defer c.gate.RUnlock()
	defer c.changes.Add(1)
	if err := c.clear(c.model.Chunks[i].Data, padded(c.model, i)); err != nil {
		c.of.tell(c.wrap("drop", i, err))
		return false
	}
	c.maybe.remove(i)
	return false
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// right reports whether chunk i is in data, with nothing behind it in its last block.
func (c *content) right(i int) (bool, error) {
	chunk := &c.model.Chunks[i]
	buf, _ := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	err := c.model.CheckChunk(i, io.NewSectionReader(c.file, chunk.Data, chunk.Size), *buf)
	if _, ok := errors.AsType[*layer.DigestError](err); ok {
		return false, nil
	} else if err != nil {
		return false, err
	}
	pad := (*buf)[:padded(c.model, i)-chunk.End()]
	if _, err := c.file.ReadAt(pad, chunk.End()); err != nil {
		return false, err
	}
	return len(bytes.TrimLeft(pad, "\x00")) == 0, nil
}

func (c *content) readAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("store: read at %d: %w", off, fs.ErrInvalid)
	}
	want, eof := int64(len(p)), error(nil)
	if off+want > c.model.DataSize {
		want, eof = max(c.model.DataSize-off, 0), io.EOF
	}
	if want == 0 {
		return 0, eof
	}
	first, end := c.model.ChunksOf(off, want)
	if first > 0 && padded(c.model, first-1) > off {
		first-- // whose padding it is
	}
	for i := c.have.next(first, end, false); i < end; i = c.have.next(i+1, end, false) {
		if !c.verify(i) {
			want, eof = max(c.model.Chunks[i].Data-off, 0), c.wrap("read", i, ErrMissing)
			break
		}
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	if c.file == nil {
		return 0, ErrClosed
	}
	n, err := c.file.ReadAt(p[:want], off)
	if err != nil {
		return n, fmt.Errorf("read layer %s in %s: %w", c.of.key, c.of.s.root, cause(err))
	}
	return n, eof
}

// settle writes the map, after data, unless there is nothing new or data is being written to.
func (c *content) settle() error {
	c.settling.Lock()
	defer c.settling.Unlock()
	n := c.changes.Load()
	if c.file == nil || n == c.settled.Load() && c.mapped.Load() {
		return nil
	}
	// All that n counts was written before, and so is what is in have now.
	m := fillMap{
		Generation: c.generation + 1, Table: c.table[:], Chunks: len(c.model.Chunks),
		Have: c.have.bytes(), Maybe: c.maybe.bytes(),
	}
	if err := c.of.s.sync(c.file); err != nil {
		c.doubt()
		return fmt.Errorf("sync data, whose chunks are verified once more before they are used: %w", cause(err))
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(c.file.Fd()), &st); err != nil {
		return err
	}
	m.Data = c.of.s.identify(&st)
	tmp, err := createSealed(c.of.s.tmp(), c.of.label(mapFile), true, jsonWriter(m))
	if err != nil {
		return fmt.Errorf("write map: %w", cause(err))
	}
	c.gate.Lock()
	if c.changes.Load() != n {
		c.gate.Unlock()
		os.Remove(tmp)
		return nil // the next time
	}
	if err := os.Rename(tmp, c.of.path(mapFile)); err != nil {
		c.gate.Unlock()
		os.Remove(tmp)
		return fmt.Errorf("write map: %w", err)
	}
	c.clean, c.generation = true, m.Generation
	c.mapped.Store(true)
	c.settled.Store(n)
	c.finished()
	c.gate.Unlock()
	return syncFile(c.of.dir)
}

// doubt takes back that chunks are there, since data couldn't be synced. What Linux couldn't write it keeps as if it had, and says so only once:
// readers would get the right bytes until it needs the memory, and from then on what the disk has.
func (c *content) doubt() {
	c.gate.Lock()
	defer c.gate.Unlock()
	if c.file == nil {
		return
	}
	c.forget()
	for i := range c.have {
		c.maybe[i].Or(c.have[i].Swap(0))
	}
	c.missing.Store(int64(len(c.model.Chunks)))
	c.of.s.grow(-c.filled.Swap(0))
	c.changes.Add(1)
}

// forget has what was written back to data read from the disk: a page may be there that never was.
func (c *content) forget() {
	_ = unix.Fadvise(int(c.file.Fd()), 0, 0, unix.FADV_DONTNEED) // of what stays, an fsync says so if it can't be written
}

// unsettled reports whether the last map doesn't know of all changes.
func (c *content) unsettled() bool { return c.changes.Load() != c.settled.Load() }

// close closes data, once nobody uses it.
func (c *content) close() error {
	c.settling.Lock()
	defer c.settling.Unlock()
	c.gate.Lock()
	defer c.gate.Unlock()
	if c.file == nil {
		return nil
	}
	err := c.file.Close()
	c.file = nil
	return err
}
