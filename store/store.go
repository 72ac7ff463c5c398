package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Options tune a Store. The zero value works.
type Options struct {
	// MaxSize is how many bytes of disk all layers may take, as Usage counts them. Above it, layers that nobody holds
	// are removed, least recently used first; those held may take more. 0 means no limit.
	MaxSize int64
	// Quiet is for how long no chunk must have arrived before a layer's map is written. 0 means 5 seconds.
	Quiet time.Duration
	// Distrust has every chunk verified on first use, as if the last process had been killed.
	Distrust bool
	// OpenData, if not nil, opens a data file for reading and writing by a descriptor that raises no pre-content
	// events even if there is a mark: see the package's doc. Package mount/erofs has one.
	OpenData func(path string) (*os.File, error)
	// Notice, if not nil, is told of what the store has mended or couldn't do in the background. Called
	// concurrently; it must not call the store.
	Notice func(Key, error)
}

const (
	defaultQuiet = 5 * time.Second

	lockFile  = "lock"
	layersDir = "layers"
	tmpDir    = "tmp" // what isn't a layer yet, or any more

	// minSlack is how many bytes arrive, at least, between two looks at the size of the store.
	minSlack = 16 << 20
	// closers is how many layers are synced at a time by Close.
	closers = 4
)

// Store is a root directory with layers. Make it with [Open].
type Store struct {
	root string
	opt  Options
	lock *flock.Flock

	mu     sync.Mutex
	layers map[Key]*Layer // all that are on disk
	closed bool

	writeBack chan *content

	slack atomic.Int64 // bytes that may arrive before the size has to be looked at
	look  chan struct{}
	stop  chan struct{}
	kept  sync.WaitGroup

	closing  sync.Once
	closeErr error

	// Tests replace them.
	identify func(*unix.Stat_t) identity
	sync     func(data *os.File) error
}

// Open opens the store in the directory root, which is made if it isn't there, and closed to other users. If another
// process has it, the error is ErrLocked.
func Open(root string, opt Options) (*Store, error) {
	if opt.Quiet <= 0 {
		opt.Quiet = defaultQuiet
	}
	s := &Store{
		root: root, opt: opt, layers: map[Key]*Layer{},
		writeBack: make(chan *content, writeBacks), look: make(chan struct{}, 1), stop: make(chan struct{}), identify: identify, sync: (*os.File).Sync,
	}
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("open store %s: %w", root, err)
	}
	s.kept.Go(s.keep)
	s.kept.Go(s.keepWritingBack)
	s.lookNow()
	return s, nil
}

