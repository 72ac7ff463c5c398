package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fileClock is longer than a tick of the clock that kernels before 6.13 give files their times by, which is one of 100 Hz at the slowest.
const fileClock = 25 * time.Millisecond

// copyTree copies a state directory as it is at this moment.
func copyTree(t testing.TB, from string) (to string) {
	t.Helper()
	to = filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	// CopyFS writes zeros where there were holes: make them holes again, so that not everything is in doubt.
	for _, path := range glob(t, from, dataFile) {
		sameHoles(t, path, strings.Replace(path, from, to, 1))
	}
	return to
}

// glob returns the files of a name in the directories of layers.
func glob(t testing.TB, root, name string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(root, layersDir, "*", name))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func punch(t testing.TB, f *os.File, off, end int64) {
	t.Helper()
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, end-off); err != nil {
		t.Fatal(err)
	}
}

func sameHoles(t testing.TB, like, path string) {
	t.Helper()
	from, err := os.Open(like)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	size, _ := from.Seek(0, io.SeekEnd)
	for off := int64(0); off < size; {
		start, err := unix.Seek(int(from.Fd()), off, unix.SEEK_DATA)
		if err != nil {
			start = size
		}
		if start > off {
			punch(t, to, off, start)
		}
		if off = size; start < size {
			if off, err = unix.Seek(int(from.Fd()), start, unix.SEEK_HOLE); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// digHoles makes holes of blocks of zeros.
func digHoles(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(p); off += 4096 {
		if len(bytes.TrimLeft(p[off:min(off+4096, len(p))], "\x00")) == 0 {
			punch(t, f, int64(off), int64(off)+4096)
		}
	}
}

// damage does to a file what disks and operators do. It reports whether anything has changed.
func damage(t testing.TB, rng *rand.Rand, path string) bool {
	t.Helper()
	p, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || len(p) == 0 {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	was := bytes.Clone(p)
	switch rng.IntN(5) {
	case 0:
		p = p[:rng.IntN(len(p))]
		if err := os.Truncate(path, int64(len(p))); err != nil {
			t.Fatal(err)
		}
		return true
	case 1:
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		return true
	case 2:
		for range 1 + rng.IntN(5) {
			p[rng.IntN(len(p))] ^= 1 << rng.IntN(8)
		}
	case 3: // what ext4 has for blocks that weren't written before power was lost
		off := rng.IntN(len(p))
		clear(p[off:min(off+4096*(1+rng.IntN(8)), len(p))])
	case 4:
		p = append(p, "more than there was"...)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0) // the same inode
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return !bytes.Equal(p, was)
}

// crasher is a store that things are done to, and what must be true of it.
type crasher struct {
	t    *testing.T
	rng  *rand.Rand
	fx   *fixture
	root string
	s    *Store
	l    *Layer
	sure map[int]bool // chunks that must not be lost
}

func (c *crasher) open() {
	c.s = open(c.t, c.root, Options{})
	c.l = hold(c.t, c.s, c.fx)
	checkRight(c.t, c.l, c.fx)
}

func (c *crasher) step() string {
	n := len(c.fx.model.Chunks)
	i := c.rng.IntN(n)
	switch op := c.rng.IntN(20); {
	case op < 8:
		if err := c.l.WriteChunk(c.fx.verified(i)); err != nil {
			c.t.Fatal(err)
		}
		c.sure[i] = true
		return fmt.Sprint("write ", i)
	case op < 9:
		there := c.l.Have(0)
		other := newFixture("a", newRand(1), 4096, 100)
		if err := c.l.WriteChunk(other.verified(0)); !errors.Is(err, fs.ErrInvalid) || c.l.Have(0) != there {
			c.t.Fatalf("another layer's chunk is taken: %v", err)
		}
		return "write another layer's"
	case op < 12:
		if ok := c.l.Verify(i); ok != c.l.Have(i) || c.sure[i] && !ok {
			c.t.Fatalf("chunk %d: Verify %v, Have %v, must be there: %v", i, ok, c.l.Have(i), c.sure[i])
		}
		return fmt.Sprint("verify ", i)
	case op < 14:
		off := c.rng.Int64N(int64(len(c.fx.truth)))
		p := make([]byte, c.rng.IntN(50000))
		n, err := c.l.ReadAt(p, off)
		if !bytes.Equal(p[:n], c.fx.truth[off:off+int64(n)]) || n < len(p) && err == nil {
			c.t.Fatalf("ReadAt(%d, %d): %d wrong bytes, %v", len(p), off, n, err)
		}
		return fmt.Sprint("read ", off, len(p))
	case op < 16:
		if err := c.l.Settle(); err != nil {
			c.t.Fatal(err)
		}
		return "settle"
	case op < 17:
		if err := c.s.Close(); err != nil {
			c.t.Fatal(err)
		}
		c.open()
		return "restart"
	case op < 18:
		root := copyTree(c.t, c.root)
		c.s.Close()
		c.root = root
		c.open()
		return "killed"
	default:
		in := "after a clean stop"
		if c.rng.IntN(2) == 0 {
			in = "after a kill"
			root := copyTree(c.t, c.root)
			c.s.Close()
			c.root = root
		} else {
			c.s.Close()
			time.Sleep(fileClock)
		}
		names := glob(c.t, c.root, "*")
		hit := names[c.rng.IntN(len(names))]
		if c.rng.IntN(2) == 0 {
			hit = filepath.Join(filepath.Dir(hit), dataFile)
		}
		if damage(c.t, c.rng, hit) {
			switch filepath.Base(hit) {
			case mapFile, tocFile: // costs no data
			default:
				clear(c.sure)
			}
		}
		c.open()
		if toc, err := c.l.TOC(); err == nil && !bytes.Equal(toc, c.fx.toc) {
			c.t.Fatalf("a damaged TOC: %q", toc)
		} else if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				c.t.Fatal(err)
			}
			l, err := c.s.Create(c.fx.key, bytes.NewReader(c.fx.toc))
			if err != nil {
				c.t.Fatal(err)
			}
			l.Release()
		}
		return fmt.Sprintf("%s damaged %s", in, hit)
	}
}

// TestNothingWrongIsEverThere does random things to a store and its files. Whatever it calls present hashes right,
// and nothing that was written and not damaged is lost.
func TestNothingWrongIsEverThere(t *testing.T) {
	seeds := 60
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := newRand(uint64(seed))
			c := &crasher{t: t, rng: rng, fx: randomFixture("a", rng), root: t.TempDir(), sure: map[int]bool{}}
			c.open()
			var done []string
			defer func() {
				if t.Failed() {
					t.Log(strings.Join(done, "; "))
				}
			}()
			for range 60 {
				done = append(done, c.step())
				checkRight(t, c.l, c.fx)
			}
			for i := range c.fx.model.Chunks {
				if ok := c.l.Verify(i); c.sure[i] && !ok {
					t.Errorf("chunk %d is lost", i)
				}
			}
			for i := range c.l.Doubtful() {
				t.Errorf("chunk %d is still in doubt", i)
			}
			checkRight(t, c.l, c.fx)
		})
	}
}

