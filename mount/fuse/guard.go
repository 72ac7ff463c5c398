package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A daemon reads its own mounts, as when it digests what is copied from an image, and mounts overlays of them. A thread of it that waits for an
// answer can't be killed any more once the request has been taken: and it keeps alive the descriptors by whose end the kernel would know that there will be no
// answer. So it would wait for ever, with the daemon's locks and sockets. The guardian, another process, ends the connections when the
// daemon is killed.

const (
	guardianName = "buildkitd-lazy-fuse-guardian" // its argv[0]
	guardianEnv  = "BUILDKITD_LAZY_FUSE_GUARDIAN=1"
	// guardianSignal is what the kernel tells a guardian by that the daemon was killed.
	guardianSignal = unix.SIGUSR1
	// guardianConn is the guardian's descriptor of the connection to the daemon. The lock is the next one.
	guardianConn = 3

	// lockName is below Options.Root the file that is locked (flock) as long as there is a daemon or its guardian, which would end the connections of
	// the next one, too.
	lockName = "fuse.lock"
	// lockTimeout is how long the next daemon waits for that, and startTimeout how long one waits for its guardian.
	lockTimeout  = 30 * time.Second
	startTimeout = 20 * time.Second
	// guardianPause is between a guardian that has ended and the next.
	guardianPause = 100 * time.Millisecond
)

var errEnding = errors.New("the door is being closed")

// A guard is the daemon's side of the guardian.
type guard struct {
	root   string
	lock   *os.File
	keeper sync.WaitGroup
	ending chan struct{}

	mu   sync.Mutex
	conn *os.File // to the guardian, whose end is the guardian's
}

// lockRoot waits for the end of an earlier daemon and its guardian.
func lockRoot(root string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(root, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return lock, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Since(begin) > lockTimeout {
			lock.Close()
			return nil, fmt.Errorf("lock %s, which the daemon before or its guardian has until it ends: %w", lock.Name(), err)
		}
	}
}

// startGuard starts a guardian for the mounts below root. It takes the lock over.
func startGuard(root string, lock *os.File) (*guard, error) {
	if os.Getenv("BUILDKITD_LAZY_FUSE_GUARDIAN") != "" {
		return nil, errors.New("this program was started as guardian, but its main does not call fuse.GuardianMain")
	}
	g := &guard{root: root, lock: lock, ending: make(chan struct{})}
	started := make(chan error)
	g.keeper.Go(func() { g.keep(started) })
	if err := <-started; err != nil {
		g.conn.Close()
		return nil, fmt.Errorf("start guardian: %w", err)
	}
	return g, nil
}

// keep starts a guardian, says whether that went well, and starts another one when it ends.
func (g *guard) keep(started chan<- error) {
	// It's the end of this thread that the kernel tells the guardian. It never asks for anything of our mounts, so it can be killed at any time.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd, err := g.start()
	started <- err
	if err != nil {
		return
	}
	for {
		if err == nil {
			_ = cmd.Wait()
		}
		select {
		case <-g.ending:
			return
		case <-time.After(guardianPause):
		}
		cmd, err = g.start() // or again later
	}
}

// start starts a guardian and waits until it is ready.
func (g *guard) start() (*exec.Cmd, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "guardian"), os.NewFile(uintptr(pair[1]), "daemon")
	defer theirs.Close()
	if !g.connected(ours) {
		return nil, errEnding
	}
	patience := unix.NsecToTimeval(startTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return nil, err
	}
	// Not of any context: it outlives us.
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe")
	cmd.Args = []string{guardianName, g.root}
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), guardianEnv, "GOMAXPROCS=1") // PATH is where fusermount3 is
	cmd.ExtraFiles = []*os.File{theirs, g.lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: guardianSignal}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	theirs.Close()
	if _, err := ours.Read(make([]byte, 1)); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("no answer (does its main call fuse.GuardianMain?): %w", err)
	}
	return cmd, nil
}

// connected makes a connection the guard's, in place of the one before, unless the guard ends.
func (g *guard) connected(conn *os.File) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn != nil {
		g.conn.Close()
	}
	g.conn = conn
	select {
	case <-g.ending:
		conn.Close()
		return false
	default:
		return true
	}
}

// end lets the guardian go and waits for its end.
func (g *guard) end() {
	g.mu.Lock()
	close(g.ending)
	g.conn.Close()
	g.mu.Unlock()
	g.keeper.Wait()
	g.lock.Close()
}
