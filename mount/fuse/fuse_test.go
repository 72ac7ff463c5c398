package fuse

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/mounttest"
)

// Environment of the test binary when it is the daemon that is killed, or a reader that gets a signal.
const (
	victimEnv = "FUSE_TEST_VICTIM"
	selfEnv   = "FUSE_TEST_SELF" // the victim reads what it serves
	readerEnv = "FUSE_TEST_READER"
)

// The test binary is its own guardian, too.
func TestMain(m *testing.M) {
	if GuardianMain(os.Args) {
		return
	}
	switch {
	case os.Getenv(victimEnv) != "":
		victim(os.Getenv(victimEnv))
	case os.Getenv(readerEnv) != "":
		reader(os.Getenv(readerEnv))
	default:
		os.Exit(mounttest.Main(m))
	}
}

func mustMount(t testing.TB, d *Door, opt MountOptions) *Mount {
	t.Helper()
	m, err := d.Mount(opt)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// Inode numbers don't depend on who asks when: index and one.
func TestInodeNumbers(t *testing.T) {
	root := t.TempDir()
	f := mounttest.Lay(t, root, mounttest.Everything(t))
	mustMount(t, openDoor(t, Options{Root: root}), options(f))
	for name := range f.Files {
		i := f.Inode(t, name)
		var st unix.Stat_t
		if err := unix.Lstat(f.Path(name), &st); err != nil || st.Ino != uint64(i)+1 {
			t.Errorf("%q: inode number %d, %v, want %d", name, st.Ino, err, i+1)
		}
	}
}

func TestUserXattr(t *testing.T) {
	root := t.TempDir()
	f := mounttest.Lay(t, root, mounttest.Everything(t))
	opt := options(f)
	opt.UserXattr = true
	mustMount(t, openDoor(t, Options{Root: root}), opt)
	b := make([]byte, 10)
	if n, err := unix.Lgetxattr(f.Path("opaque"), "user.overlay.opaque", b); err != nil || string(b[:n]) != "y" {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
	if _, err := unix.Lgetxattr(f.Path("opaque"), "trusted.overlay.opaque", b); !errors.Is(err, unix.ENODATA) {
		t.Errorf("trusted.overlay.opaque: %v", err)
	}
}

func TestMountTwice(t *testing.T) {
	root := t.TempDir()
	f := mounttest.Lay(t, root, mounttest.Build(t, mounttest.File("file", []byte("content"))))
	d := openDoor(t, Options{Root: root})
	m := mustMount(t, d, options(f))
	if _, err := d.Mount(options(f)); !errors.Is(err, unix.EBUSY) {
		t.Errorf("%v, want EBUSY", err)
	}
	for range 2 {
		if err := m.Unmount(); err != nil {
			t.Fatal(err)
		}
	}
	mustMount(t, d, options(f))
	mounttest.CheckFile(t, f.Path("file"), []byte("content"))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Mount(options(f)); !errors.Is(err, ErrClosed) {
		t.Errorf("%v, want ErrClosed", err)
	}
}

// A data file that is too short would be read as zeros.
func TestShortData(t *testing.T) {
	root := t.TempDir()
	f := mounttest.Lay(t, root, mounttest.Build(t, mounttest.File("file", mounttest.Noise(10_000))))
	if err := f.Data.Truncate(f.Layer.DataSize - 1); err != nil {
		t.Fatal(err)
	}
	if _, err := openDoor(t, Options{Root: root}).Mount(options(f)); err == nil {
		t.Error("mounted")
	}
}

// What can't be read of a data file, in the middle of a read, too, is an error, not the end of the file.
func TestDataGetsShort(t *testing.T) {
	for name, at := range map[string]int64{"copied": maxCopy / 2, "spliced": 3 * maxCopy} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			size := 2 * at
			f := mounttest.Lay(t, root, mounttest.Build(t, mounttest.File("file", mounttest.Noise(int(size)))))
			m := mustMount(t, openDoor(t, Options{Root: root}), options(f))
			file, err := os.Open(f.Path("file"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if err := errors.Join(f.Filler.Fill(t.Context(), 0, f.Layer.DataSize), m.Complete(), f.Data.Truncate(at)); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, size)
			if n, err := file.ReadAt(b, 0); !errors.Is(err, unix.EIO) {
				t.Errorf("%d of %d bytes, %v; want EIO", n, size, err)
			}
			if st, err := file.Stat(); err != nil || st.Size() != size {
				t.Errorf("the file has %d bytes now, %v; want %d", st.Size(), err, size)
			}
		})
	}
}

