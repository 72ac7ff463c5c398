package snapshot

import (
	"fmt"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

// Supported reports why lazy layers can't be served by a door below root, or nil. It mounts a layer there and reads it to
// find out.
func Supported(root, door string) error {
	if err := overlayutils.Supported(root); err != nil {
		return fmt.Errorf("overlayfs can't be used in %s: %w", root, err)
	}
	probe := fuse.Probe
	if door == DoorEROFS {
		probe = erofs.Probe
	}
	return probe(root)
}
