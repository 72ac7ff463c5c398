package snapshot

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
)

// TestKilledWhileASnapshotIsMade leaves what a kill leaves between a snapshot's directory and its ID in the metadata.
func TestKilledWhileASnapshotIsMade(t *testing.T) {
	reg := newRegistry(t, http.NotFound)
	eager := func(open func(root string) (snapshots.Snapshotter, error)) func(string) (snapshots.Snapshotter, error) {
		return func(root string) (snapshots.Snapshotter, error) {
			if err := SetAside(t.Context(), root); err != nil {
				return nil, err
			}
			return open(root)
		}
	}
	for name, c := range map[string]struct {
		open func(root string) (snapshots.Snapshotter, error)
		dir  string
	}{
		"ours":    {func(root string) (snapshots.Snapshotter, error) { return New(root, reg.options(DoorFUSE)) }, "snapshotter/snapshots"},
		"overlay": {eager(func(root string) (snapshots.Snapshotter, error) { return overlay.NewSnapshotter(root) }), "snapshots"},
		"native":  {eager(native.NewSnapshotter), "snapshots"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, c.dir)
			var kept string
			// Before the first snapshot, and after it.
			for id := 1; id <= 2; id++ {
				left := filepath.Join(dir, strconv.Itoa(id), "fs", "left")
				if err := os.MkdirAll(left, 0o700); err != nil {
					t.Fatal(err)
				}
				s, err := c.open(root)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.Prepare(t.Context(), "key"+strconv.Itoa(id), ""); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("what was left is in a new snapshot: %v", err)
				}
				if kept != "" {
					if _, err := os.Stat(kept); err != nil {
						t.Errorf("a snapshot lost its content: %v", err)
					}
				}
				kept = filepath.Join(dir, strconv.Itoa(id), "kept")
				if err := os.WriteFile(kept, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if cleaner, ok := s.(snapshots.Cleaner); ok {
					if err := cleaner.Cleanup(t.Context()); err != nil {
						t.Error(err)
					}
					if found, err := os.ReadDir(dir); err != nil || len(found) != id {
						t.Errorf("after Cleanup there is %v, %v; want %d snapshots", found, err, id)
					}
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
