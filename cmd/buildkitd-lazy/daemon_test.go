package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

// live is a daemon that runs.
type live struct {
	cmd  *exec.Cmd
	dir  string
	addr string // of its unix socket
	done chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

func (l *live) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.log.Write(p)
}

func (l *live) logged() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.log.String()
}

// withoutFUSE hides the FUSE device from a daemon in its own mount namespace.
func withoutFUSE(cmd *exec.Cmd) {
	cmd.Env = append(cmd.Env, mountHere+"=/dev/fuse", mountOptions+"=bind=/dev/null")
	inNamespaces(cmd)
}

// startDaemon waits until the daemon answers. A nil change is none.
func startDaemon(t *testing.T, change func(*exec.Cmd), args ...string) *live {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	l := &live{dir: dir, addr: "unix://" + filepath.Join(dir, "bk.sock"), done: make(chan struct{})}
	l.cmd = daemonCommand(t, nil, append([]string{
		"--root", filepath.Join(dir, "root"), "--addr", l.addr, "--otel-socket-path", filepath.Join(dir, "otel.sock"),
	}, args...)...)
	l.cmd.Stderr = l
	if change != nil {
		change(l.cmd)
	}
	l.cmd.Cancel = func() error { return l.cmd.Process.Signal(syscall.SIGTERM) } // a killed daemon leaves mounts
	l.cmd.WaitDelay = 30 * time.Second
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(l.done)
		_ = l.cmd.Wait() // the status says it
	}()
	t.Cleanup(func() {
		_ = l.cmd.Process.Signal(syscall.SIGTERM)
		<-l.done
		if t.Failed() {
			t.Log(l.logged())
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		if c, err := client.New(ctx, l.addr); err == nil {
			_, err = c.Info(ctx)
			_ = c.Close()
			if err == nil {
				return l
			}
		}
		select {
		case <-l.done:
			t.Fatalf("the daemon ended: %s", l.logged())
		case <-ctx.Done():
			t.Fatalf("the daemon does not answer: %s", l.logged())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop sends SIGTERM and returns the exit status.
func (l *live) stop(t *testing.T) int {
	t.Helper()
	if err := l.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-l.done:
	case <-time.After(time.Minute):
		t.Fatal("the daemon does not stop")
	}
	return l.cmd.ProcessState.ExitCode()
}

func (l *live) mounts(t *testing.T) []string {
	t.Helper()
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var below []string
	for line := range strings.Lines(string(info)) {
		if strings.Contains(line, l.dir) {
			below = append(below, line)
		}
	}
	return below
}

func TestDaemon(t *testing.T) {
	p := newPKI(t)
	p.sign(t, "server", p.ca, p.key)
	p.sign(t, "client", p.ca, p.key)
	tcp, debug := freePort(t), freePort(t)
	unix := filepath.Join(t.TempDir(), "second.sock")

	d := startDaemon(t, nil,
		"--addr", "tcp://"+tcp, "--addr", "unix://"+unix, "--tlscert", p.file("server"), "--tlskey", p.file("server-key"), "--tlscacert", p.file("ca"),
		"--debugaddr", debug, "--save-cache-debug", "--oci-worker-labels", "com.example.a=b", "--containerd-worker=false", "--oci-worker-platform", "linux/riscv64")

	t.Run("info is BuildKit's", func(t *testing.T) {
		c, err := client.New(t.Context(), "unix://"+unix)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		info, err := c.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		v := info.BuildkitVersion
		out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Version}}", "github.com/moby/buildkit").Output()
		if err != nil {
			t.Fatal(err)
		}
		if v.Package != buildkitPackage || v.Version != strings.TrimSpace(string(out)) || v.DockerfileVersion == "" || strings.Contains(v.DockerfileVersion, "-dev") {
			t.Errorf("version %+v", v)
		}
		ws, err := c.ListWorkers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(ws) != 1 || ws[0].Labels["com.example.a"] != "b" || ws[0].Platforms[0].Architecture != "riscv64" || ws[0].BuildkitVersion != v || len(ws[0].GCPolicy) == 0 {
			t.Errorf("workers %+v", *ws[0])
		}
	})

	t.Run("mutual TLS", func(t *testing.T) {
		c, err := client.New(t.Context(), "tcp://"+tcp, client.WithServerConfig("localhost", p.file("ca")), client.WithCredentials(p.file("client"), p.file("client-key")))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Info(t.Context()); err != nil {
			t.Errorf("with a certificate: %v", err)
		}
		conn, err := (&tls.Dialer{Config: p.client(t, "")}).DialContext(t.Context(), "tcp", tcp)
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
			_ = conn.Close()
		}
		if err == nil {
			t.Error("served without a certificate")
		}
	})

	t.Run("health and reflection", func(t *testing.T) {
		conn, err := grpc.NewClient(tcp, grpc.WithTransportCredentials(credentials.NewTLS(p.client(t, "client"))))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		h, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
		if err != nil || h.Status != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("health: %v, %v", h, err)
		}
		s, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		resp, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range resp.GetListServicesResponse().GetService() {
			names = append(names, s.Name)
		}
		for _, want := range []string{"moby.buildkit.v1.Control", "moby.buildkit.v1.frontend.LLBBridge", "grpc.health.v1.Health", "opentelemetry.proto.collector.trace.v1.TraceService"} {
			if !slices.Contains(names, want) {
				t.Errorf("no service %s in %q", want, names)
			}
		}
	})

	t.Run("debug endpoints", func(t *testing.T) {
		for _, tt := range []struct {
			method, path, body string
			status             int
			want               string
		}{
			{"GET", "/metrics", "", 200, "go_goroutines"},
			{"GET", "/metrics", "", 200, "rpc_server_"},
			{"GET", "/debug/pprof/", "", 200, "goroutine"},
			{"GET", "/debug/pprof/cmdline", "", 200, "--save-cache-debug"},
			{"GET", "/debug/vars", "", 200, "memstats"},
			{"GET", "/debug/requests", "", 200, "/debug/requests"},
			{"GET", "/debug/gc", "", 200, ""},
			{"GET", "/debug/cache/all", "", 200, ""},
			{"GET", "/debug/cache/store", "", 200, ""},
			{"GET", "/debug/cache/lookup?digest=" + digestOfSlash.String(), "", 200, "data: /"},
			{"GET", "/debug/cache/lookup?digest=x", "", 400, "parameter digest"},
			{"GET", "/debug/cache/load", "", 405, ""},
			{"POST", "/debug/cache/load", `{"records":[{"digest":"` + digestOfSlash.String() + `"}]}`, 200, ""},
			{"POST", "/debug/cache/load", "nonsense", 500, "parse cache manifest"},
			{"POST", "/debug/flight/trace/set_period?period=2s", "", 200, ""},
			{"POST", "/debug/flight/trace/set_period?period=x", "", 400, "invalid flight recorder period"},
			{"GET", "/debug/flight/trace", "", 409, "not running"},
			{"POST", "/debug/flight/trace/start", "", 200, ""},
			{"POST", "/debug/flight/trace/start", "", 409, "already running"},
			{"POST", "/debug/flight/trace/set_period?period=2s", "", 412, "stop it"},
			{"GET", "/debug/flight/trace", "", 200, "go 1."},
			{"POST", "/debug/flight/trace/stop", "", 200, ""},
			{"POST", "/debug/flight/trace/stop", "", 409, "not running"},
		} {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://"+debug+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if err != nil || resp.StatusCode != tt.status || !strings.Contains(string(body), tt.want) {
				t.Errorf("%s %s: %d, %v, %.200q; want %d and %q", tt.method, tt.path, resp.StatusCode, err, body, tt.status, tt.want)
			}
		}
	})

	t.Run("one daemon per state directory", func(t *testing.T) {
		o := runDaemon(t, daemonCommand(t, nil, "--root", filepath.Join(d.dir, "root"), "--addr", "unix://"+unix+".2"))
		if o.status != 1 || !strings.Contains(o.lastLine(), "is in use by another daemon") {
			t.Errorf("status %d: %s", o.status, o.stderr)
		}
	})

	if code := d.stop(t); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if left := d.mounts(t); len(left) > 0 {
		t.Errorf("mounts are left: %q", left)
	}
	for _, path := range []string{unix, filepath.Join(d.dir, "bk.sock"), filepath.Join(d.dir, "otel.sock"), filepath.Join(d.dir, "root", lockName)} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// A client that is in the middle of a call does not keep the daemon beyond a second signal.
