package snapshot

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	stargz "github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Name is what the snapshotter is called towards BuildKit, whose cache manager
// keys its lazy paths, and the binding of chain IDs to TOC digests, on it.
const Name = "stargz"

// Snapshotter is a containerd snapshotter with lazy layers. Make it with [New].
type Snapshotter struct {
	snapshots.Snapshotter
	door    *engine
	parking *parking
	close   func() error
}

var _ snapshots.Snapshotter = (*Snapshotter)(nil)

// New opens the snapshotter in the directory root, which it makes if needed.
// Mounts which an earlier process left below root are unmounted first: their
// server is gone, so reads in them fail.
func New(root string, opt Options) (*Snapshotter, error) {
	if err := unmountBelow(root); err != nil {
		return nil, err
	}
	// As containerd's overlayfs snapshotter has it: where it can't be found out, it isn't needed.
	userXattr, err := overlayutils.NeedsUserXAttr(root)
	userXattr = userXattr && err == nil
	d, err := newEngine(root, userXattr, opt)
	if err != nil {
		return nil, fmt.Errorf("open file system for lazy layers in %s: %w", root, err)
	}
	parking := newParking(d, opt.Removed)
	dir := filepath.Join(root, "snapshotter")
	if err := SetAside(context.Background(), dir); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	s, err := stargz.NewSnapshotter(context.Background(), dir, parking, stargz.AsynchronousRemove)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open snapshotter in %s: %w", root, err), d.Close())
	}
	parking.started()
	made := &Snapshotter{Snapshotter: s, door: d, parking: parking}
	unlimited := func() {}
	made.close = sync.OnceValue(func() error {
		unlimited()
		// The snapshotter's own Close leaves out what was removed and not cleaned up.
		err := errors.Join(s.Close(), d.Close())
		return errors.Join(err, unmountBelow(root))
	})
	if err := dropStale(context.Background(), s); err != nil {
		return nil, errors.Join(err, made.close())
	}
	if err := made.sweep(context.Background()); err != nil && opt.Store.Notice != nil {
		opt.Store.Notice(store.Key{}, err) // it's tried again
	}
	if opt.Store.MaxSize > 0 {
		unlimited = made.keepLimit(opt.Store.MaxSize, limitEvery)
	}
	return made, nil
}

// Prepare implements snapshots.Snapshotter. With the label LabelTarget it either
// commits the layer's snapshot and returns ErrAlreadyExists, or makes nothing and
// returns a *MountError or *MismatchError.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	end, err := s.begin(ctx, parent)
	if err != nil {
		return nil, err
	}
	defer end()
	target, ok := info.Labels[LabelTarget]
	if !ok {
		mounts, err := s.Snapshotter.Prepare(ctx, key, parent, opts...)
		return s.door.once(mounts), err
	}
	if _, err := s.Stat(ctx, target); err == nil {
		// Mounted once more it would stay below key, which nobody would remove.
		return nil, fmt.Errorf("target snapshot %q: %w", target, cerrdefs.ErrAlreadyExists)
	}
	var failure error
	_, err = s.Snapshotter.Prepare(context.WithValue(ctx, failureKey{}, &failure), key, parent, opts...)
	if cerrdefs.IsAlreadyExists(err) {
		if cerr := s.checkImplied(ctx, key, parent, info.Labels); cerr != nil {
			if rerr := s.Remove(context.WithoutCancel(ctx), target); rerr != nil {
				return nil, fmt.Errorf("remove snapshot of layer that can't be lazy: %w", rerr)
			}
			// Removal leaves the mount to the next cleanup.
			if rerr := s.Cleanup(context.WithoutCancel(ctx)); rerr != nil {
				return nil, fmt.Errorf("unmount layer that can't be lazy: %w", rerr)
			}
			return nil, &MountError{Layer: digest.Digest(info.Labels[LabelDigest]), Err: cerr}
		}
	}
	if err != nil {
		return nil, err
	}
	// An active snapshot, for a caller who unpacks layers into it.
	if err := s.Remove(context.WithoutCancel(ctx), key); err != nil {
		return nil, fmt.Errorf("remove snapshot of layer that can't be lazy: %w", err)
	}
	if mismatch, ok := errors.AsType[*MismatchError](failure); ok {
		return nil, mismatch
	}
	return nil, &MountError{Layer: digest.Digest(info.Labels[LabelDigest]), Err: failure}
}

// checkImplied returns an error if the layer just mounted would change directories
// of the layers below that it has no entry for.
func (s *Snapshotter) checkImplied(ctx context.Context, key, parent string, labels map[string]string) error {
	implied := s.door.impliedBy(digest.Digest(labels[estargz.TOCJSONDigestAnnotation]))
	if len(implied) == 0 {
		return nil
	}
	lower, err := lowerDirs(ctx, s.Snapshotter, key, parent)
	if err != nil {
		return err
	}
	return checkImplied(implied, lower)
}

// View implements snapshots.Snapshotter.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	end, err := s.begin(ctx, parent)
	if err != nil {
		return nil, err
	}
	defer end()
	mounts, err := s.Snapshotter.View(ctx, key, parent, opts...)
	return s.door.once(mounts), err
}

// Mounts implements snapshots.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	if err := s.restore(ctx, key); err != nil {
		return nil, err
	}
	mounts, err := s.Snapshotter.Mounts(ctx, key)
	return s.door.once(mounts), err
}

// Cleanup removes what removed snapshots left behind, as containerd's garbage
// collector asks for.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	if c, ok := s.Snapshotter.(snapshots.Cleaner); ok {
		if err := c.Cleanup(ctx); err != nil {
			return err
		}
	}
	return s.sweep(ctx)
}

// Close unmounts all layers.
func (s *Snapshotter) Close() error { return s.close() }

// unmountBelow unmounts, innermost first, every mount below root.
func unmountBelow(root string) error {
	abs, err := filepath.Abs(root)
	if err != nil {
		return err
	}
	// Mounts are listed by their real paths.
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(abs))
	if err != nil {
		return fmt.Errorf("list mounts below %s: %w", root, err)
	}
	for _, m := range slices.Backward(mounts) {
		if m.Mountpoint == abs {
			continue // the state directory's own file system
		}
		// EINVAL: it went with the mount that it was in.
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s, left by an earlier process: %w", m.Mountpoint, err)
		}
	}
	return nil
}
