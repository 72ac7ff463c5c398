// Package integration tests buildkitd-lazy from outside: the real binary, a real
// registry, real mounts, real Dockerfiles. The tests need root, /dev/fuse and runc
// and fail where one is missing; `make integration` builds the binaries they
// run.
package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// cache holds base images between runs.
var cache string

func TestMain(m *testing.M) {
	stop := cleanup.Trap()
	code, err := func() (int, error) {
		if err := missing(); err != nil {
			return 0, err
		}
		var err error
		if cache, err = baseimage.CacheDir(); err != nil {
			return 0, err
		}
		flag.Parse()
		// Tests that are parallel wait: for a registry that is out of order, or for a daemon to be killed.
		if err := flag.Set("test.parallel", fmt.Sprint(max(8, 2*runtime.GOMAXPROCS(0)))); err != nil {
			return 0, err
		}
		return m.Run(), nil
	}()
	cleanup.All()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration tests cannot run:", err)
		code = 1
	}
	os.Exit(code)
}

// missing returns what keeps the tests from meaning anything on this machine. It builds
// binaries that are not there.
func missing() error {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("they need root"))
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		errs = append(errs, fmt.Errorf("lazy mounts: %w", err))
	}
	for _, tool := range []string{"runc", "ip", "tar", "busybox", "mkfs.ext4"} {
		if _, err := exec.LookPath(tool); err != nil {
			errs = append(errs, fmt.Errorf("%w; `make deps` installs it", err))
		}
	}
	for _, bin := range []string{daemon.OursBinary, daemon.StockBinary, daemon.BuildctlBinary, daemon.BuildxBinary} {
		if _, err := daemon.Bin(bin); err == nil {
			continue
		}
		if out, err := exec.Command("make", "-C", "..", "build", "tools").CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("make build tools: %w\n%s", err, out))
		}
		break
	}
	return errors.Join(errs...)
}

// doors are how a lazy layer is read, and whether this host has them.
var doors = []struct {
	name    string
	missing func() error
}{
	{"erofs", sync.OnceValue(func() error { return checkDoor("erofs") })},
	{"fuse", sync.OnceValue(func() error { return checkDoor("fuse") })},
}

// throughDoor is the environment of a daemon that uses a door.
func throughDoor(door string) []string { return []string{"BUILDKITD_LAZY_MOUNT=" + door} }

func checkDoor(door string) error {
	bin, err := daemon.Bin(daemon.OursBinary)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Minute, errors.New("check hangs"))
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "check")
	cmd.Env = append(os.Environ(), throughDoor(door)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("buildkitd-lazy check: %w\n%s", err, out)
	}
	return nil
}

// eachDoor runs a test with the kernel door, where this host has it, and with FUSE.
func eachDoor(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	for _, door := range doors {
		t.Run(door.name, func(t *testing.T) {
			needDoor(t, door.name, door.missing)
			t.Setenv("BUILDKITD_LAZY_MOUNT", door.name) // the daemon's environment is ours
			test(t)
		})
	}
}

// eachDoorAtOnce is eachDoor for a test that waits more than it computes: it runs beside others that are parallel, and has
// env for its daemons.
func eachDoorAtOnce(t *testing.T, test func(t *testing.T, env []string)) {
	t.Helper()
	for _, door := range doors {
		t.Run(door.name, func(t *testing.T) {
			t.Parallel()
			needDoor(t, door.name, door.missing)
			test(t, throughDoor(door.name))
		})
	}
}

func needDoor(t *testing.T, door string, missing func() error) {
	t.Helper()
	switch err := missing(); {
	case err == nil:
	case door == "fuse" || os.Getenv("CI") != "":
		t.Fatal(err) // CI's kernel has both doors
	default:
		t.Skip(err)
	}
}

// startRegistry serves an empty registry until the test ends.
func startRegistry(t *testing.T, opt registry.Options) *registry.Registry {
	t.Helper()
	if opt.Dir == "" {
		opt.Dir = t.TempDir()
	}
	reg, err := registry.Start(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := reg.Close(); err != nil {
			t.Errorf("close the registry: %v", err)
		}
		if t.Failed() {
			for _, e := range reg.Log.Entries() {
				t.Logf("registry: %s %s %q: %d, %d bytes in %.2fs", e.Method, e.Path, e.Range, e.Status, e.Bytes, e.Took)
			}
		}
	})
	return reg
}

