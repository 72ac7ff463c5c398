package erofs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watched is a layer that has events, by the paths of its files.
type watched struct {
	Image, Data string
}

// A message is what the daemon tells its guardian, as a line of JSON.
type message struct {
	Watch   *watched `json:",omitempty"`
	Forget  string   `json:",omitempty"` // an image
	Numbers int      `json:",omitempty"` // events have descriptors below this
	Done    bool     `json:",omitempty"` // the daemon ends with every event answered
}

const (
	guardianName = "buildkitd-lazy-guardian" // its argv[0]
	guardianEnv  = "BUILDKITD_LAZY_GUARDIAN=1"

	// usualNumbers is how far the guardian looks for events that a daemon left unanswered, if it isn't told to look further.
	// The kernel gives out the lowest number that is free.
	usualNumbers = 1 << 16
)

// A guard is the daemon's side of the guardian. The methods of a nil guard do nothing.
type guard struct {
	opt     Options
	group   *group
	socket  *os.File       // where the next daemon connects; the guardian accepts
	watcher sync.WaitGroup // of the process

	mu     sync.Mutex
	files  map[string]watched // by image
	upTo   int                // what the guardian knows by numbers
	conn   *os.File           // to the guardian, nil while there is none
	cmd    *exec.Cmd
	ending chan struct{}
}

func startGuard(opt Options, group *group) (*guard, error) {
	if os.Getenv("BUILDKITD_LAZY_GUARDIAN") != "" {
		return nil, errors.New("this program was started as guardian, but its main does not call erofs.GuardianMain")
	}
	socket, err := listen(opt.Root)
	if err != nil {
		return nil, err
	}
	g := &guard{opt: opt, group: group, socket: socket, files: make(map[string]watched), upTo: usualNumbers, ending: make(chan struct{})}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.start(); err != nil {
		socket.Close()
		return nil, fmt.Errorf("start guardian: %w", err)
	}
	g.watcher.Go(g.keep)
	return g, nil
}

// start starts a guardian, tells it all it has to know, and waits until it is ready. The mutex is held.
func (g *guard) start() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "guardian"), os.NewFile(uintptr(pair[1]), "daemon")
	defer theirs.Close()
	// Not of any context: it outlives us.
	cmd := exec.CommandContext(context.Background(), g.program())
	cmd.Args = []string{guardianName, g.opt.Root}
	cmd.Dir = "/"
	cmd.Env = []string{guardianEnv, "GOMAXPROCS=2"}
	cmd.ExtraFiles = []*os.File{g.group.File, theirs, g.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		ours.Close()
		return err
	}
	theirs.Close()
	patience := unix.Timeval{Sec: 20}
	err = errors.Join(
		unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience),
	)
	if err == nil {
		_, err = ours.Read(make([]byte, 1))
	}
	if err != nil {
		ours.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return fmt.Errorf("no answer (does its main call erofs.GuardianMain?): %w", err)
	}
	g.conn, g.cmd = ours, cmd
	g.tell(message{Numbers: g.upTo})
	for _, f := range g.files {
		g.tell(message{Watch: &f})
	}
	return nil
}

func (g *guard) program() string {
	if g.opt.Guardian != "" {
		return g.opt.Guardian
	}
	return "/proc/self/exe"
}

// tell sends a message. A guardian that does not take it makes place for another, which is told all. The mutex is held.
func (g *guard) tell(m message) {
	if g.conn == nil {
		return
	}
	line, err := json.Marshal(m)
	if err != nil {
		panic(err) // of strings and numbers
	}
	if _, err := g.conn.Write(append(line, '\n')); err != nil {
		_ = g.cmd.Process.Kill() // see keep
	}
}

// keep starts another guardian when one ends.
func (g *guard) keep() {
	for {
		g.mu.Lock()
		cmd := g.cmd
		g.mu.Unlock()
		if cmd != nil {
			_ = cmd.Wait()
		}
		g.mu.Lock()
		if g.conn != nil {
			g.conn.Close()
		}
		g.conn, g.cmd = nil, nil
		g.mu.Unlock()
		select {
		case <-g.ending:
			return
		case <-time.After(100 * time.Millisecond):
		}
		g.mu.Lock()
		if !g.over() {
			_ = g.start() // or again later
		}
		g.mu.Unlock()
	}
}

func (g *guard) over() bool {
	select {
	case <-g.ending:
		return true
	default:
		return false
	}
}

// watch tells of a layer before it has events.
func (g *guard) watch(f watched) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.files[f.Image] = f
	g.tell(message{Watch: &f})
}

// forget tells of a layer that has no events any more.
func (g *guard) forget(image string) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.files, image)
	g.tell(message{Forget: image})
}

// numbers tells of the number of an event's descriptor, if it is higher than what the guardian expects.
func (g *guard) numbers(fd int) {
	if g == nil || fd < usualNumbers {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if fd >= g.upTo {
		g.upTo = 2 * fd
		g.tell(message{Numbers: g.upTo})
	}
}

// end lets the guardian go. If nothing is left for it to guard, it waits for its end.
func (g *guard) end(nothing bool) {
	g.mu.Lock()
	close(g.ending)
	g.tell(message{Done: true})
	if g.conn != nil {
		g.conn.Close()
		g.conn = nil
	}
	g.mu.Unlock()
	if nothing {
		g.watcher.Wait()
		_ = os.Remove(socketPath(g.opt.Root)) // a stale one does no harm
	}
	g.socket.Close()
}
