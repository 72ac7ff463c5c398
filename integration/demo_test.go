package integration

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
)

// TestDemoInterrupted interrupts the demo while a build runs: no mount, process, namespace or file stays.
func TestDemoInterrupted(t *testing.T) { interrupt(t, "demo") }

// TestBenchInterrupted does the same to the bench.
func TestBenchInterrupted(t *testing.T) {
	interrupt(t, "bench", "-quick", "-contestant", "ours", "-workload", "readall")
}

// interrupt builds and starts a command of this module, interrupts it when it has mounted
// something, and looks for what it left.
func interrupt(t *testing.T, name string, args ...string) {
	t.Helper()
	// Sockets have short names: not below t.TempDir.
	dir, err := os.MkdirTemp("", "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin := filepath.Join(t.TempDir(), name)
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./cmd/"+name).CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	cmd := exec.CommandContext(t.Context(), bin, args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	// As at a terminal, where ^C reaches the whole group.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said daemon.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	defer func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }()

	// A mounted layer means that the build is on its way; the daemon's self-tests mount others while it starts. Before that an image of the
	// toolchain is compressed, if no run before has left one.
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		mounts, err := daemon.MountsBelow(dir)
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(mounts, func(m string) bool { return !strings.Contains(m, "-probe-") }) {
			break
		}
		select {
		case err := <-exited:
			t.Fatalf("%s ended before it mounted anything: %v\n%s", name, err, said.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s mounts nothing:\n%s", name, said.String())
		}
	}
	namespaces, err := filepath.Glob("/run/netns/lz" + strconv.Itoa(cmd.Process.Pid) + "-*")
	if err != nil || len(namespaces) != 2 {
		t.Errorf("%s, running, has namespaces %q, %v; want two", name, namespaces, err)
	}

	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	select {
	case <-exited:
		if code := cmd.ProcessState.ExitCode(); code != 130 {
			t.Errorf("%s, interrupted, ended with status %d, want 130\n%s", name, code, said.String())
		}
	case <-time.After(time.Minute):
		t.Fatalf("%s, interrupted, does not end:\n%s", name, said.String())
	}
	for _, ns := range namespaces {
		if _, err := os.Stat(ns); err == nil {
			t.Errorf("%s left network namespace %s", name, ns)
		}
	}
	if mounts, err := daemon.MountsBelow(dir); err != nil || len(mounts) > 0 {
		t.Errorf("%s left mounts %q, %v", name, mounts, err)
	}
	var left []string
	if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		left = append(left, strings.TrimPrefix(path, dir))
		return err
	}); err != nil || len(left) > 1 {
		t.Errorf("%s left files %q, %v\n%s", name, left[1:], err, said.String())
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if raw, err := os.ReadFile(p); err == nil && strings.Contains(string(raw), dir) {
			t.Errorf("%s left process %s: %q", name, p, raw)
		}
	}
}
