package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// mountExt4 mounts an ext4 of 64 MiB until the test ends.
func mountExt4(t *testing.T, dir string) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "ext4")
	for _, argv := range [][]string{
		{"truncate", "-s", "64M", image},
		{"mkfs.ext4", "-q", "-F", "-m", "0", image},
		{"mount", "-o", "loop", image, dir},
	} {
		if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", argv, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// smallDisk mounts 64 MiB until the test ends, half of which a file takes.
func smallDisk(t *testing.T, door []string) (dir, ballast string) {
	t.Helper()
	dir = t.TempDir()
	if door[0] == throughDoor("erofs")[0] {
		mountExt4(t, dir)
	} else {
		mountTmpfs(t, dir, 0, "size=64m")
	}
	ballast = filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, ballast
}

// TestDiskFullInMidRUN fills the disk by what a step reads: the build fails and says so, the daemon lives on, and once there is room the
// build succeeds. The kernel door needs a disk for that, FUSE has a tmpfs.
func TestDiskFullInMidRUN(t *testing.T) {
	m := newMidRUN(t)
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		dir, ballast := smallDisk(t, door)
		reg := m.serve(t, registry.Options{})
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door, Root: filepath.Join(dir, "root")})
		s := client.Solve{Dockerfile: "FROM " + reg.Ref(midRUNName) + "\nRUN sha256sum /big/0 && sha256sum /big/*\n"}
		res := tryBuild(t, d, s)
		if res.Err == "" {
			t.Fatal("32 MiB were read onto a disk with less room")
		}
		wantContains(t, "output", res.Output(), digest.FromString(noise(0, 1<<20)).Encoded(), "Input/output error")
		wantContains(t, "error", res.Err, "no space left on device", m.top.String())
		if err := daemon.Answers(t.Context(), d.Addr); err != nil {
			t.Error(err)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		res = build(t, d, s)
		for i := range uint64(32) {
			wantContains(t, "output once there is room", res.Output(), digest.FromString(noise(i, 1<<20)).Encoded())
		}
	})
}

// TestBackgroundFillLeavesRoom has a layer that doesn't fit: what nobody has read doesn't take the disk from the step.
func TestBackgroundFillLeavesRoom(t *testing.T) {
	m := newMidRUN(t)
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		dir, _ := smallDisk(t, door)
		reg := m.serve(t, registry.Options{})
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[lazy]\nbackground-fetch = true\n", Env: door, Root: filepath.Join(dir, "root")})
		from := "FROM " + reg.Ref(midRUNName) + "\n"
		build(t, d, client.Solve{Dockerfile: from + "RUN sha256sum /big/0\n"})
		time.Sleep(3 * time.Second) // it fetches when no step runs
		res := build(t, d, client.Solve{Dockerfile: from + "RUN dd if=/dev/zero of=/out bs=1M count=4\n"})
		wantContains(t, "output", res.Output(), "4+0 records out")
		wantContains(t, "log", d.Logs(), "background-fetch waits for room", "a tenth of the disk")
	})
}
