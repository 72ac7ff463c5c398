package snapshot

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
)

// An image may have a layer several times: overlayfs, which refuses that, is shown it once.
func TestSameLayerTwice(t *testing.T) { eachDoor(t, testSameLayerTwice) }

func testSameLayerTwice(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"kept": []byte("kept"), "dir/": nil, "dir/again": []byte("again"), "dir/.wh.low": nil})
	between := layerOf(t, map[string][]byte{"between": []byte("between"), "dir/": nil, "dir/.wh.again": nil, "dir/low": nil})
	reg := newRegistry(t, nil, l, between)
	s, _ := newSnapshotter(t, reg.options(door))
	mounted := func(name, parent string, l testLayer) {
		t.Helper()
		if _, err := s.Prepare(t.Context(), "making "+name, parent, snapshots.WithLabels(reg.labels(name, l))); !cerrdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	mounted("1", "", l)
	mounted("1 1", "1", l)
	mounted("1 2", "1", between)
	mounted("1 2 1", "1 2", l)
	mounted("1 2 1 1", "1 2 1", l)

	check := func(mounts []mount.Mount, want map[string]bool) {
		t.Helper()
		if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
			for name, there := range want {
				if _, err := os.ReadFile(filepath.Join(dir, name)); there != (err == nil) {
					t.Errorf("%s: %v, want it there: %v", name, err, there)
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	all := map[string]bool{"kept": true, "between": true, "dir/again": true, "dir/low": false}
	one := map[string]bool{"kept": true, "between": false, "dir/again": true}
	for parent, want := range map[string]map[string]bool{"1 2 1 1": all, "1 2 1": all, "1 1": one} {
		key := "rw " + parent
		mounts, err := s.Prepare(t.Context(), key, parent)
		if err != nil {
			t.Fatal(err)
		}
		check(mounts, want)
		if mounts, err = s.Mounts(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		check(mounts, want)
		if mounts, err = s.View(t.Context(), "view "+parent, parent); err != nil {
			t.Fatal(err)
		}
		check(mounts, want)
	}
}
