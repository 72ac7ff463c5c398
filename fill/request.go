package fill

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Refetcher is a Fetcher that can fetch bytes another way than before, over a new connection or from another host than from,
// when those that it had fetched turned out to be corrupt. from is what the body that they came in said by its method Source() string, "" if it has none.
type Refetcher interface {
	Refetch(ctx context.Context, off, n int64, from string) (io.ReadCloser, error)
}

// errYield is why a request ends that background work has made: its frames are asked for again later.
var errYield = errors.New("background work yields")

// request is one range of the blob on its way. Its fields are guarded by Scheduler.mu, but for what doesn't change.
type request struct {
	f        *Filler
	flights  []*flight // by frame
	off, end int64
	again    bool   // what arrived first was corrupt,
	from     string // and who had sent that, "" if it isn't known

	level  level
	left   int64     // bytes that haven't arrived
	heard  time.Time // when the last byte has arrived, or it was sent
	cancel context.CancelCauseFunc
}

// send starts a request.
func (s *Scheduler) send(r *request) {
	f := r.f
	ctx, cancel := context.WithCancelCause(f.ctx)
	r.cancel, r.left, r.heard = cancel, r.end-r.off, time.Now()
	r.again, r.from = r.flights[0].again, r.flights[0].source
	s.outstanding += r.left
	s.requests[r] = struct{}{}
	for _, fl := range r.flights {
		fl.state, fl.req = fetching, r
		r.level = min(r.level, fl.level)
		s.held += fl.size()
		if fl.in == nil {
			fl.in = newArrival(fl.size())
		}
	}
	f.count.requests.Add(1)
	f.wg.Add(1)
	s.wg.Go(func() {
		defer f.wg.Done()
		err := r.receive(ctx)
		if cause := context.Cause(ctx); err != nil && cause != nil {
			err = cause
		}
		cancel(err)
		s.mu.Lock()
		defer s.mu.Unlock()
		r.finish(err)
		s.dispatch()
	})
}

// receive fetches the range and hands its frames on one by one.
func (r *request) receive(ctx context.Context) error {
	start := time.Now()
	body, err := r.fetch(ctx)
	if err != nil {
		return err
	}
	defer body.Close()
	if name := SourceOf(body); name != "" {
		r.f.count.source.Store(&name)
	}
	local, whole := isLocal(body), IsWhole(body)
	if !local {
		r.f.answered(whole)
	}
	in := bufio.NewReaderSize(&counted{body, r, start, local || whole}, 32<<10)
	pos := r.off
	for _, fl := range r.flights {
		fr := &r.f.layer.Frames[fl.frame]
		a := fl.in // nobody else changes it before land
		if skip := fr.Offset + int64(a.got()) - pos; skip > 0 {
			if _, err := io.CopyN(io.Discard, in, skip); err != nil {
				return err
			}
		}
		r.f.s.arriving(fl, a, SourceOf(body))
		if err := a.fill(in); err != nil {
			return err
		}
		pos = fr.End()
		r.f.s.arrived(fl, a, SourceOf(body)) // which may have changed
	}
	return nil
}

func (r *request) fetch(ctx context.Context) (io.ReadCloser, error) {
	if re, ok := r.f.from.(Refetcher); ok && r.again {
		return re.Refetch(ctx, r.off, r.end-r.off, r.from)
	}
	return r.f.from.Fetch(ctx, r.off, r.end-r.off)
}

// counted takes note of bytes when they arrive.
type counted struct {
	io.Reader
	r     *request
	start time.Time // zero when the first byte has arrived
	local bool      // they say nothing of the link
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if n == 0 {
		return n, err
	}
	s, now := c.r.f.s, time.Now()
	c.r.f.count.fetched.Add(int64(n))
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.start.IsZero() && !c.local {
		s.est.answered(now.Sub(c.start))
		c.start = time.Time{}
	}
	got := min(int64(n), c.r.left)
	c.r.left, c.r.heard = c.r.left-got, now
	s.outstanding -= got
	if !c.local {
		s.est.arrived(now, int64(n), s.outstanding)
	}
	s.dispatch()
	return n, err
}

// arriving is called before the first byte of a frame is read. Who waits for a large one gets it decoded on the way.
func (s *Scheduler) arriving(fl *flight, a *arrival, source string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fl.source = source
	if fl.level == demand && fl.size() >= streamFrom && a.got() == 0 {
		s.decode(fl, a)
	}
}

// arrived is called when a frame has arrived.
func (s *Scheduler) arrived(fl *flight, a *arrival, source string) {
	s.mu.Lock()
	if fl.in == a {
		fl.source = source
		if fl.state == fetching {
			s.decode(fl, a)
		}
	}
	s.mu.Unlock()
	a.release()
}

// decode hands a frame to the decoders.
func (s *Scheduler) decode(fl *flight, a *arrival) {
	f := fl.f
	fl.state = decoding
	a.refs.Add(1)
	f.wg.Add(1)
	l := fl.level
	s.slots.do(l, func() {
		defer f.wg.Done()
		err := f.decode(fl.frame, &arriving{arrival: a, slots: &s.slots, level: l})
		lost := a.failed()
		a.release()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.decoded(fl, err, lost)
		s.dispatch()
	})
}

// decoded takes note of what became of a frame; lost is why not all of it has arrived.
func (s *Scheduler) decoded(fl *flight, err, lost error) {
	f := fl.f
	bad, ok := errors.AsType[*corrupt](err)
	switch {
	case err == nil:
		f.land(fl, nil)
		f.learn(fl.frame)
	case ok && lost != nil:
		f.land(fl, lost)
	case ok && f.closed:
		f.land(fl, errClosedFiller)
	case ok && !fl.again:
		f.corrupted()
		f.count.retries.Add(1)
		fl.again = true
		fl.in, fl.req = nil, nil
		s.held -= fl.size()
		s.enqueue(fl)
	case ok:
		f.corrupted()
		f.land(fl, bad)
	default:
		f.land(fl, fmt.Errorf("store: %w", err))
	}
}

// finish is called when nothing more of a request will arrive.
func (r *request) finish(err error) {
	s := r.f.s
	delete(s.requests, r)
	s.outstanding -= r.left
	r.left = 0
	for _, fl := range r.flights {
		if fl.req != r {
			continue
		}
		switch a := fl.in; {
		case fl.state == decoding && err != nil:
			a.fail(err) // unless it is complete, its decoder finds out
			if a.got() < len(a.buf) {
				a.release()
			}
		case fl.state != fetching:
		case errors.Is(err, errYield) && !r.f.closed:
			s.held -= fl.size()
			fl.req = nil
			if a.got() == 0 {
				a.release()
				fl.in = nil
			}
			s.enqueue(fl)
		default:
			a.release()
			r.f.land(fl, err)
		}
	}
}
