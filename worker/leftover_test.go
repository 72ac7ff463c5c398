package worker

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// oddDir is a state directory whose path isn't to be taken for a pattern, nor as it is looked for among the options of mounts.
func oddDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "a [1]* of b")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRemoveLeftBundles(t *testing.T) {
	root := oddDir(t)
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
	hosts := filepath.Join(filepath.Dir(kept), "hosts.4qfbssnl2v03as6mpfujy3h7o")
	for _, f := range []string{kept, hosts, filepath.Join(full, "file")} {
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
	for _, gone := range []string{filepath.Dir(unmounted), filepath.Dir(mounted), hosts} {
		if _, err := os.Stat(gone); !os.IsNotExist(err) {
			t.Errorf("%s: %v, want it gone", gone, err)
		}
	}
	for _, there := range []string{kept, filepath.Join(full, "file")} {
		if _, err := os.Stat(there); err != nil {
			t.Error(err)
		}
	}
}

// The containers of left bundles are ended, but none that only has the same ID.
func TestEndLeftSteps(t *testing.T) {
	root := oddDir(t)
	executor := filepath.Join(root, "runc-stargz", "executor")
	for _, id := range []string{"left", "unknown", "others", "stuck"} {
		if err := os.MkdirAll(filepath.Join(executor, id, "rootfs"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	runtime := filepath.Join(t.TempDir(), "runtime")
	script := `#!/bin/sh
case "$*" in
"state others") echo '{"id":"others","status":"running","bundle":"/elsewhere/others"}' ;;
"state unknown") echo container does not exist >&2; exit 1 ;;
"state "*) echo '{"id":"'$2'","status":"created","bundle":"` + executor + `/'$2'"}' ;;
"delete --force stuck") echo it does not want to >&2; exit 1 ;;
*) echo "$*" >> ` + runtime + `.log ;;
esac
`
	if err := os.WriteFile(runtime, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	err := endLeftSteps(t.Context(), root, runtime)
	says(t, err, "delete --force stuck", "it does not want to")
	done, err := os.ReadFile(runtime + ".log")
	if err != nil {
		t.Fatal(err)
	}
	if string(done) != "delete --force left\n" {
		t.Errorf("the runtime was told to\n%s", done)
	}
}

// Mounts of the state directory's snapshots go, others' stay.
func TestRemoveLeftMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
	root, other, tmp := oddDir(t), t.TempDir(), t.TempDir()
	dir := func(elem ...string) string {
		d := filepath.Join(elem...)
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
		return d
	}
	mount := func(name, source, fstype string, flags uintptr, data string) string {
		target := dir(tmp, name)
		if err := unix.Mount(source, target, fstype, flags, data); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) }) // if it's still there
		return target
	}
	lower := func(root string) string { return "lowerdir=" + dir(root, "a") + ":" + dir(root, "b") }
	gone := []string{
		mount("buildkit-mount1", dir(root, "fs"), "", unix.MS_BIND, ""),
		mount("buildkit-mount2", "overlay", "overlay", unix.MS_RDONLY, lower(root)),
		mount("containerd-mount5", "overlay", "overlay", unix.MS_RDONLY, lower(root)), // of an export
	}
	stay := []string{
		mount("buildkit-mount3", dir(other, "fs"), "", unix.MS_BIND, ""),
		mount("buildkit-mount4", "overlay", "overlay", unix.MS_RDONLY, lower(other)),
		mount("containerd-mount6", "overlay", "overlay", unix.MS_RDONLY, lower(other)),
		mount("else", dir(root, "fs"), "", unix.MS_BIND, ""),
	}
	if err := removeLeftMounts(root, filepath.Join(tmp, "absent"), tmp); err != nil {
		t.Error(err)
	}
	for _, d := range gone {
		if _, err := os.Stat(d); !os.IsNotExist(err) {
			t.Errorf("%s: %v, want it gone", d, err)
		}
	}
	for _, d := range stay {
		if err := unix.Unmount(d, unix.MNT_DETACH); err != nil {
			t.Errorf("%s is not mounted any more: %v", d, err)
		}
	}
}