// TestPowerLoss has a disk that keeps of the blocks written since the last fsync what it likes, and of renames and
// unlinks, too: any map that was ever written may come back. The times by which a map recognizes its data are
// switched off, so that it is believed: what it says must be true even so.
func TestPowerLoss(t *testing.T) {
	weak := func(st *unix.Stat_t) identity { return identity{Size: st.Size} }
	for seed := range 40 {
		rng := newRand(uint64(seed))
		fx := randomFixture("a", rng)
		var durable []byte
		var maps [][]byte
		root := t.TempDir()
		trusted := 0
		for range 6 {
			s := open(t, root, Options{})
			s.identify = weak
			s.sync = func(data *os.File) (err error) {
				durable, err = os.ReadFile(data.Name())
				return err
			}
			l := hold(t, s, fx)
			trusted += checkRight(t, l, fx)
			for range 30 {
				i := rng.IntN(len(fx.model.Chunks))
				switch rng.IntN(8) {
				case 0:
					if err := l.Settle(); err != nil {
						t.Fatal(err)
					}
					if p, err := os.ReadFile(l.path(mapFile)); err == nil {
						maps = append(maps, p)
					}
				case 1:
					l.Verify(i)
				default:
					if err := l.WriteChunk(fx.verified(i)); err != nil {
						t.Fatal(err)
					}
				}
			}

			root = copyTree(t, root)
			name := strings.Replace(l.dir, s.root, root, 1)
			data, err := os.ReadFile(filepath.Join(name, dataFile))
			if err != nil {
				t.Fatal(err)
			}
			for off := 0; off < len(data); off += 4096 {
				if rng.IntN(2) == 0 {
					clear(data[off : off+4096])
					if durable != nil {
						copy(data[off:off+4096], durable[off:])
					}
				}
			}
			if err := os.WriteFile(filepath.Join(name, dataFile), data, 0o600); err != nil {
				t.Fatal(err)
			}
			digHoles(t, filepath.Join(name, dataFile))
			durable = bytes.Clone(data)
			if len(maps) > 0 && rng.IntN(4) > 0 {
				if err := os.WriteFile(filepath.Join(name, mapFile), maps[rng.IntN(len(maps))], 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s.Close()
		}
		if seed == 0 && trusted == 0 {
			t.Error("no map was ever trusted: nothing is tested")
		}
	}
}

// TestDamagedData edits data after a clean stop: what is wrong is lost, all else is verified and kept, and writing what is lost
// mends it.
func TestDamagedData(t *testing.T) {
	// Chunks 0, 1, 2 of a file of 10,000 bytes, 3 of another.
	fx := newFixture("a", newRand(8), 4096, 10_000, 100)
	for i := range fx.model.Chunks {
		if bytes.Equal(fx.chunk(i), make([]byte, len(fx.chunk(i)))) {
			t.Fatal("zeros")
		}
	}
	write := func(off int64, p ...byte) func(*os.File) error {
		return func(f *os.File) error { _, err := f.WriteAt(p, off); return err }
	}
	for _, test := range []struct {
		name  string
		do    func(*os.File) error
		doubt []int
		lost  []int
	}{
		{"nothing", func(*os.File) error { return nil }, nil, nil},
		{"times", func(f *os.File) error { return f.Chmod(0o600) }, []int{0, 1, 2, 3}, nil},
		{"a byte", write(4096, ^fx.truth[4096]), []int{0, 1, 2, 3}, []int{1}},
		{"the same byte", write(4096, fx.truth[4096]), []int{0, 1, 2, 3}, nil},
		{"padding", write(10_000, 1), []int{0, 1, 2, 3}, []int{2}},
		{"last padding", write(16383, 1), []int{0, 1, 2, 3}, []int{3}},
		{"zeros", write(0, make([]byte, 8192)...), []int{0, 1, 2, 3}, []int{0, 1}},
		{"a hole", func(f *os.File) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 4096)
		}, []int{0, 1, 3}, []int{2}},
		{"truncated", func(f *os.File) error { return f.Truncate(5000) }, []int{0, 1}, []int{1, 2, 3}},
		{"empty", func(f *os.File) error { return f.Truncate(0) }, nil, []int{0, 1, 2, 3}},
		{"longer", func(f *os.File) error { return f.Truncate(1 << 20) }, []int{0, 1, 2, 3}, nil},
		{"removed", func(f *os.File) error { return os.Remove(f.Name()) }, nil, []int{0, 1, 2, 3}},
	} {
		for _, verify := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s verify=%v", test.name, verify), func(t *testing.T) {
				root := t.TempDir()
				s := open(t, root, Options{})
				fillAll(t, hold(t, s, fx), fx)
				s.Close()
				time.Sleep(fileClock)
				f, err := os.OpenFile(glob(t, root, dataFile)[0], os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				if err := test.do(f); err != nil {
					t.Fatal(err)
				}
				f.Close()

				l := hold(t, open(t, root, Options{}), fx)
				checkRight(t, l, fx)
				if doubt := slices.Collect(l.Doubtful()); !slices.Equal(doubt, test.doubt) {
					t.Errorf("in doubt: %v, want %v", doubt, test.doubt)
				}
				for i := range fx.model.Chunks {
					if want := !slices.Contains(test.lost, i); verify && l.Verify(i) != want {
						t.Errorf("Verify(%d) = %v", i, !want)
					}
				}
				checkRight(t, l, fx)
				fillAll(t, l, fx)
				if checkRight(t, l, fx); !l.Complete() {
					t.Error("incomplete")
				}
			})
		}
	}
}
