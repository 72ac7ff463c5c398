package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	runc "github.com/containerd/go-runc"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// endPatience is how long the runtime may take to end a container. Its processes are killed, which is a matter of milliseconds.
const endPatience = 20 * time.Second

// leftRootfs returns the root filesystems of the bundles of steps that were running when an earlier daemon on the state directory
// was killed, as mounts are listed.
func leftRootfs(root string) ([]string, error) {
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, err
	}
	// Of the directory, as its path isn't a pattern.
	found, err := fs.Glob(os.DirFS(real), "runc-*/executor/*/rootfs")
	for i := range found {
		found[i] = filepath.Join(real, found[i])
	}
	return found, err
}

// endLeftSteps ends the containers of these steps. The runtime that started one died with its daemon, but the container's processes
// run on, on layers that nobody fills any more; and if the runtime hadn't come to start it, its first process waits for ever.
// Nobody wants what they do: their builds have failed.
func endLeftSteps(ctx context.Context, root, runtime string) error {
	bundles, err := leftRootfs(root)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, endPatience, fmt.Errorf("%s has not ended the containers of an earlier daemon within %v", runtime, endPatience))
	defer cancel()
	r := &runc.Runc{Command: runtime}
	errs := make([]error, len(bundles))
	var wg sync.WaitGroup
	for i, rootfs := range bundles {
		wg.Go(func() {
			bundle := filepath.Dir(rootfs)
			id := filepath.Base(bundle)
			// A frontend may have chosen the ID, and another daemon's may have chosen the same.
			if c, err := r.State(ctx, id); err != nil || c.Bundle != bundle {
				return
			}
			if err := r.Delete(ctx, id, &runc.DeleteOpts{Force: true}); err != nil {
				errs[i] = fmt.Errorf("%s delete --force %s: %w", runtime, id, cmp.Or(context.Cause(ctx), err))
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// removeLeftBundles removes these steps' bundles, the mounts of their root filesystems, which would keep lazy layers in use, and their /etc/hosts,
// of which BuildKit makes one for each step that has a hostname or hosts of its own.
func removeLeftBundles(root string) error {
	bundles, err := leftRootfs(root)
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
	hosts, err := fs.Glob(os.DirFS(root), "runc-*/executor/hosts.*")
	errs = append(errs, err)
	for _, path := range hosts {
		errs = append(errs, os.Remove(filepath.Join(root, path)))
	}
	return errors.Join(errs...)
}

// removeLeftMounts removes mounts of snapshots, which BuildKit makes for copying and containerd for the layers of an export, that a killed daemon on
// the state directory has left in the directories for temporary files: nobody else ever will. Other daemons' are told from them by what they are
// mounts of.
func removeLeftMounts(root string, tmp ...string) error {
	root, err := filepath.EvalSymlinks(root) // as mounts are listed
	if err != nil {
		return err
	}
	var in []string
	for _, dir := range tmp {
		if dir, err = filepath.EvalSymlinks(dir); err == nil {
			in = append(in, dir)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return fmt.Errorf("%s: %w", root, err)
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	// The state directory's path in its own filesystem, which is what bind mounts are listed with.
	own := ""
	for _, m := range mounts {
		if rel, err := filepath.Rel(m.Mountpoint, root); err == nil && filepath.IsLocal(rel) && unix.Mkdev(uint32(m.Major), uint32(m.Minor)) == st.Dev {
			own = filepath.Join(m.Root, rel)
		}
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		dir, name := filepath.Split(m.Mountpoint)
		if !slices.Contains(in, filepath.Clean(dir)) || !strings.HasPrefix(name, "buildkit-mount") && !strings.HasPrefix(name, "containerd-mount") {
			continue
		}
		bind := own != "" && unix.Mkdev(uint32(m.Major), uint32(m.Minor)) == st.Dev && strings.HasPrefix(m.Root, own+"/")
		overlay := m.FSType == "overlay" && slices.ContainsFunc(mountOptions(m), func(o string) bool {
			return strings.Contains(o, "="+root+"/") || strings.Contains(o, ":"+root+"/")
		})
		if !bind && !overlay {
			continue
		}
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
			continue
		}
		errs = append(errs, os.Remove(m.Mountpoint))
	}
	return errors.Join(errs...)
}

// tempDirs are where BuildKit and containerd make such mounts.
func tempDirs() []string {
	dirs := []string{os.TempDir()}
	if xdg := os.Getenv("XDG_RUNTIME_DIR"); xdg != "" { // as containerd's mount package has it
		dirs = append(dirs, xdg)
	}
	return dirs
}
