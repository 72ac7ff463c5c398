package mounttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Open opens a door below an empty directory.
type Open func(t testing.TB, root string) Door

// Run runs the suite. It needs root, and a host with busybox.
func Run(t *testing.T, open Open) {
	if os.Geteuid() != 0 {
		t.Fatal("these tests mount file systems: run them as root")
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, Open)
	}{
		{"Tree", testTree},
		{"Read", testRead},
		{"Mmap", testMmap},
		{"Overlay", testOverlay},
		{"DropCaches", testDropCaches},
		{"DropBehind", testDropBehind},
		{"Parallel", testParallel},
		{"Refused", testRefused},
		{"Killed", testKilled},
		{"InUse", testInUse},
		{"End", testEnd},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, open) })
	}
}

// mount opens a door and mounts a tree.
func mount(t testing.TB, open Open, tree *Tree) (Door, *Files, Mount) {
	t.Helper()
	root := t.TempDir()
	d := open(t, root)
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	f := Lay(t, root, tree)
	m, err := d.Mount(t, f)
	if err != nil {
		t.Fatal(err)
	}
	return d, f, m
}

func checkFiles(t testing.TB, root string, tree *Tree) {
	t.Helper()
	for name, content := range tree.Files {
		CheckFile(t, filepath.Join(root, name), content)
	}
}

