package erofs

import (
	"os"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/mounttest"
)

// The test binary is its own guardian, and the daemon that is killed.
func TestMain(m *testing.M) {
	if GuardianMain(os.Args) {
		return
	}
	if os.Getenv(victimEnv) != "" {
		victim()
		return
	}
	os.Exit(mounttest.Main(m))
}