// Denied is told why a reader gets EIO.
func TestDenied(t *testing.T) {
	root := t.TempDir()
	f := mounttest.Lay(t, root, mounttest.Build(t, mounttest.File("file", mounttest.Noise(10_000))))
	refused := errors.New("refused")
	f.Filler.Before = func(context.Context, int64, int64) error { return refused }
	var told atomic.Pointer[string]
	d := openDoor(t, Options{Root: root, Denied: func(target string, off, n int64, err error) {
		s := fmt.Sprint(target == f.Target, off, n, err)
		told.Store(&s)
	}})
	mustMount(t, d, options(f))
	if _, err := os.ReadFile(f.Path("file")); !errors.Is(err, unix.EIO) {
		t.Errorf("%v, want EIO", err)
	}
	if s := told.Load(); s == nil || *s != "true 0 10000 refused" && *s != "true 0 8192 refused" && *s != "true 0 4096 refused" {
		t.Errorf("told of %v", s)
	}
}

// A read that waits ends with EINTR when the kernel says so, and what it waits for goes on.
func TestInterrupt(t *testing.T) {
	root := t.TempDir()
	f := mounttest.Lay(t, root, mounttest.Build(t, mounttest.File("file", mounttest.Noise(1<<20))))
	left := make(chan error, 10)
	var pass atomic.Bool
	f.Filler.Before = func(ctx context.Context, _, _ int64) error {
		if pass.Load() {
			return nil
		}
		<-ctx.Done()
		left <- errors.Join(ctx.Err(), context.Cause(ctx))
		return context.Cause(ctx)
	}
	var denials atomic.Int64
	d := openDoor(t, Options{Root: root, Denied: func(string, int64, int64, error) { denials.Add(1) }})
	mustMount(t, d, options(f))

	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), readerEnv+"="+f.Path("file"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for f.Filler.Calls.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the reader: %v: %s", err, out.String())
	}
	select {
	case err := <-left:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the filler's context: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the filler was not told")
	}
	if n := denials.Load(); n > 0 {
		t.Errorf("%d denials", n)
	}
	pass.Store(true)
	mounttest.CheckFile(t, f.Path("file"), f.Files["file"])
}

// reader reads with O_DIRECT, as the kernel lets no other read be interrupted, and wants EINTR for the signals it sends itself.
func reader(path string) {
	fail := func(v ...any) {
		fmt.Fprintln(os.Stdout, v...)
		os.Exit(1)
	}
	signal.Notify(make(chan os.Signal, 1), unix.SIGUSR1)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		fail(err)
	}
	buf, err := unix.Mmap(-1, 0, 1<<16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		fail(err)
	}
	tid := make(chan int)
	go func() {
		id := <-tid
		for {
			time.Sleep(100 * time.Millisecond)
			_ = unix.Tgkill(os.Getpid(), id, unix.SIGUSR1)
		}
	}()
	done := make(chan unix.Errno)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		_, _, errno := unix.Syscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0, 0)
		done <- errno
	}()
	select {
	case errno := <-done:
		if errno != unix.EINTR {
			fail("want EINTR, got", errno)
		}
	case <-time.After(10 * time.Second):
		fail("not interrupted")
	}
}

// startVictim starts a daemon that is to be killed, and returns where it has mounted a layer and what reads the lines that it prints.
func startVictim(t *testing.T, root string, env ...string) (cmd *exec.Cmd, target string, line func() string) {
	t.Helper()
	cmd = exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(append(os.Environ(), victimEnv+"="+root), env...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	line = func() string {
		lines.Scan()
		return lines.Text()
	}
	target = line()
	orphan := 0
	if _, err := fmt.Sscan(line(), &orphan); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Kill(orphan, unix.SIGKILL)
		_ = unix.Unmount(target, unix.MNT_DETACH)
	})
	return cmd, target, line
}

