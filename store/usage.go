package store

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"
)

// Usage is what a layer takes.
type Usage struct {
	Key Key
	// Bytes are the allocated blocks of its files, as du counts them.
	Bytes int64
	// Used is when the layer was last acquired, borrowed, released or returned.
	Used time.Time
	// Refs is how many hold it.
	Refs int
}

// Usage lists all layers, least recently used first.
func (s *Store) Usage() []Usage {
	s.mu.Lock()
	layers := make([]*Layer, 0, len(s.layers))
	list := make([]Usage, 0, len(s.layers))
	for _, l := range s.layers {
		layers = append(layers, l)
		list = append(list, Usage{Key: l.key, Used: l.used, Refs: l.refs})
	}
	s.mu.Unlock()
	for i, l := range layers {
		list[i].Bytes = l.Usage()
	}
	slices.SortFunc(list, func(a, b Usage) int { return cmp.Or(a.Used.Compare(b.Used), cmp.Compare(a.Key.Blob, b.Key.Blob)) })
	return list
}

// Remove frees what a layer takes, with all that has arrived of it. The error is ErrInUse if somebody holds it, and
// an fs.ErrNotExist if there is no such layer.
func (s *Store) Remove(key Key) error {
	s.mu.Lock()
	l, ok := s.layers[key]
	var err error
	switch {
	case s.closed:
		err = ErrClosed
	case !ok:
		err = fs.ErrNotExist
	case l.refs > 0:
		err = ErrInUse
	default:
		delete(s.layers, key) // nobody can acquire it; whoever creates it makes another directory
	}
	s.mu.Unlock()
	if err == nil {
		l.binding.Lock()
		l.removed = true
		if c := l.content.Swap(nil); c != nil {
			err = c.close()
		}
		l.binding.Unlock()
		err = errors.Join(err, s.discard(l.dir))
	}
	if err != nil {
		return fmt.Errorf("remove layer %s from %s: %w", key, s.root, err)
	}
	return nil
}

// Prune removes layers that nobody holds, least recently used first, until no more than keep bytes are
// taken, and returns how many bytes that has freed.
func (s *Store) Prune(keep int64) (freed int64, err error) {
	list := s.Usage()
	var total int64
	for _, u := range list {
		total += u.Bytes
	}
	var errs []error
	for _, u := range list {
		if total-freed <= keep {
			break
		}
		if u.Refs > 0 {
			continue
		}
		switch err := s.Remove(u.Key); {
		case err == nil:
			freed += u.Bytes
		case !errors.Is(err, ErrInUse) && !errors.Is(err, fs.ErrNotExist): // else it was taken or removed meanwhile
			errs = append(errs, err)
		}
	}
	s.slack.Store(max(keep-(total-freed), minSlack))
	return freed, errors.Join(errs...)
}

// grow counts what arrives, and has the keeper look when it may be too much.
func (s *Store) grow(n int64) {
	if s.opt.MaxSize > 0 && s.slack.Add(-n) < 0 {
		s.lookNow()
	}
}

func (s *Store) lookNow() {
	select {
	case s.look <- struct{}{}:
	default:
	}
}

// keep looks after the layers until the store is closed.
func (s *Store) keep() {
	t := time.NewTicker(s.opt.Quiet)
	defer t.Stop()
	for {
		tick := false
		select {
		case <-s.stop:
			return
		case <-s.look:
		case <-t.C:
			tick = true
		}
		for _, l := range s.list() {
			s.lookAfter(l, tick)
		}
		if s.opt.MaxSize > 0 {
			if _, err := s.Prune(s.opt.MaxSize); err != nil && s.opt.Notice != nil {
				s.opt.Notice(Key{}, err)
			}
		}
	}
}

// lookAfter settles a layer if it has been quiet since the last tick or nobody holds or borrows it, and lets go of its data and
// model in that case.
func (s *Store) lookAfter(l *Layer, tick bool) {
	c := l.content.Load()
	idle := s.idle(l)
	if tick || idle {
		if err := l.settleFiles(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			l.tell(fmt.Errorf("sync: %w", err))
		}
	}
	if c == nil {
		return
	}
	now := c.changes.Load()
	quiet := tick && now == c.seen
	if tick {
		c.seen = now
	}
	if quiet || idle {
		err := c.settle()
		if err != nil && !c.told {
			l.tell(fmt.Errorf("map not written, chunks will be verified again after a restart: %w", err))
		}
		c.told = err != nil
	}
	if !idle {
		return
	}
	// Meanwhile somebody may have acquired the layer, and even released it.
	l.binding.Lock()
	defer l.binding.Unlock()
	s.mu.Lock()
	idle = l.refs == 0 && l.lent == 0 && l.content.Load() == c && (c.told || !c.unsettled())
	if idle {
		l.content.Store(nil)
	}
	s.mu.Unlock()
	if idle {
		c.close() //nolint:errcheck // synced, or told
	}
}

func (s *Store) idle(l *Layer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return l.refs == 0 && l.lent == 0
}
