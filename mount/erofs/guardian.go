package erofs

import (
	"encoding/json"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Descriptors of a guardian, as guard.start hands them over.
const (
	guardianGroup = 3 + iota
	guardianConn
	guardianSocket
	guardianOthers // the first of those that it was not meant to have
)

// GuardianMain runs the guardian, and returns true when it has ended, if that is what the program was started for: main
// calls it with os.Args before anything else, and returns if it has returned true.
func GuardianMain(args []string) bool {
	if len(args) != 2 || args[0] != guardianName {
		return false
	}
	closeOthers()
	// The daemon's end is told by its connection, not by the signals that end the daemon.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE, syscall.SIGUSR1, syscall.SIGUSR2)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // where that is allowed

	g := &guardian{root: args[1], group: groupOf(guardianGroup), files: make(map[string]guarded), upTo: usualNumbers}
	done := g.listen(os.NewFile(guardianConn, "daemon"))
	if !done || len(g.files) > 0 {
		g.guard(done)
	}
	return true
}

// closeOthers closes what was inherited by mistake: the guardian must not keep a listening socket or a lock alive.
func closeOthers() {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < guardianOthers {
			continue
		}
		// Those of Go's runtime.
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || strings.HasPrefix(to, "anon_inode:[event") {
			continue
		}
		_ = unix.Close(fd)
	}
}

// A guardian denies events after its daemon.
type guardian struct {
	root  string
	group *group
	files map[string]guarded // by image
	upTo  int                // descriptors of unanswered events are below
	deny  sync.WaitGroup     // the loop that does
}

type guarded struct {
	watched
	image *os.File // with O_PATH
}

// listen learns what there is to guard until the daemon ends. It reports whether the daemon did so in order.
func (g *guardian) listen(conn *os.File) (done bool) {
	defer conn.Close()
	_, _ = conn.Write([]byte{'r'})
	for in := json.NewDecoder(conn); ; {
		var m message
		if err := in.Decode(&m); err != nil {
			return done
		}
		switch {
		case m.Watch != nil:
			g.forget(m.Watch.Image)
			if image, err := os.OpenFile(m.Watch.Image, unix.O_PATH, 0); err == nil {
				g.files[m.Watch.Image] = guarded{*m.Watch, image}
			}
		case m.Forget != "":
			g.forget(m.Forget)
		case m.Numbers > 0:
			g.upTo = m.Numbers
		case m.Done:
			done = true
		}
	}
}

func (g *guardian) forget(image string) {
	if f, ok := g.files[image]; ok {
		f.image.Close()
		delete(g.files, image)
	}
}

// guard denies events until nothing can raise one, or until the next daemon has taken over.
func (g *guardian) guard(done bool) {
	g.denyEvents()
	if !done {
		for fd := range g.upTo {
			g.group.denyAll(fd)
		}
	}
	_ = detachBelow(g.root)

	next := make(chan *net.UnixConn)
	go func() { // ends with the process
		defer close(next)
		l, err := net.FileListener(os.NewFile(guardianSocket, "socket"))
		if err != nil {
			return
		}
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if conn := conn.(*net.UnixConn); ours(conn) {
				next <- conn
			} else {
				conn.Close()
			}
		}
	}()
	tick := time.NewTicker(250 * time.Millisecond)
	for {
		for image, f := range g.files {
			if !inUse(f.image) {
				g.unmark(f.Data)
				g.forget(image)
			}
		}
		if len(g.files) == 0 {
			return
		}
		select {
		case <-tick.C:
		case conn, ok := <-next:
			if !ok {
				next = nil
				continue
			}
			if g.handOver(conn) {
				return
			}
		}
	}
}

// ours reports whether the other end is of the same user: what it gets may answer every read.
func ours(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	same := false
	err = raw.Control(func(fd uintptr) {
		peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		same = err == nil && int(peer.Uid) == os.Geteuid()
	})
	return err == nil && same
}

// denyEvents has a goroutine deny whatever comes.
func (g *guardian) denyEvents() {
	g.group.resume()
	g.deny.Go(func() {
		g.group.each(func(e event) {
			g.group.denyAll(e.fd)
			unix.Close(e.fd)
		}, func(error) {})
	})
}

func (g *guardian) unmark(path string) {
	if f, err := os.OpenFile(path, unix.O_PATH, 0); err == nil {
		_ = g.group.unmark(f)
		f.Close()
	}
}

// handOver gives the group to the next daemon. It reports whether that has it, and a guardian.
func (g *guardian) handOver(conn *net.UnixConn) bool {
	defer conn.Close()
	g.group.stop()
	g.deny.Wait()
	list := make([]watched, 0, len(g.files))
	for _, f := range g.files {
		list = append(list, f.watched)
	}
	if bequeath(conn, g.group, list) != nil {
		g.denyEvents()
		return false
	}
	return true
}
