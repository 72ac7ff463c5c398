package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// freePort returns an address that a daemon can listen on. Its port isn't one that the kernel gives to whoever dials, who might have
// taken it before the daemon does.
func freePort(t *testing.T) string {
	t.Helper()
	var lc net.ListenConfig
	for {
		ln, err := lc.Listen(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(20_000)))
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		return ln.Addr().String()
	}
}

// run runs our binary and returns its standard output, standard error and exit status.
// One that is still there after a minute is killed, and the test fails.
func run(t *testing.T, env []string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	bin, err := daemon.Bin(daemon.OursBinary)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("still running after a minute"))
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append(os.Environ(), env...)
	var out, diag bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &diag
	err = cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("buildkitd-lazy %q: %v\n%s", args, context.Cause(ctx), diag.String())
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), diag.String(), cmd.ProcessState.ExitCode()
}

// refuses runs a daemon that cannot start: it must exit with a status other than 0 and say want. It returns all that was said.
func refuses(t *testing.T, env, args []string, want ...string) string {
	t.Helper()
	_, stderr, status := run(t, env, args...)
	if status <= 0 {
		t.Errorf("buildkitd-lazy %q ended with status %d", args, status)
	}
	wantContains(t, "standard error", stderr, want...)
	if strings.Contains(stderr, "panic") || strings.Contains(stderr, "goroutine ") {
		t.Errorf("standard error is no message for a user:\n%s", stderr)
	}
	return stderr
}

// TestVersion prints the four fields that buildx takes apart.
func TestVersion(t *testing.T) {
	stdout, _, status := run(t, nil, "--version")
	if f := strings.Fields(stdout); status != 0 || len(f) != 4 {
		t.Errorf("status %d, %d fields: %q", status, len(f), stdout)
	}
}

// TestHelp is on standard output and knows every flag of stock's.
func TestHelp(t *testing.T) {
	stdout, _, status := run(t, nil, "--help")
	if status != 0 {
		t.Errorf("status %d", status)
	}
	stock, err := daemon.Bin(daemon.StockBinary)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := exec.CommandContext(t.Context(), stock, "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for word := range strings.FieldsSeq(string(theirs)) {
		flag := strings.TrimRight(word, ",.)'\"")
		if !strings.HasPrefix(flag, "--") || strings.HasPrefix(flag, "--containerd-") {
			continue
		}
		n++
		flag, _, _ = strings.Cut(flag, "=")
		if !strings.Contains(stdout, flag) {
			t.Errorf("--help of stock buildkitd has %s, ours has not", flag)
		}
	}
	if n < 40 {
		t.Fatalf("found %d flags in stock's help, which does not look as it did", n)
	}
}

// TestBadCommandLineAndConfig are what the daemon refuses before it touches anything.
func TestBadCommandLineAndConfig(t *testing.T) {
	config := func(t *testing.T, text string) string { return writeFile(t, t.TempDir(), "buildkitd.toml", text) }
	root := filepath.Join(t.TempDir(), "root")
	base := []string{"--root", root, "--addr", "unix://" + filepath.Join(t.TempDir(), "sock")}
	for name, c := range map[string]struct{ args, want []string }{
		"unknown flag":      {[]string{"--rooot=/x"}, []string{"rooot"}},
		"unknown lazy key":  {[]string{"--config", config(t, "debug = true\n\n[lazy]\nbackground-fech = true\n")}, []string{"background-fech", "background-fetch", "4"}},
		"bad lazy value":    {[]string{"--config", config(t, "[lazy]\nmount = \"fues\"\n")}, []string{"mount", "fues", "fuse"}},
		"bad duration":      {[]string{"--config", config(t, "[lazy]\nfetch-timeout = \"soon\"\n")}, []string{"fetch-timeout", "soon"}},
		"no TOML":           {[]string{"--config", config(t, "[lazy\n")}, []string{"buildkitd.toml"}},
		"containerd worker": {[]string{"--containerd-worker=true"}, []string{"containerd"}},
		"no such address":   {[]string{"--addr", "carrier-pigeon://loft"}, []string{"carrier-pigeon"}},
		"half of TLS":       {[]string{"--addr", "tcp://" + freePort(t), "--tlscert", "/does/not/exist.pem"}, []string{"tls"}},
	} {
		t.Run(name, func(t *testing.T) { refuses(t, nil, append(append([]string{}, base...), c.args...), c.want...) })
	}
}

