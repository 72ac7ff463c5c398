package snapshot

import (
	"os"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

func TestMain(m *testing.M) {
	if erofs.GuardianMain(os.Args) || fuse.GuardianMain(os.Args) {
		return
	}
	os.Exit(m.Run())
}

// eachDoor runs a test with every door that this host has; FUSE it must have, and both where CI is set.
func eachDoor(t *testing.T, test func(t *testing.T, door string)) {
	t.Helper()
	for _, door := range []string{DoorEROFS, DoorFUSE} {
		t.Run(door, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Fatal("this test mounts file systems: run it as root")
			}
			if err := Supported(t.TempDir(), door); err != nil {
				if door == DoorFUSE || os.Getenv("CI") != "" {
					t.Fatal(err)
				}
				t.Skip(err)
			}
			test(t, door)
		})
	}
}

// mountsPerLayer is how many mounts a layer of one snapshot makes: the door's, and a bind mount of that.
const mountsPerLayer = 2
