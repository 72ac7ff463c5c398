package worker

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	bksnapshot "github.com/moby/buildkit/snapshot"
)

// A mountingSnapshotter tells what is mounted, before it is, and until when. BuildKit keeps the snapshot that a step has written to, and the view by which it
// has mounted its result, to export it say, as long as that is in its cache: that there is one doesn't say that somebody reads.
type mountingSnapshotter struct {
	bksnapshot.Snapshotter
	mounting func(mounts []mount.Mount) (over func(), err error)
}

// Mounts implements snapshot.Snapshotter.
func (s *mountingSnapshotter) Mounts(ctx context.Context, key string) (bksnapshot.Mountable, error) {
	return s.told(s.Snapshotter.Mounts(ctx, key))
}

// View implements snapshot.Snapshotter.
func (s *mountingSnapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) (bksnapshot.Mountable, error) {
	return s.told(s.Snapshotter.View(ctx, key, parent, opts...))
}

func (s *mountingSnapshotter) told(m bksnapshot.Mountable, err error) (bksnapshot.Mountable, error) {
	if err != nil {
		return nil, err
	}
	return tellingMountable{m, s}, nil
}

type tellingMountable struct {
	bksnapshot.Mountable
	by *mountingSnapshotter
}

// Mount implements snapshot.Mountable.
func (m tellingMountable) Mount() ([]mount.Mount, func() error, error) {
	mounts, release, err := m.Mountable.Mount()
	if err != nil {
		return mounts, release, err
	}
	over, err := m.by.mounting(mounts)
	if err != nil {
		if release != nil {
			err = errors.Join(err, release())
		}
		return nil, nil, err
	}
	return mounts, releasing(release, over), nil
}

// releasing returns release with something that is over then.
func releasing(release func() error, over func()) func() error {
	return func() error {
		defer over()
		if release == nil {
			return nil
		}
		return release()
	}
}