// TestStateDirectoryIsLocked starts two daemons on one state directory.
func TestStateDirectoryIsLocked(t *testing.T) {
	d := startDaemon(t, daemon.Options{})
	refuses(t, nil, []string{"--root", d.Root, "--addr", "unix://" + filepath.Join(t.TempDir(), "sock")}, d.Root, "in use by another daemon")
	if err := daemon.Answers(t.Context(), d.Addr); err != nil {
		t.Errorf("the first daemon is no longer there: %v", err)
	}
}

// mountTmpfs mounts a tmpfs until the test ends.
func mountTmpfs(t *testing.T, dir string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", flags, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestReadOnlyStateDirectory names the directory and the reason.
func TestReadOnlyStateDirectory(t *testing.T) {
	dir := t.TempDir()
	mountTmpfs(t, dir, unix.MS_RDONLY, "")
	refuses(t, nil, []string{"--root", filepath.Join(dir, "root"), "--addr", "unix://" + filepath.Join(t.TempDir(), "sock")}, dir, "read-only file system")
}

// TestFullStateDirectory fills the disk by a step and by a pull: the build fails and says so, and the daemon goes on.
func TestFullStateDirectory(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 8<<20)), baseimage.EStargz)
	push(t, reg, "base:gzip", busybox(t, bigLayer(t, 64<<20)), baseimage.Gzip)
	full := func(t *testing.T) *daemon.Daemon {
		dir := t.TempDir()
		mountTmpfs(t, dir, 0, "size=48m")
		return startDaemon(t, daemon.Options{Root: filepath.Join(dir, "root"), Config: plainHTTP(reg)})
	}
	t.Run("step", func(t *testing.T) {
		d := full(t)
		msg := buildFails(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN head -c 100000000 /dev/zero > /fill\n"})
		wantContains(t, "error", msg, "head -c 100000000 /dev/zero > /fill")
		if err := daemon.Answers(t.Context(), d.Addr); err != nil {
			t.Error(err)
		}
		// Without any room the daemon, like stock, can't even note what it may delete. With some, it goes on by itself.
		if err := unix.Mount("tmpfs", filepath.Dir(d.Root), "tmpfs", unix.MS_REMOUNT, "size=160m"); err != nil {
			t.Fatal(err)
		}
		res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/1\n"})
		wantContains(t, "output once there is room", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
	})
	t.Run("pull", func(t *testing.T) {
		d := full(t)
		msg := buildFails(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:gzip") + "\nRUN true\n"})
		wantContains(t, "error", msg, "no space left on device")
		if err := daemon.Answers(t.Context(), d.Addr); err != nil {
			t.Error(err)
		}
	})
}

// TestStartOnFullDisk starts with a full disk.
func TestStartOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	mountTmpfs(t, dir, 0, "size=64k")
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 60<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, nil, []string{"--root", filepath.Join(dir, "root"), "--addr", "unix://" + filepath.Join(t.TempDir(), "sock")}, "no space left on device", dir)
}

// TestNoRuntime starts without an OCI runtime.
func TestNoRuntime(t *testing.T) {
	said := refuses(t, []string{"PATH=" + t.TempDir()}, []string{"--root", t.TempDir(), "--addr", "unix://" + filepath.Join(t.TempDir(), "sock")}, "runc")
	if strings.Contains(said, "level=error") {
		t.Errorf("what has been started and is stopped in order is told of as an error:\n%s", said)
	}
}

