package fill

import (
	"runtime"
	"sync"
	"time"
)

// SchedulerOptions tune a Scheduler. The zero value works.
type SchedulerOptions struct {
	// Requests is the largest number of requests outstanding, but for those that are silent, at least 8. 0 means 64.
	Requests int
	// Decoders is the largest number of frames decoded at the same time. 0 means one per processor.
	Decoders int
	// Memory bounds the compressed bytes that were asked for before anybody waits for them and that haven't been
	// written. 0 means 32 MiB.
	Memory int64
	// Background says whether layers are filled that something was read of.
	Background bool
	// Idle is how long nobody must have asked for anything before background work begins. 0 means 500 ms.
	Idle time.Duration
	// Busy, if not nil, reports whether background work has to wait, though nobody waits for bytes: who computes needs the processors that
	// it would take. It's called often, and must not wait, nor call the Scheduler.
	Busy func() bool
	// BackgroundRate bounds background work, in compressed bytes per second. 0 means what the link carries.
	BackgroundRate int64
	// Room, if not nil, reports whether the disk has room for so many bytes that nobody has asked for. It's called often, and must not wait.
	Room func(bytes int64) bool
	// SlowAfter is how long a read waits until LayerOptions.Slow is told. 0 means 5 s.
	SlowAfter time.Duration
	// Waited, if not nil, is told of every wait when it is over. Called concurrently.
	Waited func(time.Duration)
}

const (
	defaultRequests  = 64
	minRequests      = 8
	defaultMemory    = 32 << 20
	defaultIdle      = 500 * time.Millisecond
	defaultSlowAfter = 5 * time.Second

	// minRequest and maxRequest bound a request for several frames, in bytes.
	minRequest = 64 << 10
	maxRequest = 4 << 20
	// maxVain is the number of bytes in a row that are rather fetched in vain than a request made for what is behind them.
	maxVain = 8 << 10
)

// Scheduler decides what all layers of a daemon fetch next. Make it with [NewScheduler].
type Scheduler struct {
	opt   SchedulerOptions
	slots decoders
	wg    sync.WaitGroup // of the requests

	mu          sync.Mutex
	closed      bool
	fillers     []*Filler
	lenders     []*lender // theirs, and those of Sources
	est         estimate
	queues      [levels][]*flight // an entry is stale if its flight has another level, or isn't queued
	requests    map[*request]struct{}
	outstanding int64 // bytes asked for that haven't arrived
	held        int64 // bytes asked for that haven't been written
	waiting     int   // flights that somebody waits for
	copies      int   // flights that need no request
	asked       time.Time
	wake        *time.Timer // calls dispatch at wakeAt
	wakeAt      time.Time
	turn        int     // whose background work is next
	reader      *Filler // of the image that somebody reads from one end to the other, where that was seen last
	strays      int     // frames touched since, in that image, that weren't part of it
	walk        *walk   // that the reader is on, nil without one
	lists       listings
	credit      float64 // bytes that background work may ask for now
	credited    time.Time
}

// NewScheduler returns a Scheduler without layers. The caller closes it.
func NewScheduler(opt SchedulerOptions) *Scheduler {
	if opt.Requests <= 0 {
		opt.Requests = defaultRequests
	}
	opt.Requests = max(opt.Requests, minRequests)
	if opt.Decoders <= 0 {
		opt.Decoders = runtime.GOMAXPROCS(0)
	}
	if opt.Memory <= 0 {
		opt.Memory = defaultMemory
	}
	if opt.Idle <= 0 {
		opt.Idle = defaultIdle
	}
	if opt.SlowAfter <= 0 {
		opt.SlowAfter = defaultSlowAfter
	}
	s := &Scheduler{opt: opt, est: newEstimate(), requests: map[*request]struct{}{}}
	s.slots.places = opt.Decoders
	return s
}

// Link returns what the link is taken for: its rate in bytes per second, which is measured or the one to start with, and the time from a request to its
// first byte.
func (s *Scheduler) Link() (rate float64, rtt time.Duration, measured bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.est.rate, s.est.rtt, s.est.measured
}

// SlowAfter is how long a read waits until that is told.
func (s *Scheduler) SlowAfter() time.Duration { return s.opt.SlowAfter }

// Close closes all Fillers and waits for what they have under way.
func (s *Scheduler) Close() error {
	s.mu.Lock()
	s.closed = true
	fillers := append([]*Filler(nil), s.fillers...)
	if s.wake != nil {
		s.wake.Stop()
	}
	s.mu.Unlock()
	for _, f := range fillers {
		f.Close()
	}
	s.wg.Wait()
	s.slots.wg.Wait()
	return nil
}

