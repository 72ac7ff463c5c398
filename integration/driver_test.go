package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// engine is a Docker Engine of its own.
type engine struct {
	host string // for DOCKER_HOST
	dir  string
}

// startEngine runs dockerd without a network of its own (no bridge, no iptables) until the test ends.
func startEngine(t *testing.T) engine {
	t.Helper()
	for _, bin := range []string{"dockerd", "docker", "runc"} {
		if _, err := exec.LookPath(bin); err != nil {
			t.Fatalf("%v; make deps installs it", err)
		}
	}
	// Sockets have short names: not below t.TempDir.
	dir, err := os.MkdirTemp("", "lab-docker-")
	if err != nil {
		t.Fatal(err)
	}
	e := engine{host: "unix://" + filepath.Join(dir, "docker.sock"), dir: dir}
	config := map[string]any{"bridge": "none", "iptables": false, "ip6tables": false}
	if runtime := runcWithoutMissingCapabilities(t, dir); runtime != "" {
		config["runtimes"] = map[string]any{"lab": map[string]any{"path": runtime}}
		config["default-runtime"] = "lab"
	}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "dockerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dockerd", //nolint:noctx // the cleanup below ends it in order
		"--config-file", writeFile(t, dir, "daemon.json", string(raw)),
		"--host", e.host, "--pidfile", filepath.Join(dir, "dockerd.pid"),
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	stop := cleanup.Add(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		select {
		case <-exited:
		case <-time.After(30 * time.Second):
			// With its containerd, which is in the same group.
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-exited
		}
		mounts, _ := daemon.MountsBelow(dir)
		for _, mount := range slices.Backward(mounts) {
			_ = unix.Unmount(mount, unix.MNT_DETACH)
		}
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			if raw, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("log of dockerd:\n%s", raw[max(0, len(raw)-20_000):])
			}
		}
		if mounts, err := daemon.MountsBelow(dir); err != nil || len(mounts) > 0 {
			t.Errorf("dockerd left mounts: %q, %v", mounts, err)
		}
		if err := errors.Join(log.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		_, err := e.docker(t.Context(), "version")
		if err == nil {
			return e
		}
		select {
		case werr := <-exited:
			exited <- werr
			t.Fatalf("dockerd ended: %v", werr)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("dockerd does not answer: %v", err)
		}
	}
}

