package snapshot

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sync/errgroup"
)

// Use keeps the lazy layers in mounts that the Snapshotter has handed out from being unmounted to make room, until release is called, a second time
// without effect. Those that are unmounted already are mounted. See [Options.Uses].
func (s *Snapshotter) Use(ctx context.Context, mounts []mount.Mount) (release func(), err error) {
	dirs := dirsOf(mounts)
	s.parking.making.RLock()
	defer s.parking.making.RUnlock()
	eg, egctx := errgroup.WithContext(ctx)
	for _, dir := range dirs {
		if l := s.parking.parkedAt(dir); l != nil {
			eg.Go(func() error { return s.mountAgain(egctx, l) })
		}
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	s.parking.use(dirs, 1)
	return sync.OnceFunc(func() { s.parking.use(dirs, -1) }), nil
}

// mountAgain mounts a layer that is parked.
func (s *Snapshotter) mountAgain(ctx context.Context, l *parked) error {
	info, err := s.Stat(ctx, l.name)
	if err != nil {
		return fmt.Errorf("mount layer %s once more: %w", l.layer, err)
	}
	if err := s.parking.unpark(ctx, l, info.Labels); err != nil {
		return fmt.Errorf("mount layer %s once more, which was mounted before: %w", info.Labels[LabelDigest], err)
	}
	return nil
}

// parkedAt returns the layer whose mount point dir is, if it is parked, or nil.
func (p *parking) parkedAt(dir string) *parked {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.parked[dir]
}

// use counts who has mounted the directories.
func (p *parking) use(dirs []string, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, dir := range dirs {
		if m := p.mounted[dir]; m != nil {
			m.used = time.Now()
		}
		if p.uses[dir] += n; p.uses[dir] == 0 {
			delete(p.uses, dir)
		}
	}
}

// isUsed reports whether somebody has mounted the directory.
func (p *parking) isUsed(dir string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.uses[dir] > 0
}
