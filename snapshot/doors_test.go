package snapshot

import (
	"errors"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"

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

// A read that the kernel refuses before anybody knows of which layer is told of; that of a layer that is gone isn't.
func TestDeniedOfNoLayer(t *testing.T) {
	var told []error
	e := &engine{opt: Options{Watch: Watch{Denied: func(layer digest.Digest, err error) {
		if layer != "" {
			t.Errorf("told of layer %s", layer)
		}
		told = append(told, err)
	}}}}
	why := errors.New("too many open files")
	e.denied("", why)
	e.denied("", erofs.ErrUnmounted)
	e.denied("/gone", why)
	if len(told) != 1 || !errors.Is(told[0], why) {
		t.Errorf("told of %v, want %v once", told, why)
	}
}
