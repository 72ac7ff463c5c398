package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Creating, releasing and removing one layer at the same time.
func TestConcurrentLife(t *testing.T) {
	s := open(t, t.TempDir(), Options{Quiet: time.Millisecond, Notice: func(_ Key, err error) { t.Error(err) }})
	fx := newFixture("a", newRand(1), 4096, 50_000)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := range 50 {
				l, err := s.Create(fx.key, bytes.NewReader(fx.toc))
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := l.Bind(fx.model); err != nil {
					t.Error(err)
				}
				i := (n + w) % len(fx.model.Chunks)
				if err := l.WriteChunk(fx.verified(i)); err != nil {
					t.Error(err)
				}
				l.Release()
				if err := s.Remove(fx.key); err != nil && !errors.Is(err, ErrInUse) && !errors.Is(err, fs.ErrNotExist) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	l := hold(t, s, fx)
	checkRight(t, l, fx)
	l.Release()
	if err := s.Remove(fx.key); err != nil {
		t.Error(err)
	}
	for _, dir := range []string{tmpDir, layersDir} {
		if left, err := os.ReadDir(filepath.Join(s.root, dir)); err != nil || len(left) > 0 {
			t.Errorf("%s: %v, %v", dir, left, err)
		}
	}
}

func TestUsageAndEviction(t *testing.T) {
	const size = 1 << 20
	s := open(t, t.TempDir(), Options{})
	var all []*fixture
	for i := range 4 {
		fx := newFixture(fmt.Sprint("layer ", i), newRand(uint64(i)), 1<<16, size)
		all = append(all, fx)
		l := hold(t, s, fx)
		fillAll(t, l, fx)
		if i != 1 {
			l.Release()
		}
	}
	l, err := s.Acquire(all[0].key) // the oldest is the youngest now
	if err != nil {
		t.Fatal(err)
	}
	l.Release()
	var got []int
	for _, u := range s.Usage() {
		i := slices.IndexFunc(all, func(fx *fixture) bool { return fx.key == u.Key })
		got = append(got, i)
		if u.Bytes < size || u.Bytes > size+100_000 {
			t.Errorf("layer %d takes %d bytes", i, u.Bytes)
		}
		if want := i == 1; (u.Refs == 1) != want {
			t.Errorf("layer %d has %d references", i, u.Refs)
		}
	}
	if want := []int{1, 2, 3, 0}; !slices.Equal(got, want) {
		t.Errorf("Usage: %v, want %v", got, want)
	}
	if freed, err := s.Prune(3*size + 500_000); err != nil || freed < size {
		t.Errorf("Prune: %d, %v", freed, err)
	}
	if _, err := s.Acquire(all[2].key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the least recently used layer that nobody holds is still there: %v", err)
	}
	if _, err := s.Prune(0); err != nil {
		t.Error(err)
	}
	if u := s.Usage(); len(u) != 1 || u[0].Key != all[1].key {
		t.Errorf("Usage: %v", u)
	}
	if err := s.Remove(all[1].key); !errors.Is(err, ErrInUse) {
		t.Errorf("Remove: %v", err)
	}
}

func TestMaxSizeIsKept(t *testing.T) {
	const size = 24 << 20
	s := open(t, t.TempDir(), Options{MaxSize: 2*size + size/2})
	total := func() (n int64) {
		for _, u := range s.Usage() {
			n += u.Bytes
		}
		return n
	}
	var last *fixture
	for i := range 5 {
		last = newFixture(fmt.Sprint("layer ", i), newRand(uint64(i)), 1<<20, size)
		l := hold(t, s, last)
		fillAll(t, l, last)
		l.Release()
	}
	for start := time.Now(); total() > s.opt.MaxSize; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > 30*time.Second {
			t.Fatalf("%d bytes after 30 s", total())
		}
	}
	l := hold(t, s, last)
	if !l.Complete() {
		t.Error("the last layer used isn't there any more")
	}
}

func TestReleaseTooOften(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	l := hold(t, s, newFixture("a", newRand(1), 1, 1))
	l.Release()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
		s.mu.Lock()
		l.refs = 0
		s.mu.Unlock()
	}()
	l.Release()
}

// After a clean stop, all is as it was, without reading it.
func TestCleanRestart(t *testing.T) {
	root := t.TempDir()
	fx := newFixture("a", newRand(3), 4096, 100_000)
	s := open(t, root, Options{})
	l := hold(t, s, fx)
	for i := 0; i < len(fx.model.Chunks); i += 2 {
		if err := l.WriteChunk(fx.verified(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.WriteImage("v1", func(f *os.File) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if err := l.WriteChunk(fx.verified(1)); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("WriteChunk: %v", err)
	}
	if _, err := l.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("ReadAt: %v", err)
	}
	if _, err := s.Acquire(fx.key); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Acquire: %v", err)
	}
	if _, err := s.Create(fx.key, nil); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Create: %v", err)
	}
	l.Release()

	silent := 0
	s = open(t, root, Options{
		Notice:   func(_ Key, err error) { t.Error(err) },
		OpenData: func(path string) (*os.File, error) { silent++; return os.OpenFile(path, os.O_RDWR, 0) },
	})
	l, err := s.Acquire(fx.key)
	if err != nil {
		t.Fatal(err)
	}
	if toc, err := l.TOC(); err != nil || !bytes.Equal(toc, fx.toc) {
		t.Errorf("TOC: %q, %v", toc, err)
	}
	if _, err := l.Bind(fx.model); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Image("v1"); err != nil {
		t.Error(err)
	}
	if n, want := checkRight(t, l, fx), (len(fx.model.Chunks)+1)/2; n != want {
		t.Errorf("%d chunks, want %d", n, want)
	}
	for i := range l.Doubtful() {
		t.Errorf("chunk %d is in doubt", i)
	}
	if silent != 1 {
		t.Errorf("OpenData was called %d times", silent)
	}
	s.Close()

	s = open(t, root, Options{Distrust: true})
	l = hold(t, s, fx)
	if n := checkRight(t, l, fx); n != 0 {
		t.Errorf("%d chunks are trusted", n)
	}
}

