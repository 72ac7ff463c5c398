package worker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// removeLeftBundles removes the bundles of steps that were running when an earlier daemon on the state directory was killed, and the
// mounts of their root filesystems, which would keep lazy layers in use. A step that still runs has its own.
func removeLeftBundles(root string) error {
	real, err := filepath.EvalSymlinks(root) // as mounts are listed
	if err != nil {
		return err
	}
	bundles, err := filepath.Glob(filepath.Join(real, "runc-*", "executor", "*", "rootfs"))
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !slices.Contains(bundles, m.Mountpoint), false
	})
	if err != nil {
		return fmt.Errorf("list mounts below %s: %w", root, err)
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	for _, rootfs := range bundles {
		// Only what is empty: an unmount that failed must not cost a file.
		if err := os.Remove(rootfs); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, os.RemoveAll(filepath.Dir(rootfs)))
	}
	return errors.Join(errs...)
}
