package snapshot

import (
	"fmt"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"

	"github.com/buildkitd-lazy/buildkitd-lazy/host"
)

// Supported reports why lazy layers can't be mounted below root, or nil. It
// mounts an empty FUSE file system there to find out.
func Supported(root string) error {
	if err := overlayutils.Supported(root); err != nil {
		return fmt.Errorf("overlayfs can't be used in %s: %w", root, err)
	}
	if err := host.TryFUSE(root); err != nil {
		return fmt.Errorf("FUSE can't be used: %w; load the module fuse and give the daemon /dev/fuse", err)
	}
	return nil
}
