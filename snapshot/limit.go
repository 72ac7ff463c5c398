package snapshot

import (
	"context"
	"slices"
	"time"
)

// limitEvery is how often the size of the store is looked at, and how long nobody must have used a layer to be one that nobody uses: a build's
// steps follow each other.
const limitEvery = 10 * time.Second

// keepLimit parks layers that nobody uses whenever the store has more than it may, until the returned function is
// called. The store drops by itself what nobody has mounted.
func (s *Snapshotter) keepLimit(limit int64, every time.Duration) (stop func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				s.parkAbove(ctx, limit, every)
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		cancel(errEngineClosed)
		<-done
	}
}

// parkAbove parks layers that nobody uses, nor has for some time, least recently used first, until the others take no more than limit bytes.
func (s *Snapshotter) parkAbove(ctx context.Context, limit int64, idle time.Duration) {
	var held int64 // of layers that the store can't drop
	sizes := map[string]int64{}
	for _, u := range s.door.store.Usage() {
		if u.Refs > 0 {
			held += u.Bytes
			sizes[u.Key.Blob.String()] += u.Bytes
		}
	}
	for _, m := range s.parking.leastUsed() {
		if held <= limit || ctx.Err() != nil || time.Since(m.used) < idle {
			return
		}
		info, err := s.Stat(ctx, m.name)
		if err != nil {
			continue // removed
		}
		if s.parking.parkIdle(ctx, m) {
			// Another snapshot may still have it: then the next look finds that it's still too much.
			held -= sizes[info.Labels[LabelDigest]]
		}
	}
}

// mounted is a layer that is mounted for a snapshot.
type mounted struct {
	place
	used time.Time
}

// leastUsed lists the mounted layers, least recently used first.
func (p *parking) leastUsed() []mounted {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []mounted
	for _, m := range p.mounted {
		list = append(list, *m)
	}
	slices.SortFunc(list, func(a, b mounted) int { return a.used.Compare(b.used) })
	return list
}

// parkIdle parks a mounted layer, unless somebody uses it, and reports whether it did. Whoever comes meanwhile waits.
func (p *parking) parkIdle(ctx context.Context, m mounted) bool {
	if !p.making.TryLock() {
		return false // the next time
	}
	defer p.making.Unlock()
	p.mu.Lock()
	if p.parked[m.mountpoint] != nil || p.mounted[m.mountpoint] == nil || p.uses[m.mountpoint] > 0 {
		p.mu.Unlock()
		return false
	}
	l := p.park(m.place)
	<-l.turn
	p.mu.Unlock()
	defer func() { l.turn <- struct{}{} }()
	// What of it fails is seen when the directory is mounted on again, or removed.
	_ = p.FileSystem.Unmount(ctx, m.mountpoint)
	p.mu.Lock()
	delete(p.mounted, m.mountpoint)
	p.mu.Unlock()
	return true
}