// A copy of the state directory has zeros for holes, if what made it knows no holes.
func TestCopiedWithoutHoles(t *testing.T) {
	root := t.TempDir()
	fx := newFixture("a", newRand(3), 16<<10, 100_000, 5000, 300_000, 4096)
	s := open(t, root, Options{})
	l := hold(t, s, fx)
	there := map[int]bool{}
	for i := range fx.model.Chunks {
		if there[i] = i%5 < 2; there[i] {
			if err := l.WriteChunk(fx.verified(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	path, before := l.DataPath(), l.Usage()
	l.Release()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err == nil {
		// Beside the old one, which keeps its inode meanwhile.
		err = errors.Join(os.WriteFile(path+"-copy", data, 0o600), os.Rename(path+"-copy", path))
	}
	if err != nil {
		t.Fatal(err)
	}

	s = open(t, root, Options{})
	l = hold(t, s, fx)
	for i := range l.Doubtful() {
		if !there[i] {
			t.Errorf("chunk %d is in doubt, which wasn't there", i)
		}
	}
	for i := range fx.model.Chunks {
		if l.Verify(i) != there[i] {
			t.Errorf("chunk %d is there: %v, want %v", i, !there[i], there[i])
		}
	}
	if after := l.Usage(); after > before+16<<10 { // the filesystem's own blocks come and go
		t.Errorf("the copy takes %d bytes, the layer took %d", after, before)
	}
	fillAll(t, l, fx)
	checkRight(t, l, fx)
	if !l.Complete() {
		t.Error("not complete")
	}
}

// A layer that nobody holds, and one that is quiet, is trusted even after a SIGKILL, and lets go of memory and
// descriptors.
func TestQuietLayersSettle(t *testing.T) {
	for _, released := range []bool{false, true} {
		root := t.TempDir()
		fx := newFixture("a", newRand(3), 4096, 100_000)
		quiet := time.Hour
		if !released {
			quiet = time.Millisecond
		}
		s := open(t, root, Options{Quiet: quiet})
		l := hold(t, s, fx)
		fillAll(t, l, fx)
		if released {
			l.Release()
		}
		for start := time.Now(); ; time.Sleep(time.Millisecond) {
			_, err := os.Stat(l.path(mapFile))
			if err == nil && (!released || l.Model() == nil) {
				break
			}
			if time.Since(start) > 30*time.Second {
				t.Fatalf("after 30 s: map: %v, model: %v", err, l.Model())
			}
		}
	}
}

func TestOneProcess(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, Options{})
	_, err := Open(root, Options{})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), root) || !strings.Contains(err.Error(), fmt.Sprint("pid ", os.Getpid())) {
		t.Errorf("second Open: %v", err)
	}
	s.Close()
	open(t, root, Options{})
}

func TestPermissions(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "store")
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, root, Options{})
	fx := newFixture("a", newRand(3), 4096, 10_000)
	l := hold(t, s, fx)
	fillAll(t, l, fx)
	_, err := l.WriteImage("v", func(f *os.File) error { return nil })
	if err := errors.Join(err, l.SetOrigin(nil), l.Settle()); err != nil {
		t.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		fi, _ := d.Info()
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = fs.ModeDir | 0o700
		} else {
			files++
		}
		if fi.Mode() != want {
			t.Errorf("%s: %v, want %v", path, fi.Mode(), want)
		}
		return nil
	})
	if err != nil || files != 7 {
		t.Errorf("%d files", files)
	}
}

// What isn't a layer goes away; of two copies, the one used last stays.
func TestScan(t *testing.T) {
	root := t.TempDir()
	fx := newFixture("a", newRand(3), 4096, 10_000)
	s := open(t, root, Options{})
	fillAll(t, hold(t, s, fx), fx)
	s.Close()
	layers := filepath.Join(root, layersDir)
	names, _ := os.ReadDir(layers)
	first := filepath.Join(layers, names[0].Name())
	old := time.Now().Add(-time.Hour)
	if err := errors.Join(
		os.CopyFS(filepath.Join(layers, "zz-copy"), os.DirFS(first)),
		os.Chtimes(filepath.Join(layers, "zz-copy", layerFile), old, old),
		os.Mkdir(filepath.Join(layers, "empty"), 0o700),
		os.WriteFile(filepath.Join(layers, "file"), nil, 0o600),
		os.Mkdir(filepath.Join(layers, "future"), 0o700),
		replaceSealed(layers, filepath.Join(layers, "future", layerFile), layerFile, false, jsonWriter(header{99, fx.key})),
		os.WriteFile(filepath.Join(root, tmpDir, "torn"), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	notices := 0
	s = open(t, root, Options{Notice: func(Key, error) { notices++ }})
	if notices != 4 {
		t.Errorf("%d notices, want 4", notices)
	}
	if names, err := os.ReadDir(layers); err != nil || len(names) != 1 || filepath.Join(layers, names[0].Name()) != first {
		t.Errorf("%v, %v", names, err)
	}
	if l := hold(t, s, fx); !l.Complete() {
		t.Error("incomplete")
	}
}
