package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Files of a layer's directory.
const (
	layerFile  = "layer"
	tocFile    = "toc"
	originFile = "origin"
	imageFile  = "image"
	dataFile   = "data"
	mapFile    = "map"
	orderFile  = "order"
)

// A Layer is what the store has of one layer. Whoever got it from [Store.Acquire] or [Store.Create] holds it, and
// calls Release once.
type Layer struct {
	s   *Store
	key Key
	dir string

	// Guarded by s.mu.
	refs int
	lent int
	used time.Time

	binding sync.Mutex // of content, when it's made and dropped
	content atomic.Pointer[content]
	removed bool        // there will be no content any more; guarded by binding
	fresh   atomic.Bool // small files that may not be on the disk
}

// header is the content of the file "layer".
type header struct {
	Version int `json:"version"`
	Key
}

const headerVersion = 1

func jsonWriter(v any) func(*os.File) error {
	return func(f *os.File) error { return json.NewEncoder(f).Encode(v) }
}

func (l *Layer) path(name string) string { return filepath.Join(l.dir, name) }

// label is what the seal of a file covers besides its content.
func (l *Layer) label(name string) string { return l.key.label(name) }

func (k Key) label(name string) string { return fmt.Sprintf("%s %s %s", name, k.Blob, k.TOC) }

func (l *Layer) tell(err error) {
	if l.s.opt.Notice != nil {
		l.s.opt.Notice(l.key, err)
	}
}

// Key returns what the layer is known by.
func (l *Layer) Key() Key { return l.key }

// DataPath returns the path of the data file, which Bind makes. Nobody but the store writes to it.
func (l *Layer) DataPath() string { return l.path(dataFile) }

// read returns the content of a sealed file, and drops it if it's damaged.
func (l *Layer) read(name string) ([]byte, error) {
	p, err := readSealed(l.path(name), l.label(name))
	return p, l.dropped(name, err)
}

// dropped removes a file that is damaged.
func (l *Layer) dropped(name string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrDamaged) {
		l.tell(fmt.Errorf("dropped %s: %w", name, err))
		os.Remove(l.path(name))
	}
	return fmt.Errorf("%s of layer %s in %s: %w", name, l.key, l.s.root, err)
}

func (l *Layer) write(name, label string, write func(*os.File) error) error {
	if err := replaceSealed(l.s.tmp(), l.path(name), label, false, write); err != nil {
		return fmt.Errorf("write %s of layer %s in %s: %w", name, l.key, l.s.root, cause(err))
	}
	l.fresh.Store(true)
	return nil
}

// TOC returns the table of contents as Create got it. If it was damaged, the error is ErrDamaged, and Create with a
// new one mends that; what has arrived of the layer isn't lost.
func (l *Layer) TOC() ([]byte, error) { return l.read(tocFile) }

// Origin returns what SetOrigin was last given. The error is an fs.ErrNotExist if there is nothing.
func (l *Layer) Origin() ([]byte, error) { return l.read(originFile) }

// SetOrigin keeps where the blob can be had, in whatever form, in place of what was there.
func (l *Layer) SetOrigin(p []byte) error {
	return l.write(originFile, l.label(originFile), func(f *os.File) error {
		_, err := f.Write(p)
		return err
	})
}

func (l *Layer) imageLabel(version string) (string, error) {
	c := l.content.Load()
	if c == nil {
		return "", fmt.Errorf("image of layer %s: %w", l.key, ErrUnbound)
	}
	return fmt.Sprintf("%s %s %x", l.label(imageFile), version, c.table), nil
}

// Image returns the path of the metadata image. A line of the store's follows the image in that file, after the bytes
// that were written; the kernel doesn't look there. The image must be of the same version, a name for the program
// that makes images, and of the bound table of chunks: else the error is an fs.ErrNotExist, and WriteImage makes
// another. All of it is read, for its checksum.
func (l *Layer) Image(version string) (path string, err error) {
	label, err := l.imageLabel(version)
	if err != nil {
		return "", err
	}
	f, _, err := openSealed(l.path(imageFile), label)
	if err != nil {
		return "", l.dropped(imageFile, err)
	}
	return f.Name(), f.Close()
}

