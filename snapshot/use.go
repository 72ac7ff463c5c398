package snapshot

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sync/errgroup"
)

// Use is called before what the Snapshotter has handed out is mounted, and release when it no longer is, a second time without effect. In between the lazy layers
// in it aren't unmounted to make room for others, as a snapshot that is there doesn't keep them from being; those that are unmounted already are mounted.
func (s *Snapshotter) Use(ctx context.Context, mounts []mount.Mount) (release func(), err error) {
	dirs := dirsOf(mounts)
	s.parking.making.RLock()
	defer s.parking.making.RUnlock()
	eg, egctx := errgroup.WithContext(ctx)
	for _, dir := range dirs {
		if l := s.parking.parkedAt(dir); l != nil {
			eg.Go(func() error {
				info, err := s.Stat(egctx, l.name)
				if err != nil {
					return fmt.Errorf("mount layer %s once more: %w", l.layer, err)
				}
				return s.parking.mountAgain(egctx, l, info.Labels)
			})
		}
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	s.parking.use(dirs, 1)
	return sync.OnceFunc(func() { s.parking.use(dirs, -1) }), nil
}

// mountAgain mounts a layer that is parked.
func (p *parking) mountAgain(ctx context.Context, l *parked, labels map[string]string) error {
	if err := p.unpark(ctx, l, labels); err != nil {
		return fmt.Errorf("mount layer %s once more, which was mounted before: %w", l.layer, err)
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
