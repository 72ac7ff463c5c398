// Package daemon runs BuildKit daemons, ours or stock, as processes: starts
// them with a state directory and a configuration, waits until they answer, stops
// or kills them, and says what they left behind.
//
// The binaries come from the repository's bin directory (see [Bin]); `make build
// tools` puts them there.
package daemon

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
)

// A Kind is a contestant: a binary and how it is set up.
type Kind string

// The contestants.
const (
	Ours             Kind = "buildkitd-lazy"
	StockOverlay     Kind = "stock overlayfs"
	StockStargz      Kind = "stock stargz"
	StockStargzTuned Kind = "stock stargz tuned"
)

// Names of binaries, for Bin.
const (
	OursBinary     = "buildkitd-lazy"
	StockBinary    = "tools/buildkitd"
	BuildctlBinary = "tools/buildctl"
	BuildxBinary   = "tools/docker-buildx"
)

// Bin returns the path of a binary in the repository's bin directory, or
// below BUILDKITD_LAZY_BIN if that is set. The directory is found from the
// working directory upwards: the first that has a file bin/NAME.
func Bin(name string) (string, error) {
	if dir := os.Getenv("BUILDKITD_LAZY_BIN"); dir != "" {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("find %s: %w (BUILDKITD_LAZY_BIN)", name, err)
		}
		return path, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		path := filepath.Join(dir, "bin", name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("find bin/%s: not in this directory or one above it; `make build tools` makes it", name)
		}
		dir = up
	}
}

// Options say what to start. Only Kind is required.
type Options struct {
	Kind Kind
	// Binary replaces the kind's.
	Binary string
	// Root is the state directory; a new one in the temporary directory if
	// empty, which Close removes.
	Root string
	// Config is the content of buildkitd.toml. What the kind needs is appended.
	Config string
	// Addrs are the addresses to listen on; none means one unix socket.
	Addrs []string
	// Args are more arguments.
	Args []string
	// Env is added to the environment.
	Env []string
	// Link, if set, is where the daemon has its network.
	Link *link.Link
	// Wrap, if set, is a command that runs the daemon: it is given the binary
	// and its arguments.
	Wrap []string
	// Files are handed to the daemon from descriptor 3 on.
	Files []*os.File
	// Ready, if set, replaces the wait for an answer on the first address.
	Ready func(context.Context, *Daemon) error
	// Timeout is how long to wait until the daemon answers; 0 means a minute.
	Timeout time.Duration
}

// A Daemon is a running daemon.
type Daemon struct {
	Kind Kind
	// Addr is the first address it listens on.
	Addr string
	// Root is its state directory.
	Root string

	cmd     *exec.Cmd
	tmp     string // socket and configuration
	ownRoot bool
	logs    Buffer
	exited  chan struct{}
	waitErr error
	undo    func()
}

// setup returns binary, arguments and configuration of a kind.
func (k Kind) setup() (binary string, args []string, config string, err error) {
	args = []string{"--oci-worker-net=host"}
	switch k {
	case Ours:
		binary, err = Bin(OursBinary)
		return binary, args, "", err
	case StockOverlay:
		args = append(args, "--oci-worker-snapshotter=overlayfs")
	case StockStargz:
		args = append(args, "--oci-worker-snapshotter=stargz")
	case StockStargzTuned:
		args = append(args, "--oci-worker-snapshotter=stargz")
		config = "\n[worker.oci.stargzSnapshotter]\nnoprefetch = true\nno_background_fetch = true\n"
	default:
		return "", nil, "", fmt.Errorf("unknown kind of daemon %q", k)
	}
	binary, err = Bin(StockBinary)
	return binary, append(args, "--containerd-worker=false"), config, err
}

