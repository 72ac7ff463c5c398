package fuse

import (
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// GuardianMain runs the guardian of a Door, and returns true when it has ended, if that is what the program was started for: main
// calls it with os.Args before anything else, and returns if it has returned true.
func GuardianMain(args []string) bool {
	if len(args) != 2 || args[0] != guardianName {
		return false
	}
	killed := make(chan os.Signal, 1)
	signal.Notify(killed, guardianSignal)
	// What ends the daemon in order isn't for the guardian: the daemon lets it go.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGUSR2)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // where that is allowed

	conn := os.NewFile(guardianConn, "daemon")
	_, _ = conn.Write([]byte{'r'})
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, conn)
		close(ended)
	}()
	select {
	case <-killed:
		_ = abortBelow(args[1]) // it's all that can be done
	case <-ended: // the connections, too: nothing of the daemon is left
	}
	return true
}