func TestSecondSignalForces(t *testing.T) {
	d := startDaemon(t, nil, "--lazy-mount=off")
	c, err := client.New(t.Context(), d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// A stream that ends with the daemon only, as the session of a running build does.
	stream, err := c.ControlClient().Session(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Info(t.Context()); err != nil { // so the stream has arrived
		t.Fatal(err)
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.done:
		t.Fatal("stopped in front of a running call")
	case <-time.After(500 * time.Millisecond):
	}
	if code := d.stop(t); code != 1 || !strings.HasSuffix(d.logged(), "\nbuildkitd-lazy: "+errForced.Error()+"\n") {
		t.Errorf("exit status %d", code)
	}
	for err = nil; err == nil; _, err = stream.Recv() { // what had been sent before comes first
	}
	if code := status.Code(err); code != codes.Unavailable && code != codes.Canceled {
		t.Errorf("the stream ended with %v", err)
	}
	if left := d.mounts(t); len(left) > 0 {
		t.Errorf("mounts are left: %q", left)
	}
}

// systemd: the socket is passed on, READY and STOPPING are told.
func TestSystemd(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	sock, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "bk.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	passed, err := sock.File()
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()

	// LISTEN_PID has to be the daemon's own, which the shell becomes.
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, exe,
		"--root", filepath.Join(dir, "root"), "--addr", "fd://", "--otel-socket-path", filepath.Join(dir, "otel.sock"), "--lazy-mount=off")
	cmd.Env = []string{asDaemon + "=1", "PATH=" + os.Getenv("PATH"), "USER=root", "LISTEN_FDS=1", "NOTIFY_SOCKET=" + filepath.Join(dir, "notify")}
	cmd.ExtraFiles = []*os.File{passed}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	told := func() string {
		b := make([]byte, 100)
		_ = notify.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, err := notify.Read(b)
		if err != nil {
			return err.Error()
		}
		return string(b[:n])
	}
	if got := told(); got != "READY=1" {
		t.Errorf("told %q", got)
	}
	c, err := client.New(t.Context(), "unix://"+filepath.Join(dir, "bk.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Info(t.Context()); err != nil {
		t.Error(err)
	}
	_ = c.Close()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := told(); got != "STOPPING=1" {
		t.Errorf("told %q", got)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, stderr.String())
	}
}

// Without an OCI runtime nothing can be built: one line with what to install, after what was logged.
func TestNoRuntime(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	cmd := daemonCommand(t, []string{"PATH=" + dir}, "--root", filepath.Join(dir, "root"), "--addr", "unix://"+filepath.Join(dir, "bk.sock"), "--otel-socket-path", filepath.Join(dir, "otel.sock"))
	o := runDaemon(t, cmd)
	if o.status != 1 || !strings.Contains(o.lastLine(), "install runc") || strings.Contains(o.stderr, ".go:") {
		t.Errorf("status %d: %s", o.status, o.stderr)
	}
	if _, err := os.Lstat(filepath.Join(dir, "bk.sock")); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

// onTmpfs returns a state directory on a filesystem that the kernel can't serve layers from.
func onTmpfs(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "buildkitd-lazy-test-") //nolint:usetesting // not where the machine's temporary files are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Without any door the daemon builds eagerly and says why once; where a door is asked for that it can't have, it does not start.
func TestNoDoor(t *testing.T) {
	needRoot(t)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatalf("there is none to hide: %v", err)
	}
	tmpfs := onTmpfs(t)
	d := startDaemon(t, withoutFUSE, "--root", filepath.Join(tmpfs, "root"))
	if code := d.stop(t); code != 0 || strings.Count(d.logged(), "pulled eagerly") != 1 {
		t.Errorf("exit status %d: %s", code, d.logged())
	}

	dir := t.TempDir()
	args := []string{"--root", filepath.Join(dir, "root"), "--lazy-mount=fuse"}
	cmd := daemonCommand(t, nil, append(args, "--addr", "unix://"+filepath.Join(dir, "bk.sock"), "--otel-socket-path", filepath.Join(dir, "otel.sock"))...)
	withoutFUSE(cmd)
	if o := runDaemon(t, cmd); o.status != 1 || !strings.Contains(strings.ToLower(o.lastLine()), "fuse") {
		t.Errorf("daemon: status %d: %s", o.status, o.stderr)
	}

	cmd = daemonCommand(t, nil, append([]string{"check"}, args...)...)
	withoutFUSE(cmd)
	if o := runDaemon(t, cmd); o.status != 1 || !strings.Contains(o.stdout, "the daemon does not start") || !strings.Contains(o.lastLine(), `mount = "fuse"`) {
		t.Errorf("check --lazy-mount=fuse: %+v", o)
	}
	cmd = daemonCommand(t, nil, "check", "--root", tmpfs)
	withoutFUSE(cmd)
	if o := runDaemon(t, cmd); o.status != 0 || !strings.Contains(o.stdout, "lazy layers: off") {
		t.Errorf("check: %+v", o)
	}
	if o := runDaemon(t, daemonCommand(t, nil, "check", "--root", tmpfs)); o.status != 0 || !strings.Contains(o.stdout, "lazy layers: fuse") {
		t.Errorf("check with FUSE alone: %+v", o)
	}
	if o := runDaemon(t, daemonCommand(t, nil, "check", "--root", tmpfs, "--lazy-mount=erofs")); o.status != 1 || !strings.Contains(o.lastLine(), `mount = "erofs"`) {
		t.Errorf("check --lazy-mount=erofs: %+v", o)
	}
}

func TestLogFormatJSON(t *testing.T) {
	d := startDaemon(t, nil, "--lazy-mount=off", "--log-format=json")
	d.stop(t)
	for line := range strings.Lines(d.logged()) {
		var entry struct{ Level, Msg string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level == "" || entry.Msg == "" {
			t.Errorf("%v: %s", err, line)
		}
	}
}

func TestDebugServerOnUnixSocket(t *testing.T) {
	u := url.URL{Scheme: "unix", Path: filepath.Join(t.TempDir(), "debug.sock")}
	var d debugServer
	if err := d.start(t.Context(), u.String()); err != nil {
		t.Fatal(err)
	}
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", u.Path)
	}}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://debug/debug/cache/store", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("before the cache is open: %s", resp.Status)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := (&debugServer{}).start(t.Context(), "nonsense"); err == nil || !strings.Contains(err.Error(), "debug address (--debugaddr) tcp://nonsense: ") {
		t.Errorf("nonsense: %v", err)
	}
}

// freePort returns an address that a daemon can listen on. Its port isn't one that the kernel gives to whoever dials, who might have
// taken it before the daemon does.
func freePort(t *testing.T) string {
	t.Helper()
	var lc net.ListenConfig
	for {
		port := 10_000 + rand.IntN(20_000)
		ln, err := lc.Listen(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		return fmt.Sprintf("localhost:%d", port)
	}
}
