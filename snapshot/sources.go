package snapshot

import (
	"context"
	"encoding/binary"
	"io/fs"
	"slices"
	"sync"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// What a layer is missing may be in layers of the store that nobody uses, such as those of the version before of its image. These are opened
// to be copied from, beside the mount, and borrowed from the store only: what is to be removed is.

const (
	// minGain is how many bytes a layer must have in common with another one, and that no better one has, to be opened for that: its table of
	// contents is parsed, which may take longer than fetching less.
	minGain = 1 << 20
	// maxLenders is how many layers one is copied from, at most.
	maxLenders = 4
	// maxSources and maxSourceChunks bound what is open at a time to be copied from: descriptors, and 48 bytes of memory for a chunk. Above it, what was
	// opened first is closed.
	maxSources      = 32
	maxSourceChunks = 200_000
)

// sources are the layers that are open to be copied from.
type sources struct {
	mu   sync.Mutex // held for as long as it takes to find and open some: one after the other is early enough
	open []*source  // opened last comes last
}

// source is a layer that is open to be copied from.
type source struct {
	key   store.Key
	lent  *store.Layer
	model *layer.Layer
	from  *fill.Source
	by    map[*served]bool // who copies
}

// borrow opens what a layer can be copied from, once none is being opened that a build may wait for.
func (e *engine) borrow(ctx context.Context, s *served) {
	for _, ready := range e.opening() {
		select {
		case <-ready:
		case <-ctx.Done():
			return
		}
	}
	x := &e.sources
	x.mu.Lock()
	defer x.mu.Unlock()
	model := s.held.Model()
	if model == nil || ctx.Err() != nil {
		return // closed meanwhile
	}
	had := make([]bool, len(model.Chunks))
	gain := func(a *store.Alike) (n int64) {
		for _, c := range a.Chunks {
			if !had[c] {
				n += model.Chunks[c].Size
			}
		}
		return min(n, a.Data)
	}
	alike := s.held.Alike(minGain)
	for n := 0; n < maxLenders && ctx.Err() == nil; {
		best, most := -1, int64(minGain-1)
		for i := range alike {
			if g := gain(&alike[i]); g > most {
				best, most = i, g
			}
		}
		if best < 0 {
			return
		}
		a := alike[best]
		alike = slices.Delete(alike, best, best+1)
		o := x.find(a.Key)
		if o == nil {
			var err error
			if o, err = e.openSource(ctx, a.Key); err != nil {
				continue // what it has is fetched
			}
			x.add(o)
		}
		o.by[s] = true
		n++
		for _, c := range a.Chunks {
			had[c] = true
		}
	}
}

// opening returns what is closed when the layers are open that are being opened now.
func (e *engine) opening() (ready []chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.layers {
		ready = append(ready, s.ready)
	}
	return ready
}

// giveBack closes what nobody but s can be copied from.
func (e *engine) giveBack(s *served) {
	x := &e.sources
	x.mu.Lock()
	defer x.mu.Unlock()
	x.open = slices.DeleteFunc(x.open, func(o *source) bool {
		delete(o.by, s)
		if len(o.by) > 0 {
			return false
		}
		o.close()
		return true
	})
}

// openSource opens a layer of the store, which may be removed at any time.
func (e *engine) openSource(ctx context.Context, key store.Key) (_ *source, err error) {
	lent, err := e.store.Borrow(key)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lent.Return()
		}
	}()
	model := lent.Model()
	if model == nil {
		if model, err = e.bind(ctx, lent); err != nil {
			return nil, err
		}
	}
	defer model.Rest()
	return &source{key, lent, model, e.sched.OpenSource(model, lent), map[*served]bool{}}, nil
}

// bind opens the data of a layer by the table of contents that the store has.
func (e *engine) bind(ctx context.Context, lent *store.Layer) (*layer.Layer, error) {
	turn := &turn{of: e.turns}
	turn.take(ctx)
	defer turn.pass()
	kept, err := lent.TOC()
	if err != nil {
		return nil, err
	}
	if len(kept) <= 8 {
		return nil, fs.ErrInvalid
	}
	t, err := formatOf(kept[8:]).parse(kept[8:], int64(binary.BigEndian.Uint64(kept)), lent.Key().TOC)
	if err != nil {
		return nil, err
	}
	e.tidy.parsed(t.layer.NumInodes())
	return lent.Bind(t.layer)
}

func (x *sources) find(key store.Key) *source {
	if i := slices.IndexFunc(x.open, func(o *source) bool { return o.key == key }); i >= 0 {
		return x.open[i]
	}
	return nil
}

// add keeps to the bounds.
func (x *sources) add(o *source) {
	x.open = append(x.open, o)
	chunks := 0
	for i, o := range slices.Backward(x.open) {
		if chunks += len(o.model.Chunks); i == len(x.open)-1 || chunks <= maxSourceChunks && len(x.open)-i <= maxSources {
			continue
		}
		for _, o := range x.open[:i+1] {
			o.close()
		}
		x.open = slices.Delete(x.open, 0, i+1)
		return
	}
}

// rest lets the kernel have what copying has brought into memory of the layers' digests.
func (x *sources) rest() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, o := range x.open {
		o.model.Rest()
	}
}

func (o *source) close() {
	o.from.Close()
	o.lent.Return()
}