// Start starts a daemon and waits until it answers. The error of one that
// does not holds the end of its log.
func Start(ctx context.Context, opt Options) (_ *Daemon, err error) {
	binary, args, config, err := opt.Kind.setup()
	if opt.Binary != "" {
		binary, err = opt.Binary, nil
	}
	if err != nil {
		return nil, err
	}
	d := &Daemon{Kind: opt.Kind, Root: opt.Root, exited: make(chan struct{})}
	if d.tmp, err = os.MkdirTemp("", "lab-daemon-"); err != nil {
		return nil, err
	}
	if d.Root == "" {
		d.Root, d.ownRoot = filepath.Join(d.tmp, "root"), true
		if err := os.Mkdir(d.Root, 0o711); err != nil {
			return nil, err
		}
	}
	toml := filepath.Join(d.tmp, "buildkitd.toml")
	if err := os.WriteFile(toml, []byte(opt.Config+config), 0o600); err != nil {
		return nil, err
	}
	addrs := opt.Addrs
	if len(addrs) == 0 {
		addrs = []string{"unix://" + filepath.Join(d.tmp, "buildkitd.sock")}
	}
	d.Addr = addrs[0]
	args = append(args, "--root", d.Root, "--config", toml)
	if opt.Kind != Ours {
		// All stock daemons of a host would share one: the first to end removes it from under the others' steps.
		args = append(args, "--otel-socket-path", filepath.Join(d.tmp, "otel.sock"))
	}
	for _, a := range addrs {
		args = append(args, "--addr", a)
	}
	argv := slices.Concat(opt.Wrap, []string{binary}, args, opt.Args)
	d.cmd = exec.Command(argv[0], argv[1:]...) //nolint:noctx // it outlives ctx; Close ends it
	d.cmd.Env = append(os.Environ(), opt.Env...)
	d.cmd.ExtraFiles = opt.Files
	d.cmd.Stdout, d.cmd.Stderr = &d.logs, &d.logs
	// A group of its own: ^C at a terminal is for us, who then stop it in order.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	start := d.cmd.Start
	if opt.Link != nil {
		start = func() error { return opt.Link.Start(d.cmd) }
	}
	if err := start(); err != nil {
		os.RemoveAll(d.tmp)
		return nil, fmt.Errorf("start %s: %w", opt.Kind, err)
	}
	go func() {
		d.waitErr = d.cmd.Wait()
		close(d.exited)
	}()
	var undoErr error
	d.undo = cleanup.Add(func() {
		_, undoErr = d.Stop()
		undoErr = errors.Join(undoErr, d.sweep())
	})
	timeout := opt.Timeout
	if timeout == 0 {
		timeout = time.Minute
	}
	ready := opt.Ready
	if ready == nil {
		ready = func(ctx context.Context, d *Daemon) error { return Answers(ctx, d.Addr) }
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %v", timeout))
	defer cancel()
	for {
		err := ready(ctx, d)
		if err == nil {
			return d, nil
		}
		select {
		case <-d.exited:
			err = fmt.Errorf("%s ended before it answered: %w\n%s", opt.Kind, d.waitErr, d.tail())
		case <-ctx.Done():
			err = fmt.Errorf("%s: %w (last: %w)\n%s", opt.Kind, context.Cause(ctx), err, d.tail())
		case <-time.After(20 * time.Millisecond):
			continue
		}
		d.undo()
		return nil, errors.Join(err, undoErr)
	}
}

// Answers asks the daemon at addr for its workers, with extra arguments for
// buildctl such as certificates.
func Answers(ctx context.Context, addr string, args ...string) error {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		if _, err := os.Stat(path); err != nil {
			return err
		}
	}
	buildctl, err := Bin(BuildctlBinary)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, errors.New("buildctl hangs"))
	defer cancel()
	out, err := exec.CommandContext(ctx, buildctl, append(append([]string{"--addr", addr, "--timeout", "5"}, args...), "debug", "workers")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("buildctl debug workers: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Pid is the daemon's process.
func (d *Daemon) Pid() int { return d.cmd.Process.Pid }

// Logs returns what the daemon has written so far.
func (d *Daemon) Logs() string { return d.logs.String() }

func (d *Daemon) tail() string {
	lines := strings.Split(strings.TrimSpace(d.Logs()), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// Exited is closed when the process has ended.
func (d *Daemon) Exited() <-chan struct{} { return d.exited }

// Stop ends the daemon by SIGTERM, by SIGKILL if it has not ended after a minute (an
// error then), and returns its exit status, -1 if a signal ended it. The
// state stays. Stopping one that has ended returns its status.
func (d *Daemon) Stop() (status int, err error) {
	select {
	case <-d.exited:
		return d.cmd.ProcessState.ExitCode(), nil
	default:
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return 0, fmt.Errorf("stop %s: %w", d.Kind, err)
	}
	select {
	case <-d.exited:
	case <-time.After(time.Minute):
		d.Kill()
		return -1, fmt.Errorf("stop %s: still there a minute after SIGTERM, killed\n%s", d.Kind, d.tail())
	}
	return d.cmd.ProcessState.ExitCode(), nil
}

// Kill ends the daemon and its process group by SIGKILL.
func (d *Daemon) Kill() {
	_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL) // it may have ended
	<-d.exited
}

// Mounts returns the mount points below the state directory.
func (d *Daemon) Mounts() ([]string, error) { return MountsBelow(d.Root) }

// MountsBelow returns the mount points below dir, deepest last.
func MountsBelow(dir string) ([]string, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if fields := strings.Fields(sc.Text()); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			found = append(found, fields[4])
		}
	}
	return found, sc.Err()
}

// sweep detaches mounts that the daemon left.
func (d *Daemon) sweep() error {
	mounts, err := d.Mounts()
	for _, m := range slices.Backward(mounts) {
		err = errors.Join(err, unix.Unmount(m, unix.MNT_DETACH))
	}
	return err
}

// Close stops the daemon if it still runs, detaches what it left mounted, and removes
// its socket, configuration and, if Start made it, its state directory.
func (d *Daemon) Close() error {
	_, err := d.Stop()
	d.undo()
	err = errors.Join(err, d.sweep())
	return errors.Join(err, os.RemoveAll(d.tmp))
}

// A Buffer is one that a process writes and others read.
type Buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
