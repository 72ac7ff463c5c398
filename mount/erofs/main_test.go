package erofs

import (
	"os"
	"testing"
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
	os.Exit(m.Run())
}
