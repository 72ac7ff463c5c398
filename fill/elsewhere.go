package fill

import (
	"errors"
	"io"
	"slices"
)

// Files of an image, and more so of two versions of one, have chunks in common. What is missing here and is there under the same digest,
// in this layer, in another one that is open, or in a Source, is copied and not fetched: a flight whose frame has nothing else lands without a request. It's
// verified on the way as what is fetched is, so nothing is taken on trust. What is on its way there is waited for, as asking for it twice wouldn't
// have it sooner, unless it doesn't come (silence.go); where a copy fails, the frame is fetched. Who holds a layer open is in the way of nobody: a copy
// takes as long as a read.

const (
	// maxAlike is how many chunks of a layer with one digest are looked at.
	maxAlike = 64
	// maxCopies is how many frames that nobody has asked for are copied at a time.
	maxCopies = 64
)

// errNotElsewhere says that a chunk has to be fetched after all.
var errNotElsewhere = errors.New("not there")

// compare finds out which chunks the layer has in common with the others that are open, and with itself. What it doesn't know of yet is fetched.
func (f *Filler) compare() {
	f.s.mu.Lock()
	others := slices.Clone(f.s.lenders)
	f.s.mu.Unlock()
	for _, o := range others {
		if f.ctx.Err() != nil {
			return
		}
		f.layer.Shared(o.layer, f.shared.set, o.shared.set)
	}
}

// local reports whether a flight needs no request.
func (fl *flight) local() bool { return fl.state == awaiting || fl.state == copying }

// twin returns where the bytes of a chunk are, or else a flight that brings them.
func (f *Filler) twin(chunk int) (from *lender, at int, coming *flight) {
	sum := f.layer.Digest(chunk)
	for _, o := range f.s.lenders {
		if _, ok := o.sink.(io.ReaderAt); !ok {
			continue
		}
		n := 0
		for c := range o.layer.WithDigest(sum) {
			frame := int(o.layer.Chunks[c].Frame)
			switch {
			case o == &f.lender && c == chunk || o.layer.Chunks[c].Size != f.layer.Chunks[chunk].Size:
			case o.sink.Have(c) || o.doubts != nil && o.doubt.has(frame):
				return o, c, nil
			case coming == nil && (o != &f.lender || frame != int(f.layer.Chunks[chunk].Frame)):
				coming = o.flights[frame]
			}
			if n++; n == maxAlike {
				break
			}
		}
	}
	return nil, 0, coming
}

// takeLocal lets a new flight land without a request, if all that is missing of its frame is elsewhere or on its way there.
func (f *Filler) takeLocal(fl *flight) bool {
	fr := &f.layer.Frames[fl.frame]
	first, end := int(fr.FirstChunk), int(fr.FirstChunk+fr.NumChunks)
	for c := first; c < end; c++ {
		if !f.shared.has(c) && !f.sink.Have(c) {
			return false
		}
	}
	var coming []*flight
	for c := first; c < end; c++ {
		if f.sink.Have(c) {
			continue
		}
		from, _, other := f.twin(c)
		switch {
		case from != nil:
		case other != nil && other.size() <= fl.size()+f.s.est.bdp():
			if !slices.Contains(coming, other) {
				coming = append(coming, other)
			}
		default:
			return false
		}
	}
	f.s.copies++
	if len(coming) == 0 {
		f.s.copy(fl)
		return true
	}
	fl.state, fl.awaits = awaiting, coming
	for _, other := range coming {
		other.then = append(other.then, fl)
		f.s.raise(other, fl.level)
	}
	if fl.level == demand {
		f.s.hurry(fl)
	}
	return true
}

// arrivedElsewhere is called when a flight has landed that this one was waiting for.
func (fl *flight) arrivedElsewhere(other *flight, err error) {
	fl.awaits = slices.DeleteFunc(fl.awaits, func(o *flight) bool { return o == other })
	switch {
	case fl.state != awaiting:
	case err != nil:
		fl.f.s.fetchAfterAll(fl)
	case len(fl.awaits) == 0:
		fl.f.s.copy(fl)
	}
}

// fetchAfterAll queues a flight that was to be copied.
func (s *Scheduler) fetchAfterAll(fl *flight) {
	s.copies--
	if fl.f.closed {
		fl.f.land(fl, errClosedFiller)
		return
	}
	s.enqueue(fl)
}

// copy has a frame copied as soon as its level gets a place among the decoders. Called again, it's by the level that the flight has then.
func (s *Scheduler) copy(fl *flight) {
	f := fl.f
	fl.state = copying
	f.wg.Add(1)
	s.slots.do(fl.level, func() {
		defer f.wg.Done()
		s.mu.Lock()
		defer s.mu.Unlock()
		if fl.state != copying || fl.started {
			return
		}
		fl.started = true
		s.mu.Unlock()
		err := f.copyFrame(fl.frame)
		s.mu.Lock()
		if errors.Is(err, errNotElsewhere) {
			s.fetchAfterAll(fl)
		} else {
			s.copies--
			s.decoded(fl, err, nil)
		}
		s.dispatch()
	})
}

// copyFrame copies what is missing of a frame.
func (f *Filler) copyFrame(frame int) error {
	fr := &f.layer.Frames[frame]
	for c := int(fr.FirstChunk); c < int(fr.FirstChunk+fr.NumChunks); c++ {
		if f.sink.Have(c) {
			continue
		}
		if err := f.copyChunk(c); err != nil {
			return err
		}
	}
	f.count.copied.Add(fr.Size)
	if f.opt.Copied != nil {
		f.opt.Copied(fr.Size)
	}
	return nil
}

func (f *Filler) copyChunk(c int) error {
	f.s.mu.Lock()
	from, at, _ := f.twin(c)
	if from != nil && from != &f.lender {
		from.wg.Add(1) // it stays open
		defer from.wg.Done()
	}
	f.s.mu.Unlock()
	if from == nil {
		return errNotElsewhere
	}
	src, _ := from.sink.(io.ReaderAt)
	chunk := &from.layer.Chunks[at]
	err := f.write(c, io.NewSectionReader(src, chunk.Data, chunk.Size))
	if _, ok := errors.AsType[*corrupt](err); ok {
		return errNotElsewhere // the copy that is there can't be read, or isn't what it was
	}
	return err
}
