package worker

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	bksnapshot "github.com/moby/buildkit/snapshot"
)

// A usingSnapshotter says what is mounted, and until when. BuildKit keeps the snapshot that a step has written to, and the view by which it has mounted its
// result, to export it say, as long as that is in its cache: that there is one doesn't say that somebody reads.
type usingSnapshotter struct {
	bksnapshot.Snapshotter
	use func(ctx context.Context, mounts []mount.Mount) (release func(), err error)
}

// Mounts implements snapshot.Snapshotter.
func (s *usingSnapshotter) Mounts(ctx context.Context, key string) (bksnapshot.Mountable, error) {
	return s.using(s.Snapshotter.Mounts(ctx, key))
}

// View implements snapshot.Snapshotter.
func (s *usingSnapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) (bksnapshot.Mountable, error) {
	return s.using(s.Snapshotter.View(ctx, key, parent, opts...))
}

func (s *usingSnapshotter) using(m bksnapshot.Mountable, err error) (bksnapshot.Mountable, error) {
	if err != nil {
		return nil, err
	}
	return usedMountable{m, s}, nil
}

type usedMountable struct {
	bksnapshot.Mountable
	by *usingSnapshotter
}

// Mount implements snapshot.Mountable. BuildKit has it without a context; how long a layer may take is bounded by mount-timeout.
func (m usedMountable) Mount() ([]mount.Mount, func() error, error) {
	mounts, release, err := m.Mountable.Mount()
	if err != nil {
		return nil, nil, err
	}
	done, err := m.by.use(context.Background(), mounts)
	if err != nil {
		if release != nil {
			err = errors.Join(err, release())
		}
		return nil, nil, err
	}
	return mounts, releasing(release, done), nil
}
