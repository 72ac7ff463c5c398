package snapshot

import (
	"fmt"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
)

// The doors that Options.Door names.
const (
	// DoorEROFS mounts layers in the kernel.
	DoorEROFS = "erofs"
)

// newLayerDoor opens a door whose mounts are below root. denied is told of reads that got EIO.
func newLayerDoor(root, name string, userXattr bool, denied func(target string, err error)) (layerDoor, error) {
	switch name {
	case DoorEROFS:
		d, err := erofs.Open(erofs.Options{Root: root, Denied: func(target string, _, _ int64, err error) { denied(target, err) }})
		if err != nil {
			return nil, err
		}
		return &erofsDoor{d, userXattr}, nil
	default:
		return nil, fmt.Errorf("no door %q", name)
	}
}

// erofsDoor is the kernel door.
type erofsDoor struct {
	*erofs.Door
	userXattr bool
}

func (d *erofsDoor) mount(s *served, target string) (doorMount, error) {
	img, err := s.image(d.userXattr)
	if err != nil {
		return nil, err
	}
	return d.Mount(erofs.MountOptions{Image: img, Data: s.held.DataPath(), Target: target, Filler: s})
}
