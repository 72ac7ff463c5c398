package snapshot

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	stargz "github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// labelRemote is how stargz-snapshotter marks the snapshots that its file system mounts.
const labelRemote = "containerd.io/snapshot/remote"

// parking is a file system that puts layers off: those that an earlier process had mounted, or that were unmounted to
// make room, are mounted again when somebody uses them, from what the store has. So a start takes no longer for many
// layers than for few.
//
// Nobody comes to an empty directory: the snapshotter hands out no mounts before Check has said yes to each layer
// below them.
type parking struct {
	stargz.FileSystem
	removed func(digest.Digest) // see Options.Removed; nil if nobody is told

	// making is held for reading while a snapshot is made, from when the layers below it are mounted until they are in
	// use, and for writing to park one.
	making sync.RWMutex

	mu       sync.Mutex
	starting bool                // Mount parks
	parked   map[string]*parked  // by mount point
	names    map[string]*parked  // the same, by snapshot
	mounted  map[string]*mounted // by mount point
	uses     map[string]int      // the same: how many have mounted it by [Snapshotter.Use]
}

// place is where a snapshot has a layer.
type place struct {
	name, mountpoint string
	layer            digest.Digest
}

// parked is a layer that isn't mounted, or is being mounted.
type parked struct {
	place

	turn chan struct{} // has one element while nobody mounts
	gone bool          // it's mounted now, or removed; guarded by turn
}

func newParking(fs stargz.FileSystem, removed func(digest.Digest)) *parking {
	return &parking{
		FileSystem: fs, removed: removed, starting: true,
		parked: map[string]*parked{}, names: map[string]*parked{}, mounted: map[string]*mounted{}, uses: map[string]int{},
	}
}

// started ends the time in which Mount parks.
func (p *parking) started() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starting = false
}

// Mount implements stargz.FileSystem.
func (p *parking) Mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	at := place{labels[LabelTarget], mountpoint, digest.Digest(labels[LabelDigest])}
	p.mu.Lock()
	starting := p.starting
	if starting {
		p.park(at)
	}
	p.mu.Unlock()
	if starting {
		return nil
	}
	return p.mount(ctx, at, labels)
}

func (p *parking) mount(ctx context.Context, at place, labels map[string]string) error {
	if err := p.FileSystem.Mount(ctx, at.mountpoint, labels); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mounted[at.mountpoint] = &mounted{at, time.Now()}
	return nil
}

// park notes a layer that isn't mounted. Under mu.
func (p *parking) park(at place) *parked {
	l := &parked{place: at, turn: make(chan struct{}, 1)}
	l.turn <- struct{}{}
	p.parked[at.mountpoint], p.names[at.name] = l, l
	return l
}

// Check implements stargz.FileSystem.
func (p *parking) Check(ctx context.Context, mountpoint string, labels map[string]string) error {
	p.mu.Lock()
	l := p.parked[mountpoint]
	if m := p.mounted[mountpoint]; m != nil {
		m.used = time.Now()
	}
	p.mu.Unlock()
	if err := p.unpark(ctx, l, labels); err != nil {
		return err
	}
	return p.FileSystem.Check(ctx, mountpoint, labels)
}

// Unmount implements stargz.FileSystem. It's called when a snapshot has been removed, or all are closed.
func (p *parking) Unmount(ctx context.Context, mountpoint string) error {
	p.mu.Lock()
	l := p.parked[mountpoint]
	p.mu.Unlock()
	var layer digest.Digest // "" if there was none
	if l != nil {
		<-l.turn
		if !l.gone {
			p.leave(l)
		}
		l.turn <- struct{}{}
		layer = l.layer
	}
	p.mu.Lock()
	if m := p.mounted[mountpoint]; m != nil {
		layer = m.layer
	}
	delete(p.mounted, mountpoint)
	if layer != "" && !p.has(layer) && p.removed != nil {
		p.removed(layer) // before somebody mounts it, and tells of that
	}
	p.mu.Unlock()
	return p.FileSystem.Unmount(ctx, mountpoint)
}

// has reports whether a snapshot has the layer, mounted or parked. Under mu.
func (p *parking) has(layer digest.Digest) bool {
	for _, l := range p.parked {
		if l.layer == layer {
			return true
		}
	}
	for _, m := range p.mounted {
		if m.layer == layer {
			return true
		}
	}
	return false
}

// unpark mounts a layer, nil for one that is mounted.
func (p *parking) unpark(ctx context.Context, l *parked, labels map[string]string) error {
	if l == nil {
		return nil
	}
	select {
	case <-l.turn:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { l.turn <- struct{}{} }()
	if l.gone {
		return nil
	}
	if err := p.mount(ctx, l.place, labels); err != nil {
		return err
	}
	p.leave(l)
	return nil
}

// leave forgets a layer. By who has its turn.
func (p *parking) leave(l *parked) {
	l.gone = true
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.parked, l.mountpoint)
	delete(p.names, l.name)
}

// begin is called before a snapshot is made on top of parent, and what it returns afterwards.
func (s *Snapshotter) begin(ctx context.Context, parent string) (end func(), err error) {
	s.parking.making.RLock()
	if err := s.restore(ctx, parent); err != nil {
		s.parking.making.RUnlock()
		return nil, err
	}
	return s.parking.making.RUnlock, nil
}

// restore mounts the layers of a snapshot that are parked, and those below, all at the same time. The snapshotter would
// mount them too, but take owner and group of the uppermost one's root before, and keep to itself why it couldn't.
func (s *Snapshotter) restore(ctx context.Context, key string) error {
	s.parking.mu.Lock()
	none := len(s.parking.parked) == 0
	s.parking.mu.Unlock()
	if none {
		return nil
	}
	eg, ctx := errgroup.WithContext(ctx)
	for key != "" {
		info, err := s.Stat(ctx, key)
		if cerrdefs.IsNotFound(err) {
			break // which the caller will hear of
		}
		if err != nil {
			return err
		}
		s.parking.mu.Lock()
		l := s.parking.names[key]
		s.parking.mu.Unlock()
		if l != nil {
			eg.Go(func() error { return s.parking.mountAgain(ctx, l, info.Labels) })
		}
		key = info.Parent
	}
	return eg.Wait()
}

// dropStale removes what a killed daemon left of its hints to lazy layers: they are for the time of one call, and the
// sessions that they name are gone, which would cost each of the first reads seconds to find out.
func dropStale(ctx context.Context, s snapshots.Snapshotter) error {
	var stale []snapshots.Info
	var fields [][]string
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if _, remote := info.Labels[labelRemote]; !remote {
			return nil
		}
		var drop []string
		for k := range info.Labels {
			if temporary(k) {
				drop = append(drop, "labels."+k)
				info.Labels[k] = ""
			}
		}
		if len(drop) > 0 {
			stale, fields = append(stale, info), append(fields, drop)
		}
		return nil
	})
	if err != nil && !cerrdefs.IsNotFound(err) {
		return err
	}
	for i, info := range stale {
		if _, err := s.Update(ctx, info, fields[i]...); err != nil {
			return fmt.Errorf("drop labels of an earlier daemon's sessions from %s: %w", info.Name, err)
		}
	}
	return nil
}

// temporary reports whether BuildKit adds the label for the time of one call.
func temporary(label string) bool {
	return strings.HasPrefix(label, labelSession) ||
		slices.ContainsFunc([]string{LabelRef, LabelDigest, LabelLayers, LabelSizes, LabelTOCs, LabelFormats, estargz.TOCJSONDigestAnnotation},
			func(l string) bool { return strings.HasPrefix(label, l+".") })
}