// plainHTTP is the configuration of a daemon for a registry without TLS.
func plainHTTP(reg *registry.Registry) string {
	return fmt.Sprintf("[registry.%q]\nhttp = true\n", reg.Host)
}

// startDaemon runs a daemon until the test ends. The test fails if ours leaves mounts
// or does not end by SIGTERM with status 0.
func startDaemon(t *testing.T, opt daemon.Options) *daemon.Daemon {
	t.Helper()
	if opt.Kind == "" {
		opt.Kind = daemon.Ours
	}
	if opt.Kind == daemon.Ours && !strings.Contains(opt.Config, "background-fetch") {
		// Tests count the bytes that steps fetch.
		opt.Config += "\n[worker.oci.stargzSnapshotter]\nno_background_fetch = true\n"
	}
	d, err := daemon.Start(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stopDaemon(t, d)
		if t.Failed() {
			t.Logf("log of %s:\n%s", d.Kind, d.Logs())
		}
		if err := d.Close(); err != nil {
			t.Errorf("close %s: %v", d.Kind, err)
		}
	})
	return d
}

// stopDaemon ends a daemon by SIGTERM. For ours, it checks status and mounts.
func stopDaemon(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	select {
	case <-d.Exited():
		return // the test ended it
	default:
	}
	status, err := d.Stop()
	if err != nil {
		t.Error(err)
	}
	if d.Kind != daemon.Ours || status == -1 {
		return // stock leaves mounts; a killed daemon does too
	}
	if status != 0 {
		t.Errorf("%s ended with status %d after SIGTERM, want 0", d.Kind, status)
	}
	mounts, err := d.Mounts()
	if err != nil {
		t.Error(err)
	}
	if len(mounts) > 0 {
		t.Errorf("%s left mounts: %q", d.Kind, mounts)
	}
}

// build runs a build by buildctl that must succeed.
func build(t *testing.T, d *daemon.Daemon, s client.Solve) *client.Result {
	t.Helper()
	res := tryBuild(t, d, s)
	if res.Err != "" {
		t.Fatalf("build by %s failed: %s\n%s%s", d.Kind, res.Err, res.Output(), res.Plain)
	}
	return res
}

// buildFails runs a build by buildctl that must fail, and returns what the client said.
func buildFails(t *testing.T, d *daemon.Daemon, s client.Solve) string {
	t.Helper()
	res := tryBuild(t, d, s)
	if res.Err == "" {
		t.Fatalf("build by %s succeeded:\n%s%s", d.Kind, res.Output(), res.Plain)
	}
	return res.Err
}

func tryBuild(t *testing.T, d *daemon.Daemon, s client.Solve) *client.Result {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 6*time.Minute, errors.New("a build of a test took 6 minutes"))
	defer cancel()
	res, err := client.Buildctl{Addr: d.Addr}.Build(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// push builds an image and pushes it.
func push(t *testing.T, reg *registry.Registry, tag string, im baseimage.Image, formats ...baseimage.Format) (v1.Image, digest.Digest) {
	t.Helper()
	img, err := im.Build(t.Context(), formats...)
	if err != nil {
		t.Fatal(err)
	}
	d, err := baseimage.Push(t.Context(), reg, tag, img)
	if err != nil {
		t.Fatal(err)
	}
	return img, d
}

// layer makes a layer of entries.
func layer(t *testing.T, name string, entries ...baseimage.Entry) baseimage.Layer {
	t.Helper()
	l, err := baseimage.TarOf(t.TempDir(), name, entries...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// busybox returns the image of one layer with a shell, to put layers on.
func busybox(t *testing.T, layers ...baseimage.Layer) baseimage.Image {
	t.Helper()
	im, err := baseimage.Busybox(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	im.Layers = append(im.Layers, layers...)
	return im
}

// layerDigests returns the digests of an image's blobs.
func layerDigests(t *testing.T, img v1.Image) []digest.Digest {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	var out []digest.Digest
	for _, l := range m.Layers {
		out = append(out, digest.Digest(l.Digest.String()))
	}
	return out
}

// wantContains fails the test unless text has all of want.
func wantContains(t *testing.T, what, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("%s does not contain %q:\n%s", what, w, text)
		}
	}
}

// writeFile writes a file below dir, making directories.
func writeFile(t *testing.T, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}
