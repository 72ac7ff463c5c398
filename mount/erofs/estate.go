package erofs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// takeOverTimeout is how long the next daemon waits for the guardian of the last one, and the other way round.
const takeOverTimeout = 30 * time.Second

// socketName is where below Options.Root a guardian waits for the next daemon.
const socketName = "guardian.sock"

func socketPath(root string) string { return filepath.Join(root, socketName) }

// shortly calls f with a name of the socket that fits into an address: paths may be longer than 107 bytes.
func shortly[T any](root string, f func(*net.UnixAddr) (T, error)) (t T, err error) {
	dir, err := os.OpenFile(root, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return t, err
	}
	defer dir.Close()
	return f(&net.UnixAddr{Net: "unix", Name: filepath.Join(procPath(dir), socketName)})
}

// listen makes the socket, in place of the one of an earlier daemon.
func listen(root string) (*os.File, error) {
	if err := os.Remove(socketPath(root)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := shortly(root, func(a *net.UnixAddr) (*net.UnixListener, error) { return net.ListenUnix("unix", a) })
	if err != nil {
		return nil, fmt.Errorf("guardian's socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	return l.File()
}

// An estate is what a daemon that has ended left to the next.
type estate struct {
	group *group // nil if there is none
	files []watched
	conn  *net.UnixConn
}

// takeOver asks the last daemon's guardian, if there is one, for the group. The guardian goes on until accept is called.
func takeOver(root string) (*estate, error) {
	conn, err := shortly(root, func(a *net.UnixAddr) (*net.UnixConn, error) { return net.DialUnix("unix", nil, a) })
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return &estate{}, nil
	}
	if err != nil {
		return nil, err
	}
	e := &estate{conn: conn}
	if err := e.receive(); err != nil {
		e.release()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, fmt.Errorf("%s belongs to a daemon that runs: %w", root, err)
		}
		// It had nothing to guard any more, and ended.
		return &estate{}, nil
	}
	return e, nil
}

// receive is the other end of bequeath.
func (e *estate) receive() error {
	if err := e.conn.SetDeadline(time.Now().Add(takeOverTimeout)); err != nil {
		return err
	}
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := e.conn.ReadMsgUnix(b, oob)
	if err != nil {
		return err
	}
	if n == 0 {
		return io.EOF
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return err
	}
	if len(messages) != 1 {
		return fmt.Errorf("%d control messages", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	e.group = groupOf(fds[0])
	if err := json.NewDecoder(e.conn).Decode(&e.files); err != nil {
		e.group.Close()
		e.group = nil
		return err
	}
	return nil
}

// accept lets the guardian go.
func (e *estate) accept() {
	if e.conn != nil {
		_, _ = e.conn.Write([]byte{'a'})
	}
}

func (e *estate) release() {
	if e.conn != nil {
		e.conn.Close()
	}
}

// bequeath hands the group and what it watches to the next daemon, and waits until that has accepted.
func bequeath(conn *net.UnixConn, g *group, files []watched) error {
	if err := conn.SetDeadline(time.Now().Add(takeOverTimeout)); err != nil {
		return err
	}
	if _, _, err := conn.WriteMsgUnix([]byte{'g'}, unix.UnixRights(int(g.Fd())), nil); err != nil {
		return err
	}
	if err := json.NewEncoder(conn).Encode(files); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}
