package snapshot

import (
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

// reserved are the characters that mean something in overlayfs's options. The kernel takes them with a backslash in front, which containerd,
// who makes the options, doesn't write.
const reserved = `,:\`

// Supported reports why lazy layers can't be served by a door below root, or nil. It mounts a layer there and reads it to
// find out.
func Supported(root, door string) error {
	if i := strings.IndexAny(root, reserved); i >= 0 {
		return fmt.Errorf("overlayfs can't be used in %s: in its options, as they are passed to it, a path can't have a %q; have the state in another directory, or name it by a symlink",
			root, root[i])
	}
	if err := overlayutils.Supported(root); err != nil {
		return fmt.Errorf("overlayfs can't be used in %s: %w", root, err)
	}
	probe := fuse.Probe
	if door == DoorEROFS {
		probe = erofs.Probe
	}
	return probe(root)
}