// runcWithoutMissingCapabilities writes an OCI runtime that asks runc for the capabilities this machine has
// and no more. --privileged asks for all there are, which runc refuses where the bounding set lacks one, as in
// some virtual machines and containers. It returns "" where nothing is lacking.
func runcWithoutMissingCapabilities(t *testing.T, dir string) string {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "CapBnd:")
	field, _, _ := strings.Cut(strings.TrimSpace(after), "\n")
	have, err := strconv.ParseUint(field, 16, 64)
	if err != nil {
		t.Fatalf("read the bounding set: %v", err)
	}
	// By number: capabilities(7). CAP_SYS_RESOURCE is the one that machines are known to lack.
	names := map[int]string{12: "NET_ADMIN", 16: "SYS_MODULE", 17: "SYS_RAWIO", 19: "SYS_PTRACE", 20: "SYS_PACCT", 22: "SYS_BOOT",
		23: "SYS_NICE", 24: "SYS_RESOURCE", 25: "SYS_TIME", 30: "AUDIT_CONTROL", 32: "MAC_OVERRIDE", 33: "MAC_ADMIN", 34: "SYSLOG",
		35: "WAKE_ALARM", 36: "BLOCK_SUSPEND", 37: "AUDIT_READ", 38: "PERFMON", 39: "BPF", 40: "CHECKPOINT_RESTORE"}
	var edits []string
	for n, name := range names {
		if have&(1<<n) == 0 {
			edits = append(edits, fmt.Sprintf(`s/"CAP_%s",//g; s/,"CAP_%s"//g`, name, name))
		}
	}
	if len(edits) == 0 {
		return ""
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`#!/bin/sh
previous=
for a in "$@"; do
	case $previous in
	--bundle) sed -i '%[1]s' "$a/config.json" ;;
	--process) sed -i '%[1]s' "$a" ;;
	esac
	previous=$a
done
exec %[2]s "$@"
`, strings.Join(edits, "; "), runc)
	path := filepath.Join(dir, "runtime")
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// docker runs the docker command against the engine.
func (e engine) docker(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+e.host, "DOCKER_CONFIG="+filepath.Join(e.dir, "config"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// TestDockerContainerDriver builds the image of `make image`, starts it in a real Docker Engine by the
// docker-container driver of buildx, and builds on a lazy base with it.
func TestDockerContainerDriver(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)

	// Named after the registry, so that buildx, which tries to pull first, is told at once that it isn't there.
	image := reg.Ref("buildkitd-lazy:test")
	if out, err := exec.CommandContext(t.Context(), "../hack/image.sh", image).CombinedOutput(); err != nil {
		t.Fatalf("hack/image.sh: %v\n%s", err, out)
	}
	const tar = "../bin/image/docker.tar"
	if st, err := os.Stat(tar); err != nil {
		t.Fatal(err)
	} else if st.Size() > 80<<20 {
		t.Errorf("the driver image is %d bytes, want at most 80 MiB", st.Size())
	}

	e := startEngine(t)
	if out, err := e.docker(t.Context(), "load", "--input", tar); err != nil || !strings.Contains(out, image) {
		t.Fatalf("docker load: %q, %v", out, err)
	}
	t.Setenv("DOCKER_HOST", e.host)
	buildx := client.Buildx{Config: t.TempDir(), Builder: "lazy"}
	config := writeFile(t, t.TempDir(), "buildkitd.toml", plainHTTP(reg))
	create := []string{"create", "--name=lazy", "--driver=docker-container", "--buildkitd-config=" + config,
		"--driver-opt=image=" + image + ",network=host"}
	if _, err := buildx.Run(t.Context(), create...); err != nil {
		t.Fatal(err)
	}
	removed := false
	remove := func() {
		if removed {
			return
		}
		removed = true
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if t.Failed() {
			if out, err := e.docker(ctx, "logs", "--tail=60", "buildx_buildkit_lazy0"); err == nil {
				t.Logf("log of the builder:\n%s", out)
			}
		}
		if _, err := buildx.Run(ctx, "rm", "lazy"); err != nil {
			t.Errorf("remove the builder: %v", err)
		}
	}
	t.Cleanup(remove)
	inspect, err := buildx.Run(t.Context(), "inspect", "--bootstrap", "lazy")
	if err != nil {
		t.Fatal(err)
	}
	wantContains(t, "docker buildx inspect", string(inspect), "docker-container", "running")

	solve := client.Solve{
		Dockerfile: "FROM " + reg.Ref("base:estargz") + " AS build\nRUN wc -c < /big/3 > /size && echo read\n" +
			"FROM scratch\nCOPY --from=build /size /\n",
	}
	out := t.TempDir()
	solve.Outputs = []string{"type=local,dest=" + out}
	res, err := buildx.Build(t.Context(), solve)
	if err != nil {
		t.Fatal(err)
	}
	if res.Err != "" {
		t.Fatalf("build: %s\n%s", res.Err, res.Output())
	}
	if got, err := os.ReadFile(filepath.Join(out, "size")); err != nil || strings.TrimSpace(string(got)) != strconv.Itoa(1<<20) {
		t.Errorf("the step wrote %q, %v", got, err)
	}
	rep := reportOf(t, res)
	if len(rep.Images) != 1 || rep.Images[0].Lazy != 2 {
		t.Errorf("lazy.report: %+v, want one image with two lazy layers", rep)
	}
	if read, size := blobsRead(t, reg, base), imageSize(t, base); read == 0 || read > size/2 {
		t.Errorf("the registry sent %d bytes of a base of %d", read, size)
	}

	// --load goes through the engine's own importer.
	solve.Outputs = nil
	solve.Args = []string{"--load", "--tag=result:1"}
	if res, err := buildx.Build(t.Context(), solve); err != nil || res.Err != "" {
		t.Errorf("build --load: %v, %+v", err, res)
	} else if _, err := e.docker(t.Context(), "image", "inspect", "result:1"); err != nil {
		t.Error(err)
	}

	// The state is in a volume: a builder that is stopped and started again still has its cache.
	if _, err := buildx.Run(t.Context(), "stop", "lazy"); err != nil {
		t.Fatal(err)
	}
	res, err = buildx.Build(t.Context(), solve)
	if err != nil || res.Err != "" {
		t.Fatalf("build after a restart: %v, %+v", err, res)
	}
	if v := res.Vertex("RUN wc"); v == nil || !v.Cached {
		t.Errorf("after a restart the step is %+v, want it cached", v)
	}
	remove()
}
