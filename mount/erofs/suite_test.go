package erofs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs/image"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/mounttest"
)

// suiteDoor is a Door as the suite of all doors wants it.
type suiteDoor struct{ *Door }

func (d suiteDoor) Mount(t testing.TB, f *mounttest.Files) (mounttest.Mount, error) {
	t.Helper()
	img, err := os.Create(filepath.Join(f.Dir, "image"))
	if err != nil {
		return nil, err
	}
	defer img.Close()
	if err := image.Write(img, f.Layer, image.Options{}); err != nil {
		return nil, err
	}
	return d.Door.Mount(MountOptions{Image: img.Name(), Data: f.Data.Name(), Target: f.Target, Filler: f.Filler})
}

// What the FUSE door does, this one does.
func TestSuite(t *testing.T) {
	mounttest.Run(t, func(t testing.TB, root string) mounttest.Door {
		d, _ := openDoor(t, root)
		return suiteDoor{d}
	})
}
