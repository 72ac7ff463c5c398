package snapshot

import (
	"fmt"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

// The doors that Options.Door names.
const (
	// DoorEROFS mounts layers in the kernel.
	DoorEROFS = "erofs"
	// DoorFUSE serves layers over FUSE.
	DoorFUSE = "fuse"
)

// newLayerDoor opens a door whose mounts are below root. denied is told of reads that got EIO.
func newLayerDoor(root, name string, userXattr bool, denied func(target string, err error)) (layerDoor, error) {
	tell := func(target string, _, _ int64, err error) { denied(target, err) }
	switch name {
	case DoorEROFS:
		d, err := erofs.Open(erofs.Options{Root: root, Denied: tell})
		if err != nil {
			return nil, err
		}
		return &erofsDoor{d, userXattr}, nil
	case DoorFUSE:
		d, err := fuse.Open(fuse.Options{Root: root, Denied: tell, Notice: denied})
		if err != nil {
			return nil, err
		}
		return &fuseDoor{d, userXattr}, nil
	default:
		return nil, fmt.Errorf("no door %q: there are %q and %q", name, DoorEROFS, DoorFUSE)
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
	m, err := d.Mount(erofs.MountOptions{Image: img, Data: s.held.DataPath(), Target: target, Filler: s})
	if err != nil {
		return nil, err // no *erofs.Mount, which would be a doorMount that is nil and not nil
	}
	return m, nil
}

// fuseDoor is the door over FUSE.
type fuseDoor struct {
	*fuse.Door
	userXattr bool
}

func (d *fuseDoor) mount(s *served, target string) (doorMount, error) {
	m, err := d.Mount(fuse.MountOptions{Layer: s.held.Model(), Data: s.held.File(), Target: target, Filler: s, UserXattr: d.userXattr})
	if err != nil {
		return nil, err // as above
	}
	return m, nil
}