// A daemon that is killed leaves readers errors, never zeros, though a program that it started lives on; the next one clears up.
func TestKill(t *testing.T) {
	root := t.TempDir()
	cmd, target, line := startVictim(t, root)
	over := mounttest.Overlay(t, target)
	var opened []*os.File
	for _, dir := range []string{target, over} {
		file, err := os.Open(filepath.Join(dir, "slow"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		opened = append(opened, file)
	}
	mounttest.CheckFile(t, filepath.Join(target, "quick"), mounttest.Noise(100_000))
	waiting := make(chan error)
	for _, path := range []string{target, over, target, over} {
		go func() {
			b, err := os.ReadFile(filepath.Join(path, "slow"))
			if err == nil {
				err = fmt.Errorf("read %d bytes", len(b))
			}
			waiting <- err
		}()
	}
	if s := line(); s != "waiting" {
		t.Fatal(s)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		select {
		case err := <-waiting:
			if !mounttest.Denied(err) {
				t.Errorf("a read that waited: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("a read waits for the dead")
		}
	}
	b := make([]byte, 4096)
	for _, file := range opened {
		if n, err := file.ReadAt(b, 1<<19); !mounttest.Denied(err) {
			t.Errorf("a later read: %d bytes, %v", n, err)
		}
	}
	_ = cmd.Wait()

	if err := openDoor(t, Options{Root: root}).Close(); err != nil {
		t.Error(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte(strings.ReplaceAll(target, " ", `\040`))) {
		t.Errorf("still mounted, or %v", err)
	}
}

// A daemon that waits for its own answer, in a read or to mount an overlay, ends all the same when it's killed, and leaves the next one its locks.
func TestKillOneThatWaitsForItself(t *testing.T) {
	root := t.TempDir()
	cmd, _, line := startVictim(t, root, selfEnv+"=1")
	if s := line(); s != "waiting" {
		t.Fatal(s)
	}
	time.Sleep(200 * time.Millisecond) // until its other threads wait, too
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() { gone <- cmd.Wait() }()
	select {
	case <-gone:
	case <-time.After(20 * time.Second):
		err := detachBelow(root) // so that the test ends
		t.Fatal("it waits for itself, ", err)
	}
	if err := openDoor(t, Options{Root: root}).Close(); err != nil {
		t.Error(err)
	}
}

// A guardian that ends is replaced.
func TestGuardianEnds(t *testing.T) {
	d := openDoor(t, Options{Root: t.TempDir()})
	last := 0
	for range 3 {
		pid := 0
		for begin := time.Now(); pid == 0 || pid == last; time.Sleep(10 * time.Millisecond) {
			if time.Since(begin) > 20*time.Second {
				t.Fatalf("there is no other one than %d", last)
			}
			pid = guardianOf(t, d.opt.Root)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		last = pid
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if pid := guardianOf(t, d.opt.Root); pid != 0 {
		t.Errorf("%d is still there", pid)
	}
}

// guardianOf returns the process that guards a root, 0 if there's none.
func guardianOf(t *testing.T, root string) int {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && string(b) == guardianName+"\x00"+root+"\x00" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	return 0
}

// victim serves until it is killed.
func victim(root string) {
	t := &process{}
	tree := mounttest.Build(t, mounttest.File("slow", mounttest.Noise(1<<20)), mounttest.File("quick", mounttest.Noise(100_000)))
	f := mounttest.Lay(t, root, tree)
	slow := &tree.Layer.Inodes[tree.Inode(t, "slow")]
	end := slow.Data + slow.Size
	var told atomic.Bool
	f.Filler.Before = func(_ context.Context, off, _ int64) error {
		if off < end {
			if !told.Swap(true) {
				fmt.Fprintln(os.Stdout, "waiting")
			}
			select {}
		}
		return nil
	}
	d, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Mount(options(f)); err != nil {
		t.Fatal(err)
	}
	orphan := exec.CommandContext(t.Context(), "sleep", "60")
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(os.Stdout, f.Target)
	fmt.Fprintln(os.Stdout, orphan.Process.Pid)
	if os.Getenv(selfEnv) != "" {
		go readDirectly(filepath.Join(f.Target, "slow"))
	}
	select {}
}

// readDirectly reads with O_DIRECT: by a request that is waited for, as for an attribute.
func readDirectly(path string) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT, 0)
	if err == nil {
		_, err = unix.Pread(fd, make([]byte, 4096), 0)
	}
	fmt.Fprintln(os.Stderr, "read: ", err)
}

// process is a testing.TB where there is no test.
type process struct{ testing.TB }

func (*process) Helper()                  {}
func (*process) Cleanup(func())           {}
func (*process) Context() context.Context { return context.Background() }
func (*process) Fatal(v ...any) {
	fmt.Fprintln(os.Stderr, v...)
	os.Exit(1)
}

// A read's context ends when it's interrupted, and with the mount.
func TestReadContext(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(m *Mount, interrupt chan struct{})
		want error
	}{
		"interrupt": {func(_ *Mount, interrupt chan struct{}) { close(interrupt) }, context.Canceled},
		"unmount":   {func(m *Mount, _ chan struct{}) { m.end(ErrUnmounted) }, ErrUnmounted},
	} {
		t.Run(name, func(t *testing.T) {
			m := &Mount{}
			m.lifetime, m.end = context.WithCancelCause(t.Context())
			interrupt := make(chan struct{})
			ctx := &readContext{Context: m.lifetime, m: m, interrupt: interrupt}
			child, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			if ctx.Err() != nil {
				t.Error(ctx.Err())
			}
			test.end(m, interrupt)
			<-ctx.Done()
			<-child.Done()
			if cause := context.Cause(ctx); !errors.Is(cause, test.want) {
				t.Errorf("%v, want %v", cause, test.want)
			}
			ctx.end()
			m.calls.Wait()
		})
	}
	m := &Mount{lifetime: t.Context()}
	(&readContext{Context: m.lifetime, m: m}).end() // nobody has waited
	m.calls.Wait()
}

// Directories are resumed anywhere, with any buffer.
func TestReadDirResume(t *testing.T) {
	tree := mounttest.Everything(t)
	ft := newTree(&Mount{opt: MountOptions{Layer: tree.Layer}})
	dir := tree.Inode(t, "many")
	var names []string
	for off := uint64(0); ; {
		buf := make([]byte, 300+off%1000)
		list := gofuse.NewDirEntryList(buf, off)
		in := &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: node(dir)}, Offset: off}
		if status := ft.ReadDir(nil, in, list); !status.Ok() {
			t.Fatal(status)
		}
		if list.Offset == off {
			break
		}
		for at := off; at < list.Offset; at++ {
			name, _, _ := ft.dirent(dir, at)
			names = append(names, name)
		}
		off = list.Offset
	}
	if len(names) != 3002 || !slices.Equal(names[:2], []string{".", ".."}) {
		t.Errorf("%d names", len(names))
	}
	if list := gofuse.NewDirEntryList(make([]byte, 4096), 1<<62); !ft.ReadDir(nil, &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: node(dir)}, Offset: 1 << 62}, list).Ok() || list.Offset != 1<<62 {
		t.Error("entries behind the end")
	}
}