func dropCaches(t testing.TB) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// What is mounted is the layer, entry by entry, however often it's asked for.
func testTree(t *testing.T, open Open) {
	tree := Everything(t)
	_, f, m := mount(t, open, tree)
	Compare(t, f.Target, tree, false)
	Compare(t, f.Target, tree, false)
	dropCaches(t)
	Compare(t, f.Target, tree, false)
	if n := f.Filler.Calls.Load(); n > 0 {
		t.Errorf("metadata needed content %d times", n)
	}
	if err := os.WriteFile(f.Path("new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("made a file: %v, want EROFS", err)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(f.Target); err != nil || len(left) > 0 {
		t.Errorf("%d entries, %v after the unmount", len(left), err)
	}
}

// Bytes arrive when they are read, once as long as the page cache has them, and nobody is asked when the layer is complete.
func testRead(t *testing.T, open Open) {
	_, f, m := mount(t, open, Everything(t))
	checkFiles(t, f.Target, f.Tree)
	if f.Filler.Calls.Swap(0) == 0 {
		t.Error("nothing was asked for")
	}
	asked := int64(1)
	for range 5 { // others may drop caches, too
		checkFiles(t, f.Target, f.Tree)
		if asked = f.Filler.Calls.Swap(0); asked == 0 {
			break
		}
	}
	if asked > 0 {
		t.Errorf("asked %d times for what is in the page cache", asked)
	}
	if err := m.Complete(); err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
	checkFiles(t, f.Target, f.Tree)
	if n := f.Filler.Calls.Load(); n > 0 {
		t.Errorf("asked %d times when complete", n)
	}
	file, err := os.Open(f.Path("big"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	want := f.Files["big"]
	for range 200 {
		off, buf := rand.IntN(len(want)), make([]byte, rand.IntN(300_000))
		n, _ := file.ReadAt(buf, int64(off))
		if n != min(len(buf), len(want)-off) || !bytes.Equal(buf[:n], want[off:off+n]) {
			t.Fatalf("%d bytes at %d differ", n, off)
		}
	}
}

func testMmap(t *testing.T, open Open) {
	_, f, _ := mount(t, open, Build(t, File("file", bytes.Repeat([]byte("line\n"), 300_000))))
	// By another process: a fault may wait for goroutines of this one. Grep maps its input.
	out, err := exec.CommandContext(t.Context(), "grep", "-c", "line", f.Path("file")).CombinedOutput()
	if err != nil || string(out) != "300000\n" {
		t.Fatalf("%q, %v", out, err)
	}
}

// Overlay mounts an overlayfs over lower directories, the topmost first, and returns where.
func Overlay(t testing.TB, lower ...string) string {
	t.Helper()
	dir := t.TempDir()
	var names []string
	for i, l := range lower {
		// By a name without commas and colons.
		name := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Symlink(l, name); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	target := filepath.Join(dir, "target")
	for _, d := range []string{"upper", "work", "target"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	option := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", strings.Join(names, ":"), dir, dir)
	if err := unix.Mount("overlay", target, "overlay", 0, option); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
	})
	return target
}

// Sh runs a shell command. Programs of a mount are run by a shell, since this process, waiting for its child to become one, could
// not answer.
func Sh(t testing.TB, command string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "/bin/sh", append([]string{"-c", command, "sh"}, args...)...).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

// Programs run from an overlayfs mount over a layer, and change it; whiteouts and opaque directories hide what is below.
func testOverlay(t *testing.T, open Open) {
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	base := t.TempDir()
	for _, name := range []string{"gone", "dir/gone", "dir/stays", "opaque/hidden"} {
		if err := os.MkdirAll(filepath.Join(base, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(base, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	everything := Everything(t)
	d, f, m := mount(t, open, everything)
	alone := Overlay(t, f.Target, Skeleton(t, everything))
	Compare(t, alone, everything, true)
	checkFiles(t, alone, everything)

	over := Overlay(t, f.Target, base)
	for name, there := range map[string]bool{"gone": false, "dir/gone": false, "dir/stays": true, "opaque/hidden": false, "opaque/new": true} {
		if _, err := os.Lstat(filepath.Join(over, name)); (err == nil) != there {
			t.Errorf("%s: %v, want it there: %t", name, err, there)
		}
		list, err := readDir(filepath.Join(over, filepath.Dir(name)))
		if _, ok := list[filepath.Base(name)]; err != nil || ok != there {
			t.Errorf("%s: listed %t, %v, want %t", name, ok, err, there)
		}
	}

	t.Log("copy-up")
	Sh(t, `cd "$1" && echo more >>dir/file && chmod 600 capable && mv attributed moved && rm -r many && ln one two`, over)
	CheckFile(t, filepath.Join(over, "dir/file"), append(bytes.Clone(f.Files["dir/file"]), "more\n"...))
	CheckFile(t, filepath.Join(over, "capable"), f.Files["capable"])
	CheckFile(t, filepath.Join(over, "moved"), f.Files["attributed"])
	CheckFile(t, f.Path("dir/file"), f.Files["dir/file"])
	value := make([]byte, 100)
	if n, err := unix.Getxattr(filepath.Join(over, "moved"), "user.a", value); err != nil || string(value[:n]) != "b" {
		t.Errorf("xattr after the copy-up: %q, %v", value[:max(n, 0)], err)
	}

	// What a program in a step may do, which has the first overlay as its root. The kernel stacks two filesystems above one that is on none.
	t.Log("an overlay of the overlay")
	nested := Overlay(t, over)
	CheckFile(t, filepath.Join(nested, "moved"), f.Files["attributed"])

	t.Log("programs")
	p := Lay(t, filepath.Dir(f.Dir), Build(t, File("bin/busybox", busybox).Perm(0o755), Link("bin/sh", "bin/busybox"), File("data", Noise(1<<20))))
	pm, err := d.Mount(t, p)
	if err != nil {
		t.Fatal(err)
	}
	programs := Overlay(t, p.Target)
	if out := Sh(t, `exec "$1"/bin/sh -c 'echo ran; echo x >>"$0"/data' "$1"`, programs); out != "ran\n" {
		t.Errorf("%q", out)
	}
	CheckFile(t, filepath.Join(programs, "data"), append(bytes.Clone(p.Files["data"]), "x\n"...))

	for _, o := range []string{nested, alone, over, programs} {
		if err := unix.Unmount(o, 0); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(m.Unmount(), pm.Unmount()); err != nil {
		t.Error(err)
	}
}

// While the kernel forgets, all that is listed is there, and all that is read is right.
func testDropCaches(t *testing.T, open Open) {
	_, f, _ := mount(t, open, Everything(t))
	over := Overlay(t, f.Target, Skeleton(t, f.Tree))
	stop := time.Now().Add(5 * time.Second)
	var forgetter, readers sync.WaitGroup
	var rounds, looked atomic.Int64
	done := make(chan struct{})
	forgetter.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				dropCaches(t)
				rounds.Add(1)
			}
		}
	})
	names := make([]string, 0, len(f.Files))
	for name := range f.Files {
		names = append(names, name)
	}
	for i := range 6 {
		root := []string{f.Target, over}[i%2]
		readers.Go(func() {
			for time.Now().Before(stop) && !t.Failed() {
				for _, dir := range []string{"", "dir", "many", "opaque"} {
					list, err := readDir(filepath.Join(root, dir))
					if err != nil {
						t.Error(err)
					}
					for name := range list {
						var st unix.Stat_t
						if err := unix.Lstat(filepath.Join(root, dir, name), &st); err != nil {
							t.Errorf("%q of %q is listed, but: %v", name, dir, err)
						}
						looked.Add(1)
					}
				}
				for range 100 {
					name := names[rand.IntN(len(names))]
					CheckFile(t, filepath.Join(root, name), f.Files[name])
				}
			}
		})
	}
	readers.Wait()
	close(done)
	forgetter.Wait()
	t.Logf("%d names looked at, caches dropped %d times", looked.Load(), rounds.Load())
}

// A demand gets through while others wait.
func testParallel(t *testing.T, open Open) {
	const size = 256 << 10
	var entries []Entry
	for i := range 64 {
		entries = append(entries, File(fmt.Sprintf("file%02d", i), Noise(size+i)))
	}
	tree := Build(t, entries...)
	root := t.TempDir()
	d := open(t, root)
	defer d.Close()
	f := Lay(t, root, tree)
	block := make(chan struct{})
	f.Filler.Before = func(ctx context.Context, off, _ int64) error {
		if off >= 60*(size+layer.BlockSize) { // the last few files
			return nil
		}
		select {
		case <-block:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	m, err := d.Mount(t, f)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, e := range entries[:60] {
		for range 2 {
			wg.Go(func() { CheckFile(t, f.Path(e.Name), e.Content) })
		}
	}
	for f.Filler.Calls.Load() < 60 {
		time.Sleep(time.Millisecond)
	}
	CheckFile(t, f.Path(entries[63].Name), entries[63].Content)
	close(block)
	wg.Wait()
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
}

// A read that is refused is EIO, and the next one may succeed.
func testRefused(t *testing.T, open Open) {
	root := t.TempDir()
	d := open(t, root)
	defer d.Close()
	f := Lay(t, root, Build(t, File("file", Noise(100<<10))))
	var refuse atomic.Bool
	refuse.Store(true)
	f.Filler.Before = func(context.Context, int64, int64) error {
		if refuse.Load() {
			return errors.New("refused")
		}
		return nil
	}
	if _, err := d.Mount(t, f); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if b, err := os.ReadFile(f.Path("file")); !errors.Is(err, unix.EIO) {
			t.Fatalf("%d bytes, %v, want EIO", len(b), err)
		}
	}
	refuse.Store(false)
	CheckFile(t, f.Path("file"), f.Files["file"])
}

// A reader that waits can be killed; what it waits for goes on.
func testKilled(t *testing.T, open Open) {
	root := t.TempDir()
	d := open(t, root)
	defer d.Close()
	f := Lay(t, root, Build(t, File("file", Noise(1<<20))))
	block := make(chan struct{})
	f.Filler.Before = func(ctx context.Context, _, _ int64) error {
		select {
		case <-block:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if _, err := d.Mount(t, f); err != nil {
		t.Fatal(err)
	}
	cat := exec.CommandContext(t.Context(), "cat", f.Path("file"))
	if err := cat.Start(); err != nil {
		t.Fatal(err)
	}
	for f.Filler.Calls.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond)
	if err := cat.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cat.Wait() }()
	select {
	case <-ended: //nolint:errcheck // it was killed
	case <-time.After(10 * time.Second):
		t.Error("the reader still waits")
	}
	close(block)
	CheckFile(t, f.Path("file"), f.Files["file"])
}

// denied are what a read through what is gone may come to. Success is none of it.
var denied = []error{unix.EIO, unix.ENOTCONN, unix.ECONNABORTED}

// Denied reports whether an error says that bytes are not to be had.
func Denied(err error) bool {
	return slices.ContainsFunc(denied, func(d error) bool { return errors.Is(err, d) })
}

// A layer is unmounted while it's in use: by an open file, and by overlayfs. Reads of what hasn't arrived fail, and none is zeros.
func testInUse(t *testing.T, open Open) {
	_, f, m := mount(t, open, Build(t, File("file", Noise(8<<20))))
	over := Overlay(t, f.Target)
	var files []*os.File
	for _, root := range []string{f.Target, over} {
		file, err := os.Open(filepath.Join(root, "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		files = append(files, file)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	calls := f.Filler.Calls.Load()
	b := make([]byte, 4096)
	for _, file := range files {
		if n, err := file.ReadAt(b, 4<<20); !Denied(err) {
			t.Errorf("%s: %d bytes, %v", file.Name(), n, err)
		}
	}
	if f.Filler.Calls.Load() > calls {
		t.Error("the filler is called after the unmount")
	}
}

// Close and Unmount end what waits.
func testEnd(t *testing.T, open Open) {
	for name, end := range map[string]func(Door, Mount) error{
		"close":   func(d Door, _ Mount) error { return d.Close() },
		"unmount": func(_ Door, m Mount) error { return m.Unmount() },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			d := open(t, root)
			defer d.Close()
			f := Lay(t, root, Build(t, File("file", Noise(1<<20))))
			f.Filler.Before = func(ctx context.Context, _, _ int64) error {
				<-ctx.Done()
				return context.Cause(ctx)
			}
			m, err := d.Mount(t, f)
			if err != nil {
				t.Fatal(err)
			}
			read := make(chan error)
			for range 20 {
				go func() {
					_, err := os.ReadFile(f.Path("file"))
					read <- err
				}()
			}
			for f.Filler.Calls.Load() == 0 {
				time.Sleep(time.Millisecond)
			}
			if err := end(d, m); err != nil {
				t.Error(err)
			}
			for range 20 {
				// Those who come late find what is below the mount.
				if err := <-read; !Denied(err) && !errors.Is(err, os.ErrNotExist) {
					t.Errorf("read: %v", err)
				}
			}
		})
	}
}
