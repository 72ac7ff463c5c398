package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestProbe(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := Probe(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v left behind, %v", left, err)
	}
	// tmpfs raises no pre-content events... unless a kernel comes that lets it.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	t.Log("on tmpfs:", Probe(dir))
}

func TestRead(t *testing.T) {
	d, told := openDoor(t, t.TempDir())
	f := lay(t, d.opt.Root, map[string][]byte{"a": noise(5), "b": noise(3 << 20), "c": nil, "d": noise(4096)}, "a", "b", "c", "d")
	s := f.source(t)
	m := mount(t, d, f, s)
	for name, want := range f.paths {
		checkFile(t, f.path(name), want)
	}
	t.Logf("%d events", s.calls.Load())
	if s.calls.Load() == 0 {
		t.Error("no events")
	}

	t.Log("again from the page cache")
	s.calls.Store(0)
	checkFile(t, f.path("b"), f.paths["b"])
	if n := s.calls.Load(); n > 0 {
		t.Errorf("%d events", n)
	}

	t.Log("again without the page cache")
	forgetCache(t, f)
	checkFile(t, f.path("b"), f.paths["b"])
	if n := s.calls.Load(); n == 0 {
		t.Errorf("no events")
	}

	t.Log("complete")
	if err := m.Complete(); err != nil {
		t.Fatal(err)
	}
	forgetCache(t, f)
	s.calls.Store(0)
	checkFile(t, f.path("b"), f.paths["b"])
	if n := s.calls.Load(); n > 0 {
		t.Errorf("%d events", n)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if len(told.errs) > 0 {
		t.Error(told.errs)
	}
	if len(d.mounts) > 0 {
		t.Errorf("%d mounts left", len(d.mounts))
	}
}

// A demand gets through while others wait.
func TestParallel(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	const size = 256 << 10
	content, names := map[string][]byte{}, []string(nil)
	for i := range 64 {
		name := fmt.Sprintf("file%02d", i)
		names = append(names, name)
		content[name] = noise(size + i)
	}
	f := lay(t, d.opt.Root, content, names...)
	s := f.source(t)
	block := make(chan struct{})
	s.before = func(ctx context.Context, off, _ int64) error {
		if off < 60*(size+4096) { // nearly all files
			select {
			case <-block:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	}
	m := mount(t, d, f, s)
	var wg sync.WaitGroup
	for _, name := range names[:60] {
		for range 2 {
			wg.Go(func() { checkFile(t, f.path(name), content[name]) })
		}
	}
	for s.calls.Load() < 60 {
		time.Sleep(time.Millisecond)
	}
	checkFile(t, f.path(names[63]), content[names[63]])
	close(block)
	wg.Wait()
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
}

// A refused read is EIO, and the next one may succeed.
func TestDeny(t *testing.T) {
	d, told := openDoor(t, t.TempDir())
	f := one(t, d.opt.Root, 100<<10)
	s := f.source(t)
	refused := errors.New("refused")
	var refuse atomic.Bool
	refuse.Store(true)
	s.before = func(context.Context, int64, int64) error {
		if refuse.Load() {
			return refused
		}
		return nil
	}
	mount(t, d, f, s)
	if b, err := os.ReadFile(f.path("file")); !errors.Is(err, unix.EIO) {
		t.Fatalf("%d bytes, %v, want EIO", len(b), err)
	}
	if errs := told.all(); len(errs) == 0 || !errors.Is(errs[0], refused) {
		t.Errorf("told of %v", errs)
	}
	refuse.Store(false)
	checkFile(t, f.path("file"), f.content[:100<<10])
}

// Programs run from an overlayfs mount over a layer, and change it.
func TestOverlay(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	f := lay(t, d.opt.Root, map[string][]byte{"busybox": busybox, "data": noise(1 << 20)}, "busybox", "data")
	s := f.source(t)
	m := mount(t, d, f, s)
	dir := t.TempDir()
	lower, upper, work, target := filepath.Join(dir, "lower"), filepath.Join(dir, "upper"), filepath.Join(dir, "work"), filepath.Join(dir, "target")
	for _, p := range []string{lower, upper, work, target} {
		if err := os.Mkdir(p, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(f.opt.Target, filepath.Join(dir, "l")); err != nil { // without its comma
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", target, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", filepath.Join(dir, "l"), upper, work)); err != nil {
		t.Fatal(err)
	}
	mounted := true
	defer func() {
		if mounted {
			unix.Unmount(target, unix.MNT_DETACH)
		}
	}()
	out, err := exec.CommandContext(t.Context(), filepath.Join(target, "busybox"), "sh", "-c", "echo ran; echo x >>"+filepath.Join(target, "data")).CombinedOutput()
	if err != nil || string(out) != "ran\n" {
		t.Fatalf("%q, %v", out, err)
	}
	checkFile(t, filepath.Join(target, "data"), append(bytes.Clone(f.paths["data"]), "x\n"...))
	checkFile(t, f.path("data"), f.paths["data"])

	t.Log("unmounted below overlayfs: what has arrived is there, the rest is EIO, never zeros")
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if len(d.mounts) != 1 {
		t.Fatalf("%d mounts, want one that lingers", len(d.mounts))
	}
	if err := unix.Unmount(target, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	for range 1000 { // overlayfs lets go after a grace period
		if d.sweep(); len(d.mounts) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the layer is still in use")
}

// A layer that is in use after its unmount can be mounted again, and what still reads is served then.
func TestLinger(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	f := one(t, d.opt.Root, 8<<20)
	s := f.source(t)
	m := mount(t, d, f, s)
	if _, err := d.Mount(f.opt); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("mounted twice: %v, want EBUSY", err)
	}
	open, err := os.Open(f.path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	if n, err := open.ReadAt(b, 0); !errors.Is(err, unix.EIO) {
		t.Fatalf("%d bytes, %v, want EIO", n, err)
	}
	m = mount(t, d, f, s)
	if _, err := open.ReadAt(b, 4<<20); err != nil || !bytes.Equal(b, f.content[4<<20:4<<20+4096]) {
		t.Fatalf("through what lingered: %v", err)
	}
	checkFile(t, f.path("file"), f.content)
	open.Close()
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if len(d.mounts) > 0 {
		t.Errorf("%d mounts left", len(d.mounts))
	}
}

// A layer that is mounted again gets its mark after the one of the last mount was taken away, not before.
func TestMarkWaitsForUnmark(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	f := one(t, d.opt.Root, 1<<20)
	s := f.source(t)
	d.marks.Lock() // as who sweeps has it
	var taken atomic.Bool
	time.AfterFunc(100*time.Millisecond, func() {
		taken.Store(true)
		d.marks.Unlock()
	})
	mount(t, d, f, s)
	if !taken.Load() {
		t.Error("marked while a mark is being taken away")
	}
	checkFile(t, f.path("file"), f.content)
}

// Close and Unmount deny what waits.
func TestClose(t *testing.T) {
	for name, end := range map[string]func(*Door, *Mount) error{
		"close":   func(d *Door, _ *Mount) error { return d.Close() },
		"unmount": func(_ *Door, m *Mount) error { return m.Unmount() },
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := openDoor(t, t.TempDir())
			f := one(t, d.opt.Root, 1<<20)
			s := f.source(t)
			s.before = func(ctx context.Context, _, _ int64) error {
				<-ctx.Done()
				return context.Cause(ctx)
			}
			m := mount(t, d, f, s)
			read := make(chan error)
			go func() {
				_, err := os.ReadFile(f.path("file"))
				read <- err
			}()
			for s.calls.Load() == 0 {
				time.Sleep(time.Millisecond)
			}
			if err := end(d, m); err != nil {
				t.Error(err)
			}
			if err := <-read; !errors.Is(err, unix.EIO) {
				t.Errorf("read: %v, want EIO", err)
			}
		})
	}
}

// OpenData's descriptors raise no events, whenever they were opened; others do.
func TestOpenData(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	f := one(t, d.opt.Root, 1<<20)
	s := f.source(t)
	mount(t, d, f, s)
	silent, err := OpenData(f.opt.Data)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	b := make([]byte, 4096)
	_, werr := silent.WriteAt(b, 0)
	_, rerr := silent.ReadAt(b, 0)
	perr := unix.Fallocate(int(silent.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
	if err := errors.Join(werr, rerr, perr); err != nil {
		t.Fatal(err)
	}
	if n := s.calls.Load(); n > 0 {
		t.Errorf("%d events", n)
	}
	loud, err := os.Open(f.opt.Data)
	if err != nil {
		t.Fatal(err)
	}
	defer loud.Close()
	if _, err := loud.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if s.calls.Load() == 0 {
		t.Error("no event")
	}
}

func FuzzParseEvent(f *testing.F) {
	// An event of 4096 bytes at 1 MiB, and one without a range.
	f.Add([]byte("\x30\x00\x00\x00\x03\x00\x18\x00\x00\x00\x10\x00\x00\x00\x00\x00\x09\x00\x00\x00\x10\x00\x00\x00" +
		"\x06\x00\x18\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x18\x00\x00\x00\x03\x00\x18\x00\x00\x00\x10\x00\x00\x00\x00\x00\xff\xff\xff\xff\x10\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			e, rest, err := parseEvent(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("no progress")
			}
			if e.err == nil && (e.off < 0 || e.n < 0) {
				t.Fatalf("%+v", e)
			}
			b = rest
		}
	})
}

func TestParseEvent(t *testing.T) {
	b := []byte("\x30\x00\x00\x00\x03\x00\x18\x00\x00\x00\x10\x00\x00\x00\x00\x00\x09\x00\x00\x00\x10\x00\x00\x00" +
		"\x06\x00\x18\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00rest")
	e, rest, err := parseEvent(b)
	if want := (event{fd: 9, off: 1 << 20, n: 4096}); err != nil || e != want || string(rest) != "rest" {
		t.Errorf("%+v, %q, %v, want %+v", e, rest, err, want)
	}
}

// From a read of one block to its bytes, through event, goroutine and answer; without the event beside it.
func BenchmarkEvent(b *testing.B) {
	d, _ := openDoor(b, b.TempDir())
	f := one(b, d.opt.Root, 64<<20)
	m := mount(b, d, f, nothing{})
	file, err := os.Open(f.path("file"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	// No readahead: one event a read.
	if err := unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	blocks := rand.Perm(64 << 20 / 4096)
	i := 0
	read := func(b *testing.B) {
		for b.Loop() {
			if i++; i == len(blocks) {
				i = 0
				b.StopTimer()
				forgetCache(b, f)
				b.StartTimer()
			}
			if _, err := file.ReadAt(buf, int64(blocks[i])*4096); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("marked", read)
	if err := m.Complete(); err != nil {
		b.Fatal(err)
	}
	forgetCache(b, f)
	b.Run("complete", read)
}

// nothing has arrived already.
type nothing struct{}

func (nothing) Fill(context.Context, int64, int64) error { return nil }
