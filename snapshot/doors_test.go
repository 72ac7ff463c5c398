package snapshot

import (
	"os"
	"regexp"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
)

func TestMain(m *testing.M) {
	if erofs.GuardianMain(os.Args) {
		return
	}
	os.Exit(m.Run())
}

// mountsPerLayer is how many mounts a layer of one snapshot makes: the door's, and a bind mount where that is our own.
func mountsPerLayer() int {
	if testDoor() == "" {
		return 1
	}
	return 2
}

// fileAndChunk matches an error that says which chunk of which file is corrupt.
var fileAndChunk = regexp.MustCompile(`read /?file(: chunk at 0: | \(layer sha256:[0-9a-f]{64}\): chunk 0: )`)

// testDoor is the door of the tests.
func testDoor() string { return os.Getenv("TEST_DOOR") }
