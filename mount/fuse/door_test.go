package fuse

import (
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/mounttest"
)

// door is a Door as the suite wants it.
type door struct{ *Door }

func (d door) Mount(_ testing.TB, f *mounttest.Files) (mounttest.Mount, error) {
	return d.Door.Mount(options(f))
}

func options(f *mounttest.Files) MountOptions {
	return MountOptions{Layer: f.Layer, Data: f.Data, Target: f.Target, Filler: f.Filler}
}

func openDoor(t testing.TB, opt Options) *Door {
	t.Helper()
	opt.Notice = func(target string, err error) { t.Errorf("%s: %v", target, err) }
	d, err := Open(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestSuite(t *testing.T) {
	mounttest.Run(t, func(t testing.TB, root string) mounttest.Door { return door{openDoor(t, Options{Root: root})} })
}

// As where there is no CAP_SYS_ADMIN.
func TestSuiteByHelper(t *testing.T) {
	mounttest.Run(t, func(t testing.TB, root string) mounttest.Door {
		return door{openDoor(t, Options{Root: root, helper: true})}
	})
}

func TestProbe(t *testing.T) {
	if err := Probe(t.TempDir()); err != nil {
		t.Fatal(err)
	}
}
