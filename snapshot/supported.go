package snapshot

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Supported reports why lazy layers can't be mounted below root, or nil. It
// mounts an empty FUSE file system there to find out.
func Supported(root string) (err error) {
	if err := overlayutils.Supported(root); err != nil {
		return fmt.Errorf("overlayfs can't be used in %s: %w", root, err)
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("FUSE can't be used: %w; load the module fuse and give the daemon /dev/fuse", err)
	}
	f.Close()
	dir, err := os.MkdirTemp(root, "fuse-check-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	// The options of the file system for layers: mount(2), not fusermount.
	server, err := fusefs.Mount(dir, &fusefs.Inode{}, &fusefs.Options{
		MountOptions: fuse.MountOptions{FsName: "buildkitd-lazy-check", AllowOther: true, DirectMountStrict: true},
	})
	if err != nil {
		return fmt.Errorf("FUSE can't be used: mount on %s: %w", dir, err)
	}
	return server.Unmount()
}