// WriteImage keeps the image that write writes to an empty file, and returns its path. An image that was
// there before stays what it is to those who have it open or mounted.
func (l *Layer) WriteImage(version string, write func(*os.File) error) (path string, err error) {
	label, err := l.imageLabel(version)
	if err != nil {
		return "", err
	}
	return l.path(imageFile), l.write(imageFile, label, write)
}

// Bind opens the layer's data. m is what the TOC parses to; what is returned is the same, packed in a file of the store's, and
// stays in memory as long as the layer is held, and a little longer. If the layer is bound already, m must have the same chunks, and
// the model in use is returned, so that there is one. A fanotify mark on the data file comes after it, or [Options].OpenData is set: see the package's
// doc.
func (l *Layer) Bind(m *layer.Layer) (_ *layer.Layer, err error) {
	table := tableSum(m)
	l.binding.Lock()
	defer l.binding.Unlock()
	if c := l.content.Load(); c != nil {
		if c.table != table {
			return nil, fmt.Errorf("layer %s: bound to another table of chunks: %w", l.key, fs.ErrInvalid)
		}
		return c.model, nil
	}
	if l.removed {
		return nil, fmt.Errorf("layer %s was removed from %s: %w", l.key, l.s.root, fs.ErrNotExist)
	}
	if err := checkTable(m); err != nil {
		return nil, fmt.Errorf("layer %s: %w: %w", l.key, fs.ErrInvalid, err)
	}
	if l.s.isClosed() {
		return nil, ErrClosed
	}
	if m, err = l.s.pack(m); err != nil {
		return nil, fmt.Errorf("layer %s in %s: %w", l.key, l.s.root, cause(err))
	}
	c, err := openContent(l, m, table)
	if err != nil {
		return nil, fmt.Errorf("open data of layer %s in %s: %w", l.key, l.s.root, cause(err))
	}
	l.content.Store(c)
	return m, nil
}

// pack moves what is seldom needed of a layer into a file that has no name, and ends with the process at the latest.
func (s *Store) pack(m *layer.Layer) (*layer.Layer, error) {
	f, err := os.CreateTemp(s.tmp(), "tree-")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return nil, err
	}
	return m.Pack(f)
}

// Model returns what the layer is bound to, nil if it isn't.
func (l *Layer) Model() *layer.Layer {
	if c := l.content.Load(); c != nil {
		return c.model
	}
	return nil
}

