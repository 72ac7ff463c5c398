package fill

import (
	"slices"
	"time"
)

// A registry that accepts requests and says nothing is waited for, for as long as its Fetcher does. That is the matter of who reads from it, and of nobody
// else: what a silent request holds up of other layers is let go.

const (
	// longSilence is how long a request is without a byte, at least, until it counts as silent; silentRoundTrips is the same of a long way.
	longSilence      = 3 * time.Second
	silentRoundTrips = 8
	// manySilent is how many times SchedulerOptions.Requests there are at most, with those that are silent.
	manySilent = 4
)

func (s *Scheduler) patience() time.Duration { return max(longSilence, silentRoundTrips*s.est.rtt) }

// vacant reports whether there is a place for a request that somebody waits for. One that is silent doesn't take any.
func (s *Scheduler) vacant() bool {
	n := len(s.requests)
	if n < s.opt.Requests {
		return true
	}
	if n >= manySilent*s.opt.Requests {
		return false
	}
	long := s.patience()
	since := time.Now().Add(-long)
	for r := range s.requests {
		if !r.heard.After(since) {
			n--
		}
	}
	if n < s.opt.Requests {
		return true
	}
	s.later(long)
	return false
}

// hurry has a flight that somebody waits for fetched, if what it's to be copied from doesn't come, from a registry that may not be its own.
func (s *Scheduler) hurry(fl *flight) {
	long := s.patience()
	time.AfterFunc(long, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if fl.state != awaiting {
			return
		}
		if !slices.ContainsFunc(fl.awaits, func(o *flight) bool { return o.state == fetching && time.Since(o.req.heard) >= long }) {
			s.hurry(fl)
			return
		}
		fl.awaits = nil
		s.fetchAfterAll(fl)
		s.dispatch()
	})
}
