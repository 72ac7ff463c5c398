package mounttest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Main runs the tests of a package and returns their exit status. It waits for other packages that run by it: each
// drops the machine's page cache, and counts reads that the page cache answers.
func Main(m *testing.M) int {
	lock, err := os.OpenFile(filepath.Join(os.TempDir(), "buildkitd-lazy-mounttest.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		defer lock.Close()
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		for errors.Is(err, unix.EINTR) {
			err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "wait for other tests:", err)
		return 1
	}
	return m.Run()
}