// A layer whose tree the disk doesn't give back any more is an I/O error, once told, and neither the end of the daemon nor that of its other layers.
func TestUnreadableTree(t *testing.T) {
	root := t.TempDir()
	var told atomic.Int64
	d := openDoor(t, Options{Root: root, Denied: func(_ string, _, _ int64, err error) {
		if !errors.Is(err, layer.ErrUnreadable) {
			t.Error(err)
		}
		told.Add(1)
	}})
	other := mounttest.Lay(t, root, mounttest.Everything(t))
	mustMount(t, d, options(other))
	f := mounttest.Lay(t, root, mounttest.Everything(t))
	tree, err := os.Create(filepath.Join(t.TempDir(), "tree"))
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	opt := options(f)
	if opt.Layer, err = f.Layer.Pack(tree); err != nil {
		t.Fatal(err)
	}
	m := mustMount(t, d, opt)
	mounttest.CheckFile(t, f.Path("one"), f.Files["one"])
	if err := tree.Truncate(0); err != nil { // as if the disk had failed
		t.Fatal(err)
	}
	var st unix.Stat_t
	buf := make([]byte, 100)
	for what, use := range map[string]func() error{
		"a name":               func() error { return unix.Lstat(f.Path("big"), &st) },
		"a name that isn't":    func() error { return unix.Lstat(f.Path("none such"), &st) },
		"a symlink":            func() error { _, err := unix.Readlink(f.Path("symlink"), buf); return err },
		"a list":               func() error { _, err := os.ReadDir(f.Path("")); return err },
		"attributes":           func() error { _, err := unix.Getxattr(f.Path("one"), "user.a", buf); return err },
		"a list of attributes": func() error { _, err := unix.Listxattr(f.Path("one"), buf); return err },
	} {
		if err := use(); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %v, want EIO", what, err)
		}
	}
	if n := told.Load(); n != 1 {
		t.Errorf("told %d times", n)
	}
	mounttest.Compare(t, other.Target, other.Tree, false)
	if err := m.Unmount(); err != nil {
		t.Error(err)
	}
}