// enqueue adds a flight to the queue of its level.
func (s *Scheduler) enqueue(fl *flight) {
	fl.state = queued
	s.queues[fl.level] = append(s.queues[fl.level], fl)
}

// raise makes a flight more urgent, with the request that fetches it.
func (s *Scheduler) raise(fl *flight, l level) {
	if l >= fl.level {
		return
	}
	if l == demand {
		s.waiting++
	}
	fl.level = l
	switch fl.state {
	case queued:
		s.enqueue(fl)
	case fetching:
		fl.req.level = min(fl.req.level, l)
	case copying:
		if !fl.started {
			s.copy(fl)
		}
	case awaiting:
		if l == demand {
			s.hurry(fl)
		}
		for _, other := range fl.awaits {
			s.raise(other, l)
		}
	}
}

// head returns the first flight that is queued on a level.
func (s *Scheduler) head(l level) *flight {
	for len(s.queues[l]) > 0 {
		if fl := s.queues[l][0]; fl.state == queued && fl.level == l {
			return fl
		}
		s.queues[l][0] = nil
		s.queues[l] = s.queues[l][1:]
	}
	return nil
}

// dispatch sends requests as long as something is queued and there is room for it. What is more urgent goes first; what
// is less urgent leaves the link emptier, so that what comes in between finds it soon.
func (s *Scheduler) dispatch() {
	if s.closed {
		return
	}
	for l := range levels {
		for fl := s.head(l); fl != nil; fl = s.head(l) {
			if !s.room(fl) {
				return
			}
			s.send(s.plan(fl))
		}
		if l == ahead && (!s.sweepImage() || !s.sweep(ahead)) {
			return
		}
	}
	s.sweep(background)
}

// limit is how many bytes may be outstanding when something of level l is asked for.
func (s *Scheduler) limit(l level) int64 {
	bdp := s.est.bdp()
	switch l {
	case ahead:
		return 3 * bdp
	case profiled:
		return 2 * bdp
	}
	return bdp
}

// room reports whether there is room for a flight.
func (s *Scheduler) room(fl *flight) bool {
	if fl.level == demand {
		return s.vacant()
	}
	if fl.level == background && !s.idle() {
		return false
	}
	return s.space(fl.level, fl.size())
}

// space reports whether there is room for a request of level l. A frame that is larger than all
// there is goes alone.
func (s *Scheduler) space(l level, n int64) bool {
	if len(s.requests) >= s.opt.Requests*3/4 {
		return false // the rest is for who waits
	}
	if s.held > 0 && s.held+n > s.opt.Memory {
		return false
	}
	return s.outstanding == 0 || s.outstanding+min(n, s.batch()) <= s.limit(l)
}

// batch is the number of bytes from which a request takes no more frames: several of them fill the link.
func (s *Scheduler) batch() int64 { return min(max(s.est.bdp()/3, minRequest), maxRequest) }

// gap is how many bytes that nobody wants are rather fetched along than a request made for what is behind them.
func (s *Scheduler) gap() int64 { return s.est.bdp() / 8 }

// plan makes a request that begins with a queued flight and takes along what is queued behind it.
func (s *Scheduler) plan(fl *flight) *request {
	f := fl.f
	r := &request{f: f, level: fl.level, flights: []*flight{fl}}
	fr := &f.layer.Frames[fl.frame]
	r.off, r.end = fr.Offset, fr.End()
	if fl.in != nil {
		r.off += int64(fl.in.got()) // what an earlier request left
	}
	batch := s.batch()
	last := fl.frame // of the request
	var vain int64   // bytes behind it that nobody wants
	for next := last + 1; !fl.again && next < len(f.layer.Frames); next++ {
		fr := &f.layer.Frames[next]
		if fr.End()-r.off > batch || fr.Offset-r.end > s.gap() {
			break
		}
		nf := f.flights[next]
		switch {
		case nf == nil && f.there(next) || nf != nil && nf.local():
			if vain += fr.Size; vain > maxVain {
				return r
			}
			continue
		case nf == nil && f.whole:
			nf = f.newFlight(next, ahead, asked) // it gets no request of its own
		case nf == nil:
			continue // a gap, if something is wanted behind it
		case nf.state != queued || nf.again || nf.in != nil || nf.level > max(fl.level, profiled):
			return r
		}
		for between := last + 1; between < next; between++ {
			if f.flights[between] != nil || f.there(between) {
				continue // it's received and dropped
			}
			if !f.afford(f.layer.Frames[between].Size, near) {
				return r // which ends with what it has so far
			}
			r.end = f.layer.Frames[between].End()
			r.flights = append(r.flights, f.newFlight(between, fl.level, near))
		}
		r.flights = append(r.flights, nf)
		r.end, last, vain = fr.End(), next, 0
	}
	return r
}