// File returns the descriptor of the data file, for splicing what is there. Nobody but the store closes it, or writes
// to it. It is nil if the layer isn't bound.
func (l *Layer) File() *os.File {
	c := l.content.Load()
	if c == nil {
		return nil
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	return c.file
}

// Have reports whether a chunk, by its index in Model().Chunks, is known to be there. It is one atomic load.
func (l *Layer) Have(chunk int) bool {
	c := l.content.Load()
	return c != nil && uint(chunk) < uint(len(c.model.Chunks)) && c.have.has(chunk)
}

// Verify reports whether a chunk is there, after having read and hashed it if an unclean stop left that in doubt.
// Without doubt it is as quick as Have. A chunk that can't be read is missing.
func (l *Layer) Verify(chunk int) bool {
	c := l.content.Load()
	return c != nil && c.verify(chunk)
}

// Doubtful iterates over the chunks that Verify would have to read.
func (l *Layer) Doubtful() iter.Seq[int] {
	return func(yield func(int) bool) {
		c := l.content.Load()
		if c == nil {
			return
		}
		n := len(c.model.Chunks)
		for i := c.maybe.next(0, n, true); i < n; i = c.maybe.next(i+1, n, true) {
			if !c.have.has(i) && !yield(i) {
				return
			}
		}
	}
}

// Missing iterates over the runs of chunks, from the first up to end, for which Have is false: those from i up to j,
// for each i and j.
func (l *Layer) Missing(first, end int) iter.Seq2[int, int] {
	return func(yield func(i, j int) bool) {
		c := l.content.Load()
		if c == nil {
			return
		}
		first, end := max(first, 0), min(end, len(c.model.Chunks))
		for i := c.have.next(first, end, false); i < end; {
			j := c.have.next(i, end, true)
			if !yield(i, j) {
				return
			}
			i = c.have.next(j, end, false)
		}
	}
}

// WriteChunk writes a chunk of Model(), if it isn't there. Its bytes have been verified, which their type proves, and aren't hashed
// again; they are the caller's again when it returns. A chunk of another model, also of an equal one, is an fs.ErrInvalid and isn't
// written. On any other error the chunk may have been written in part, and is missing.
func (l *Layer) WriteChunk(v layer.Verified) error {
	c := l.content.Load()
	if c == nil {
		return fmt.Errorf("write chunk %d of layer %s: %w", v.Chunk(), l.key, ErrUnbound)
	}
	return c.write(v)
}

// ReadAt reads from the data space. If bytes haven't arrived, it returns those in front of them and an ErrMissing.
// What is in doubt is verified.
func (l *Layer) ReadAt(p []byte, off int64) (int, error) {
	c := l.content.Load()
	if c == nil {
		return 0, fmt.Errorf("read layer %s: %w", l.key, ErrUnbound)
	}
	return c.readAt(p, off)
}

var _ io.ReaderAt = (*Layer)(nil)

// Complete reports whether all chunks are known to be there.
func (l *Layer) Complete() bool {
	c := l.content.Load()
	return c != nil && c.missing.Load() == 0
}

// Done returns a channel that is closed when all chunks are known to be there and have been synced, and stays closed: what is there isn't lost any more by a
// disk that doesn't take it. It is nil, on which nobody ever receives, if the layer isn't bound.
func (l *Layer) Done() <-chan struct{} {
	if c := l.content.Load(); c != nil {
		return c.done
	}
	return nil
}

// Filled returns the bytes of the chunks that are known to be there, without padding: how far the layer has come.
// What it takes on the disk is in Usage.
func (l *Layer) Filled() int64 {
	if c := l.content.Load(); c != nil {
		return c.filled.Load()
	}
	return 0
}

// Usage returns the bytes that the layer's files occupy: allocated blocks, as du counts them.
func (l *Layer) Usage() int64 {
	var n int64
	for _, name := range []string{layerFile, tocFile, originFile, imageFile, dataFile, mapFile, orderFile} {
		var st unix.Stat_t
		if unix.Lstat(l.path(name), &st) == nil {
			n += st.Blocks * 512
		}
	}
	return n
}

// Settle makes durable what is known, as the store does by itself when the layer has been quiet: small files and data
// are synced and the map is written, unless a chunk arrives at the same time.
func (l *Layer) Settle() error {
	err := l.settleFiles()
	if c := l.content.Load(); c != nil {
		err = errors.Join(err, c.settle())
	}
	if err != nil {
		return fmt.Errorf("settle layer %s in %s: %w", l.key, l.s.root, err)
	}
	return nil
}

func (l *Layer) settleFiles() error {
	if !l.fresh.Swap(false) {
		return nil
	}
	for _, name := range []string{layerFile, tocFile, originFile, imageFile, orderFile} {
		if err := syncFile(l.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			l.fresh.Store(true)
			return err
		}
	}
	return errors.Join(syncFile(l.dir), syncFile(filepath.Dir(l.dir)))
}

// Release ends the caller's hold. It panics if nobody holds the layer.
func (l *Layer) Release() { l.s.release(l) }

// Return ends what [Store.Borrow] has begun. It panics if nobody has borrowed the layer.
func (l *Layer) Return() { l.s.takeBack(l) }
