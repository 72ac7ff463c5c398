package erofs

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// victimEnv makes the test binary a daemon that is to be killed: it holds a victimOptions.
const victimEnv = "EROFS_TEST_VICTIM"

type victimOptions struct {
	Root  string
	Mount MountOptions `json:",omitzero"`
	Size  int          // of the file
	Slow  time.Duration
	Sum   string // or the SHA-256 of a file is wanted, by mmap
}

// victim mounts a layer and fills it slowly, until it is killed.
func victim() {
	var opt victimOptions
	if err := json.Unmarshal([]byte(os.Getenv(victimEnv)), &opt); err != nil {
		panic(err)
	}
	if opt.Sum != "" {
		sumMapped(opt.Sum)
		return
	}
	data, err := OpenData(opt.Mount.Data)
	if err != nil {
		panic(err)
	}
	d, err := Open(Options{Root: opt.Root})
	if err != nil {
		panic(err)
	}
	content := noise(opt.Size)
	content = append(content, make([]byte, -len(content)&4095)...)
	opt.Mount.Filler = &source{content: content, data: data, before: func(context.Context, int64, int64) error {
		time.Sleep(rand.N(opt.Slow + 1))
		return nil
	}}
	if _, err := d.Mount(opt.Mount); err != nil {
		panic(err)
	}
	_, _ = os.Stdout.WriteString("ready\n")
	select {}
}

func sumMapped(path string) {
	f, err := os.Open(path)
	if err != nil {
		panic(err)
	}
	fi, err := f.Stat()
	if err != nil {
		panic(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(os.Stdout, "%x", sha256.Sum256(b))
}

// run starts the test binary as something else.
func run(t testing.TB, opt victimOptions) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(opt)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), victimEnv+"="+string(b))
	cmd.Stderr = os.Stderr
	return cmd
}

