package store

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
		if err := c.l.WriteChunk(i, c.fx.chunk(i)); err != nil {
			c.t.Fatal(err)
		}
		c.sure[i] = true
		return fmt.Sprint("write ", i)
	case op < 9:
		if _, ok := errors.AsType[*DigestError](c.l.WriteChunk(i, []byte("wrong"))); !ok && !c.l.Have(i) {
			c.t.Fatalf("wrong bytes are taken for chunk %d", i)
		}
		return fmt.Sprint("write wrong ", i)
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
			time.Sleep(5 * time.Millisecond) // the kernel's clock for files, before 6.13
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
			s.synced = func(l *Layer) {
				var err error
				if durable, err = os.ReadFile(l.DataPath()); err != nil {
					t.Fatal(err)
				}
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
					if err := l.WriteChunk(i, fx.chunk(i)); err != nil {
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

const childEnv = "STORE_TEST_CHILD"

// TestMain lets the test binary be the process that is killed.
func TestMain(m *testing.M) {
	if root := os.Getenv(childEnv); root != "" {
		if err := child(root); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func killFixture() *fixture {
	sizes := []int64{8 << 20}
	for i := range int64(300) {
		sizes = append(sizes, 1+i*37)
	}
	return newFixture("killed", newRand(1), 64<<10, sizes...)
}

// child fills a layer, in a random order, and says which chunks are written.
func child(root string) error {
	s, err := Open(root, Options{Quiet: 3 * time.Millisecond})
	if err != nil {
		return err
	}
	fx := killFixture()
	l, err := s.Create(fx.key, bytes.NewReader(fx.toc))
	if err != nil {
		return err
	}
	if _, err := l.Bind(fx.model); err != nil {
		return err
	}
	fmt.Println("open")
	for n, i := range rand.Perm(len(fx.model.Chunks)) {
		if err := l.WriteChunk(i, fx.chunk(i)); err != nil {
			return err
		}
		fmt.Println(i)
		if n%16 == 0 {
			time.Sleep(time.Duration(rand.IntN(8)) * time.Millisecond)
		}
	}
	return s.Close()
}

// TestKilledAtRandomMoments is a SIGKILL of a process that fills a layer, 50 times: what it has written is there, and
// right.
func TestKilledAtRandomMoments(t *testing.T) {
	root := t.TempDir()
	fx := killFixture()
	var kept, doubtful, trusted, clean int
	for range 50 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+root)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "open" {
			t.Fatalf("child: %q", lines.Text())
		}
		if _, err := Open(root, Options{}); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint("pid ", cmd.Process.Pid)) {
			t.Fatalf("two processes: %v", err)
		}
		timer := time.AfterFunc(time.Duration(rand.IntN(120_000))*time.Microsecond, func() { cmd.Process.Kill() })
		written := map[int]bool{}
		for lines.Scan() {
			i, err := strconv.Atoi(lines.Text())
			if err != nil {
				t.Fatal(lines.Text())
			}
			written[i] = true
		}
		if cmd.Wait() == nil {
			clean++
		}
		timer.Stop()

		s := open(t, root, Options{Quiet: time.Hour})
		l := hold(t, s, fx)
		trusted += checkRight(t, l, fx)
		if toc, err := l.TOC(); err != nil || !bytes.Equal(toc, fx.toc) {
			t.Fatalf("TOC: %v", err)
		}
		for range l.Doubtful() {
			doubtful++
		}
		for i := range written {
			if !l.Verify(i) {
				t.Fatalf("chunk %d is lost", i)
			}
		}
		kept += len(written)
		for i := range fx.model.Chunks {
			l.Verify(i)
		}
		all := checkRight(t, l, fx)
		l.Release()
		if all == len(fx.model.Chunks) || rand.IntN(4) == 0 {
			if err := s.Remove(fx.key); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d chunks were written and kept, %d were trusted and %d in doubt; %d children were done before", kept, trusted, doubtful, clean)
	if kept == 0 || doubtful == 0 || clean > 40 {
		t.Error("this has tested little")
	}
}