// TestNoDoor hides /dev/fuse from the daemon, and gives it a tmpfs, which raises no pre-content events: it builds eagerly, and says
// why once.
func TestNoDoor(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{
		Config: plainHTTP(reg),
		Root:   "/dev/shm/root",
		Wrap: []string{"unshare", "--mount", "--propagation", "private", "sh", "-c", `
			set -e
			mkdir "$0"
			mount -t tmpfs tmpfs "$0"
			for d in null zero full random urandom tty; do cp -a /dev/$d "$0/$d"; done
			mkdir "$0/pts" "$0/shm" "$0/mqueue"
			mount --move "$0" /dev
			exec "$@"`, filepath.Join(t.TempDir(), "dev")},
	})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/1\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
	if n := strings.Count(d.Logs(), "base images are pulled eagerly"); n != 1 {
		t.Errorf("the log says %d times that images are pulled eagerly, want once", n)
	}
	wantContains(t, "log", d.Logs(), "/dev/fuse is missing", "raises no pre-content events")
	for _, l := range reportOf(t, res).Images[0].Layers {
		if l.Mode != "eager" || !strings.Contains(l.Reason, "/dev/fuse") {
			t.Errorf("lazy.report: layer %s is %s: %q", l.Digest, l.Mode, l.Reason)
		}
	}
	if read := blobsRead(t, reg, img); read < imageSize(t, img) {
		t.Errorf("%d bytes of %d were fetched", read, imageSize(t, img))
	}
}

// TestSocketActivation serves on a socket that it inherits.
func TestSocketActivation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	addr := "unix://" + path
	d := startDaemon(t, daemon.Options{
		Addrs: []string{"fd://"},
		Files: []*os.File{f},
		Wrap:  []string{"sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"`, "sh"},
		Ready: func(ctx context.Context, _ *daemon.Daemon) error { return daemon.Answers(ctx, addr) },
	})
	d.Addr = addr
	res := build(t, d, client.Solve{Dockerfile: "FROM scratch\nCOPY Dockerfile /\n", Context: filepath.Dir(writeFile(t, t.TempDir(), "Dockerfile", "FROM scratch\nCOPY Dockerfile /\n"))})
	if res.Vertex("COPY") == nil {
		t.Error("nothing was copied")
	}
}

// TestSIGTERMDuringBuild ends the daemon while a step runs. Like stock, it waits for the build at the first signal and
// gives up on it at the second: the client hears of it, and no mount is left.
func TestSIGTERMDuringBuild(t *testing.T) { eachDoor(t, testSIGTERMDuringBuild) }

func testSIGTERMDuringBuild(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	marker := "lab-sleeper-" + filepath.Base(filepath.Dir(d.Root))
	type outcome struct {
		res *client.Result
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		res, err := client.Buildctl{Addr: d.Addr}.Build(t.Context(), client.Solve{
			Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN wget -q -O /dev/null " + reg.URL() + "/" + marker + "; exec sleep 600\n"})
		done <- outcome{res, err}
	}()
	deadline := time.After(30 * time.Second)
	for len(reg.Log.Entries(func(e registry.Entry) bool { return strings.Contains(e.Path, marker) })) == 0 {
		select {
		case o := <-done:
			t.Fatalf("the build ended: %+v, %v", o.res, o.err)
		case <-deadline:
			t.Fatal("the step did not start")
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := unix.Kill(d.Pid(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Exited():
		t.Fatal("the daemon did not wait for the build")
	case <-time.After(time.Second):
	}
	start := time.Now()
	if _, err := d.Stop(); err != nil {
		t.Error(err)
	}
	if mounts, err := d.Mounts(); err != nil || len(mounts) > 0 {
		t.Errorf("mounts left: %q, %v", mounts, err)
	}
	if took := time.Since(start); took > 45*time.Second {
		t.Errorf("the daemon took %v to end", took)
	}
	select {
	case o := <-done:
		if o.err != nil || o.res.Err == "" {
			t.Errorf("the client says: %+v, %v", o.res, o.err)
		}
	case <-time.After(time.Minute):
		t.Error("the client is still waiting")
	}
}

// TestCheck reads the host's report as a person and as a program.
func TestCheck(t *testing.T) {
	stdout, stderr, status := run(t, nil, "check")
	if status != 0 {
		t.Errorf("status %d: %s", status, stderr)
	}
	wantContains(t, "check", stdout, "/dev/fuse", "runc", "overlay")
	stdout, _, status = run(t, nil, "check", "--format", "{{json .}}")
	if status != 0 || !strings.HasPrefix(strings.TrimSpace(stdout), "{") {
		t.Errorf("status %d: %s", status, stdout)
	}
}