// startVictim returns when the layer is mounted.
func startVictim(t testing.TB, root string, f *files, slow time.Duration, inherited ...*os.File) *exec.Cmd {
	t.Helper()
	cmd := run(t, victimOptions{Root: root, Mount: f.opt, Size: len(f.paths["file"]), Slow: slow})
	cmd.ExtraFiles = inherited
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if gone := guardiansEnd(root); !gone {
			t.Error("the guardian still runs")
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return cmd
}

func kill(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

// guardians returns the process IDs of those of a directory.
func guardians(root string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if line, err := os.ReadFile(p); err == nil && string(line) == guardianName+"\x00"+root+"\x00" {
			pid, _ := strconv.Atoi(strings.Split(p, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// guardiansEnd waits for that.
func guardiansEnd(root string) bool {
	for range 3000 {
		if len(guardians(root)) == 0 {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

// TestNoZerosAfterCrash is promise 2: whenever the daemon is killed, whoever reads gets the right bytes or EIO.
func TestNoZerosAfterCrash(t *testing.T) {
	needRoot(t)
	denied, root := 0, t.TempDir()
	for round := range 20 {
		f := one(t, root, 4<<20)
		cmd := startVictim(t, root, f, 3*time.Millisecond)
		var open []*os.File
		var wg sync.WaitGroup
		var good, bad atomic.Int64
		for range 8 {
			file, err := os.Open(f.path("file"))
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, file)
			wg.Go(func() {
				b := make([]byte, 32<<10)
				for _, i := range rand.Perm(4 << 20 / len(b)) {
					off := int64(i * len(b))
					n, err := file.ReadAt(b, off)
					if !bytes.Equal(b[:n], f.content[off:off+int64(n)]) {
						t.Errorf("round %d: wrong bytes at %d", round, off)
					}
					switch {
					case err == nil:
						good.Add(1)
					case errors.Is(err, unix.EIO):
						bad.Add(1)
					default:
						t.Error(err)
					}
				}
			})
		}
		time.Sleep(rand.N(60 * time.Millisecond))
		kill(t, cmd)
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatal("readers wait for ever")
		}
		if bad.Load() > 0 {
			denied++
		}
		t.Logf("round %d: %d good, %d EIO", round, good.Load(), bad.Load())
		for _, file := range open {
			file.Close()
		}
		if !guardiansEnd(root) {
			t.Fatal("the guardian still runs")
		}
		if b, err := os.ReadDir(f.opt.Target); err != nil || len(b) > 0 {
			t.Errorf("the mount is still there: %v %v", b, err)
		}
	}
	if denied == 0 {
		t.Error("no round ended in mid-read")
	}
}

// The next daemon goes on: what still reads through the old mount is served once the layer is mounted again.
func TestNextDaemon(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	f := one(t, root, 4<<20)
	cmd := startVictim(t, root, f, 0)
	old, err := os.Open(f.path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	b := make([]byte, 4096)
	if _, err := old.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	kill(t, cmd)
	if n, err := old.ReadAt(b, 1<<20); !errors.Is(err, unix.EIO) {
		t.Fatalf("%d bytes, %v, want EIO", n, err)
	}

	d, _ := openDoor(t, root)
	if pids := guardians(root); len(pids) > 2 {
		t.Errorf("guardians %v", pids)
	}
	if n, err := old.ReadAt(b, 1<<20); !errors.Is(err, unix.EIO) {
		t.Fatalf("before the mount: %d bytes, %v, want EIO", n, err)
	}
	m := mount(t, d, f, f.source(t)) // whose descriptor is younger than the mark
	if _, err := old.ReadAt(b, 1<<20); err != nil || !bytes.Equal(b, f.content[1<<20:1<<20+4096]) {
		t.Fatalf("through the old mount: %v", err)
	}
	checkFile(t, f.path("file"), f.content)
	old.Close()
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if len(d.mounts) > 0 {
		t.Errorf("%d mounts left", len(d.mounts))
	}
}

// What outlives Close gets EIO.
func TestCloseInUse(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	f := one(t, d.opt.Root, 1<<20)
	mount(t, d, f, f.source(t))
	open, err := os.Open(f.path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := open.ReadAt(make([]byte, 1), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("%d bytes, %v, want EIO", n, err)
	}
	open.Close()
	if !guardiansEnd(d.opt.Root) {
		t.Error("the guardian still runs")
	}
}

// A guardian holds nothing that it doesn't need, and is there again when it has been killed.
func TestGuardian(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	f := one(t, root, 1<<20)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := startVictim(t, root, f, 0, w)
	w.Close()
	pids := guardians(root)
	if len(pids) != 1 {
		t.Fatalf("guardians %v", pids)
	}
	pid := pids[0]
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session %d, %v, want its own", sid, err)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		t.Log(e.Name(), to)
		if strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "/dev/") && to != "/dev/null" {
			t.Errorf("descriptor %s is %s", e.Name(), to)
		}
	}
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
		for line := range strings.Lines(string(status)) {
			if strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "RssAnon") {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond)
	if now := guardians(root); len(now) != 1 || now[0] != pid {
		t.Fatalf("guardians %v after signals, want %d", now, pid)
	}

	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if now := guardians(root); len(now) == 1 && now[0] != pid {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond)
	file, err := os.Open(f.path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	kill(t, cmd)
	if n, err := file.ReadAt(make([]byte, 1), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("%d bytes, %v, want EIO", n, err)
	}
	// Nobody else has the other end of the pipe.
	if _, err := io.ReadAll(r); err != nil {
		t.Error(err)
	}
	file.Close()
}

// A program that would not become a guardian is found out.
func TestNotAGuardian(t *testing.T) {
	needRoot(t)
	if d, err := Open(Options{Root: t.TempDir(), Guardian: "/bin/true"}); err == nil {
		d.Close()
		t.Error("Open took /bin/true for a guardian")
	} else {
		t.Log(err)
	}
}

func TestMmap(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	f := one(t, d.opt.Root, 5<<20+1)
	mount(t, d, f, f.source(t))
	// By another process: a fault holds locks that the one which answers may need.
	got, err := run(t, victimOptions{Sum: f.path("file")}).Output()
	if want := fmt.Sprintf("%x", sha256.Sum256(f.paths["file"])); err != nil || string(got) != want {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
}