func (s *Store) open() (err error) {
	if err := os.MkdirAll(s.root, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(s.root, 0o700); err != nil {
		return err
	}
	path := filepath.Join(s.root, lockFile)
	s.lock = flock.New(path, flock.SetPermissions(0o600), flock.SetFlag(os.O_CREATE|os.O_RDWR))
	switch locked, err := s.lock.TryLock(); {
	case err != nil:
		return err
	case !locked:
		if pid, err := os.ReadFile(path); err == nil && len(pid) > 0 {
			return fmt.Errorf("%w (%s)", ErrLocked, strings.TrimSpace(string(pid)))
		}
		return ErrLocked
	}
	defer func() {
		if err != nil {
			s.lock.Unlock() //nolint:errcheck // the error in hand says more
		}
	}()
	if err := os.WriteFile(path, []byte("pid "+strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		return cause(err)
	}
	if err := os.RemoveAll(s.tmp()); err != nil {
		return err
	}
	for _, name := range []string{tmpDir, layersDir} {
		if err := os.Mkdir(filepath.Join(s.root, name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return s.scan()
}

// scan finds the layers, and removes what isn't one.
func (s *Store) scan() error {
	names, err := os.ReadDir(filepath.Join(s.root, layersDir))
	if err != nil {
		return err
	}
	for _, name := range names {
		dir := filepath.Join(s.root, layersDir, name.Name())
		l, err := s.found(dir)
		if err == nil {
			other, ok := s.layers[l.key]
			if !ok {
				s.layers[l.key] = l
				continue
			}
			if other.used.Before(l.used) {
				s.layers[l.key], dir = l, other.dir
			}
			err = errors.New("a copy of a layer that was used later")
		}
		if s.opt.Notice != nil {
			s.opt.Notice(Key{}, fmt.Errorf("removed %s: %w", dir, err))
		}
		if err := s.discard(dir); err != nil {
			return err
		}
	}
	return nil
}

// found returns the layer in a directory.
func (s *Store) found(dir string) (*Layer, error) {
	path := filepath.Join(dir, layerFile)
	p, err := readSealed(path, layerFile)
	if err != nil {
		return nil, err
	}
	var h header
	if err := json.Unmarshal(p, &h); err != nil {
		return nil, err
	}
	if h.Version != headerVersion {
		return nil, fmt.Errorf("version %d, not %d", h.Version, headerVersion)
	}
	if err := h.validate(); err != nil {
		return nil, err
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return &Layer{s: s, key: h.Key, dir: dir, used: fi.ModTime()}, nil
}

func (s *Store) tmp() string { return filepath.Join(s.root, tmpDir) }

// discard removes a directory, at once as far as anybody sees.
func (s *Store) discard(dir string) error {
	to := filepath.Join(s.tmp(), filepath.Base(dir))
	if err := os.Rename(dir, to); err != nil {
		return err
	}
	return os.RemoveAll(to)
}

func (s *Store) list() []*Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.layers))
}

func (s *Store) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// Acquire returns a layer that the store has, held by the caller. The error is an fs.ErrNotExist if it hasn't.
func (s *Store) Acquire(key Key) (*Layer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	l, ok := s.layers[key]
	if !ok {
		return nil, fmt.Errorf("layer %s in %s: %w", key, s.root, fs.ErrNotExist)
	}
	s.hold(l)
	return l, nil
}

// Borrow returns a layer that the store has, without holding it: it may be removed meanwhile, and then Have is false for all chunks, and all that reads
// or binds it fails. It counts as a use. The caller calls Return once. The error is an fs.ErrNotExist if the store hasn't got the layer.
func (s *Store) Borrow(key Key) (*Layer, error) {
	l, err := s.Acquire(key)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l.refs--
	l.lent++
	return l, nil
}

// Has reports whether the store has the layer now. It doesn't count as a use.
func (s *Store) Has(key Key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.layers[key]
	return ok
}

// Under s.mu.
func (s *Store) hold(l *Layer) {
	l.refs++
	s.touch(l)
}

// touch notes that a layer is used. Under s.mu.
func (s *Store) touch(l *Layer) {
	l.used = time.Now()
	os.Chtimes(l.path(layerFile), time.Time{}, l.used) //nolint:errcheck // a guess at what will be used again
}

// Create returns a layer, held by the caller, whose TOC is what r has. If the store has the layer already, the TOC
// takes the place of the one there; nothing else changes. The caller vouches that r is what key.TOC says.
func (s *Store) Create(key Key, r io.Reader) (*Layer, error) {
	if err := key.validate(); err != nil {
		return nil, err
	}
	l, err := s.create(key, r)
	if err != nil && !errors.Is(err, ErrClosed) {
		return nil, fmt.Errorf("create layer %s in %s: %w", key, s.root, cause(err))
	}
	return l, err
}

func (s *Store) create(key Key, r io.Reader) (*Layer, error) {
	if s.isClosed() {
		return nil, ErrClosed
	}
	hex := key.Blob.Encoded()
	dir, err := os.MkdirTemp(s.tmp(), hex[:min(len(hex), 16)]+"-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) // what isn't renamed
	toc := filepath.Join(dir, tocFile)
	if err := replaceSealed(dir, toc, key.label(tocFile), false, func(f *os.File) error {
		_, err := io.Copy(f, r)
		return err
	}); err != nil {
		return nil, err
	}
	if err := replaceSealed(dir, filepath.Join(dir, layerFile), layerFile, false, jsonWriter(header{headerVersion, key})); err != nil {
		return nil, err
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	l, ok := s.layers[key]
	if ok {
		err = os.Rename(toc, l.path(tocFile))
	} else {
		l = &Layer{s: s, key: key, dir: filepath.Join(s.root, layersDir, filepath.Base(dir))}
		err = os.Rename(dir, l.dir)
	}
	if err != nil {
		return nil, err
	}
	s.layers[key] = l
	s.hold(l)
	l.fresh.Store(true)
	return l, nil
}

func (s *Store) release(l *Layer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.refs--; l.refs < 0 {
		panic("store: Release of layer " + l.key.String() + ", which nobody holds")
	}
	s.touch(l)
	if l.refs == 0 {
		s.lookNow()
	}
}

func (s *Store) takeBack(l *Layer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.lent--; l.lent < 0 {
		panic("store: Return of layer " + l.key.String() + ", which nobody has borrowed")
	}
	if s.layers[l.key] == l {
		s.touch(l)
		s.lookNow()
	}
}

// Close settles all layers, also those held, and gives the root free. From then on nothing can be written or read; Have
// goes on answering. It is idempotent. Its error says which layers have to be verified the next time.
func (s *Store) Close() error {
	s.closing.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		close(s.stop)
		s.kept.Wait()
		layers := s.list()
		errs := make([]error, len(layers))
		var g errgroup.Group
		g.SetLimit(closers)
		for i, l := range layers {
			g.Go(func() error {
				errs[i] = l.finish()
				return nil
			})
		}
		g.Wait() //nolint:errcheck // they are in errs
		s.closeErr = errors.Join(errors.Join(errs...), s.lock.Unlock())
	})
	return s.closeErr
}

// finish settles a layer and closes its data.
func (l *Layer) finish() error {
	l.binding.Lock()
	defer l.binding.Unlock()
	err := l.Settle()
	if c := l.content.Load(); c != nil {
		err = errors.Join(err, c.close())
	}
	return err
}
