package fill

import (
	"slices"
	"sync"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// lender is a layer that others copy chunks from.
type lender struct {
	layer   *layer.Layer
	sink    Sink
	wg      sync.WaitGroup  // of the copies
	doubts  Doubter         // the sink, if it is one
	doubt   bitmap          // frames with chunks that were in doubt when the layer was opened
	shared  bitmap          // chunks that another one has the bytes of
	flights map[int]*flight // by frame; guarded by Scheduler.mu
}

func (o *lender) lend(l *layer.Layer, sink Sink) {
	o.layer, o.sink, o.shared, o.flights = l, sink, newBitmap(len(l.Chunks)), map[int]*flight{}
	if d, ok := sink.(Doubter); ok {
		o.doubts, o.doubt = d, newBitmap(len(l.Frames))
		for c := range d.Doubtful() {
			o.doubt.set(int(l.Chunks[c].Frame))
		}
	}
}

// A Source is a layer that nobody reads. What others are missing and it has is copied from it; it's never filled. Make it with [Scheduler.OpenSource].
type Source struct {
	lender
	s *Scheduler
}

// OpenSource returns a Source of a packed layer and compares it with all that are open. Of from, which is an io.ReaderAt, nothing is asked but what is there,
// and that may become less. The caller closes it.
func (s *Scheduler) OpenSource(l *layer.Layer, from Sink) *Source {
	o := &Source{s: s}
	o.lend(l, from)
	s.mu.Lock()
	s.lenders = append(s.lenders, &o.lender)
	fillers := slices.Clone(s.fillers)
	s.mu.Unlock()
	for _, f := range fillers {
		f.layer.Shared(l, f.shared.set, o.shared.set)
	}
	return o
}

// Close waits for the copies that are being made.
func (o *Source) Close() {
	o.s.mu.Lock()
	o.s.lenders = slices.DeleteFunc(o.s.lenders, func(l *lender) bool { return l == &o.lender })
	o.s.mu.Unlock()
	o.wg.Wait()
}
