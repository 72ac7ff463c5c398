package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
)

// TestDemoInterrupted interrupts the demo while a build runs: no mount, process, namespace or file stays.
func TestDemoInterrupted(t *testing.T) {
	// Sockets have short names: not below t.TempDir.
	dir, err := os.MkdirTemp("", "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./cmd/demo").CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	demo := exec.CommandContext(t.Context(), bin)
	demo.Env = append(os.Environ(), "TMPDIR="+dir)
	// As at a terminal, where ^C reaches the whole group.
	demo.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said lockedBuffer
	demo.Stdout, demo.Stderr = &said, &said
	if err := demo.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- demo.Wait() }()
	defer func() { _ = syscall.Kill(-demo.Process.Pid, syscall.SIGKILL) }()

	// A mounted layer means that the build is on its way.
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		mounts, err := daemon.MountsBelow(dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(mounts) > 0 {
			break
		}
		select {
		case err := <-exited:
			t.Fatalf("the demo ended before it mounted anything: %v\n%s", err, said.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("the demo mounts nothing:\n%s", said.String())
		}
	}
	namespaces, err := filepath.Glob("/run/netns/lz" + strconv.Itoa(demo.Process.Pid) + "-*")
	if err != nil || len(namespaces) != 2 {
		t.Errorf("the running demo has namespaces %q, %v; want two", namespaces, err)
	}

	if err := syscall.Kill(-demo.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	select {
	case <-exited:
		if code := demo.ProcessState.ExitCode(); code != 130 {
			t.Errorf("the interrupted demo ended with status %d, want 130\n%s", code, said.String())
		}
	case <-time.After(time.Minute):
		t.Fatalf("the interrupted demo does not end:\n%s", said.String())
	}
	for _, ns := range namespaces {
		if _, err := os.Stat(ns); err == nil {
			t.Errorf("the demo left network namespace %s", ns)
		}
	}
	if mounts, err := daemon.MountsBelow(dir); err != nil || len(mounts) > 0 {
		t.Errorf("the demo left mounts %q, %v", mounts, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the demo left files %v, %v", left, err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if raw, err := os.ReadFile(p); err == nil && strings.Contains(string(raw), dir) {
			t.Errorf("the demo left process %s: %q", p, raw)
		}
	}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
