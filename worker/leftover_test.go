package worker

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRemoveLeftBundles(t *testing.T) {
	root := t.TempDir()
	rootfs := func(id string) string {
		dir := filepath.Join(root, "runc-stargz", "executor", id, "rootfs")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(filepath.Dir(dir), "config.json"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	kept := filepath.Join(root, "runc-stargz", "executor", "resolv.conf")
	unmounted, mounted, full := rootfs("unmounted"), rootfs("mounted"), rootfs("full")
	for _, f := range []string{kept, filepath.Join(full, "file")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if os.Geteuid() == 0 {
		if err := unix.Mount("tmpfs", mounted, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(mounted, unix.MNT_DETACH) }) // if it's still there
		if err := os.WriteFile(filepath.Join(mounted, "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeLeftBundles(root); err == nil {
		t.Error("no error, though a file is in a root filesystem that isn't mounted")
	}
	for _, gone := range []string{unmounted, mounted} {
		if _, err := os.Stat(filepath.Dir(gone)); !os.IsNotExist(err) {
			t.Errorf("%s: %v, want it gone", filepath.Dir(gone), err)
		}
	}
	for _, there := range []string{kept, filepath.Join(full, "file")} {
		if _, err := os.Stat(there); err != nil {
			t.Error(err)
		}
	}
}
