package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestLeftStepsAreEnded kills the daemon while a step runs, and as if another step's container had been created and not yet
// started. The next daemon ends both, and when it ends itself, nothing is left, no guardian either.
func TestLeftStepsAreEnded(t *testing.T) {
	im := busybox(t)
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := startRegistry(t, registry.Options{})
		push(t, reg, "base:estargz", im, baseimage.EStargz)
		opt := daemon.Options{Config: plainHTTP(reg), Env: door, Root: t.TempDir()}
		d := startDaemon(t, opt)
		running := make(chan struct{})
		signal := reg.OnSignal("running", func(*http.Request) string {
			close(running)
			return ""
		})
		from := "FROM " + reg.Ref("base:estargz") + "\n"
		// Through the FUSE door, what runs from a lazy layer gets a signal when it needs another page.
		step := "RUN mkdir /b && cp /bin/busybox /b && exec /b/busybox sh -c '/b/busybox wget -q -O /dev/null " + signal + "; exec /b/busybox sleep 1000'\n"
		var wg sync.WaitGroup
		wg.Go(func() {
			res, err := (client.Buildctl{Addr: d.Addr}).Build(t.Context(), client.Solve{Dockerfile: from + step})
			if err != nil || res.Err == "" {
				t.Errorf("a build whose daemon is killed: %+v, %v", res, err)
			}
		})
		select {
		case <-running:
		case <-time.After(time.Minute):
			t.Fatal("the step doesn't run")
		}
		d.Kill()
		wg.Wait()

		bundles := bundlesOf(t, d)
		if len(bundles) != 1 {
			t.Fatalf("bundles %q, want the step's", bundles)
		}
		left := []string{filepath.Base(bundles[0]), filepath.Base(bundles[0]) + "-created"}
		t.Cleanup(func() { // if they are still there
			for _, id := range left {
				_ = exec.Command("runc", "delete", "--force", id).Run() //nolint:noctx // when the test is over
			}
		})
		createLike(t, bundles[0], left[1])
		var pids []int
		for i, status := range []string{"running", "created"} {
			c := containerOf(t, left[i])
			if c.Status != status || !alive(t, c.Pid) {
				t.Fatalf("container %+v, want it %s", c, status)
			}
			pids = append(pids, c.Pid)
		}

		next := startDaemon(t, opt)
		for i, pid := range pids {
			if alive(t, pid) {
				t.Errorf("process %d of container %s lives", pid, left[i])
			}
			if out, err := exec.CommandContext(t.Context(), "runc", "state", left[i]).Output(); err == nil {
				t.Errorf("runc knows container %s: %s", left[i], out)
			}
		}
		if bundles := bundlesOf(t, next); len(bundles) > 0 {
			t.Errorf("bundles are left: %q", bundles)
		}
		if mounts, err := next.Mounts(); err != nil || len(mounts) > 0 {
			t.Errorf("mounts are left: %q, %v", mounts, err)
		}
		wantContains(t, "output", build(t, next, client.Solve{Dockerfile: from + "RUN echo goes on\n"}).Output(), "goes on")
		stopDaemon(t, next)
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			guardians := guardiansOf(t, next)
			if len(guardians) == 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("guardians are left: %q", guardians)
			}
		}
	})
}

func bundlesOf(t *testing.T, d *daemon.Daemon) []string {
	t.Helper()
	rootfs, err := filepath.Glob(filepath.Join(d.Root, "runc-*", "executor", "*", "rootfs"))
	if err != nil {
		t.Fatal(err)
	}
	for i, dir := range rootfs {
		rootfs[i] = filepath.Dir(dir)
	}
	return rootfs
}

// createLike leaves a bundle and a container behind, as a daemon does that is killed between runc's create and start.
func createLike(t *testing.T, bundle, id string) {
	t.Helper()
	created := filepath.Join(filepath.Dir(bundle), id)
	if err := os.MkdirAll(filepath.Join(created, "rootfs"), 0o711); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(filepath.Join(bundle, "rootfs"), filepath.Join(created, "rootfs"), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(created, "rootfs"), unix.MNT_DETACH) }) // if it's still there
	config, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, created, "config.json", strings.ReplaceAll(string(config), filepath.Base(bundle), id))
	log := filepath.Join(t.TempDir(), "runc.log")
	// Without our pipes, which the container would keep open.
	if err := exec.CommandContext(t.Context(), "runc", "--log", log, "create", "--bundle", created, id).Run(); err != nil {
		said, _ := os.ReadFile(log)
		t.Fatalf("runc create: %v\n%s", err, said)
	}
}

type container struct {
	Status string
	Pid    int
}

func containerOf(t *testing.T, id string) container {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "runc", "state", id).Output()
	if err != nil {
		t.Fatalf("runc state %s: %v", id, err)
	}
	var c container
	if err := json.Unmarshal(out, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// alive reports whether there is such a process; a zombie is none.
func alive(t *testing.T, pid int) bool {
	t.Helper()
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return len(cmdline) > 0
}

// guardiansOf returns the command lines of the guardians on a daemon's state directory.
func guardiansOf(t *testing.T, d *daemon.Daemon) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		cmdline, err := os.ReadFile(f)
		if err == nil && bytes.HasPrefix(cmdline, []byte("buildkitd-lazy-guardian\x00"+d.Root)) {
			found = append(found, string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
	}
	return found
}
