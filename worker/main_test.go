package worker

import (
	"os"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

// The test binary is the guardian of the doors that it opens.
func TestMain(m *testing.M) {
	if erofs.GuardianMain(os.Args) || fuse.GuardianMain(os.Args) {
		return
	}
	os.Exit(m.Run())
}
