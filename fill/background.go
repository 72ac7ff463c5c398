package fill

import "time"

// idle reports whether nobody has asked for anything for a while, and takes care that dispatch is called then if not.
func (s *Scheduler) idle() bool {
	if s.opt.Busy != nil && s.opt.Busy() {
		s.asked = time.Now() // a build has more to do when its step ends
	}
	left := s.opt.Idle - time.Since(s.asked)
	if s.waiting > 0 {
		left = s.opt.Idle
	}
	if left <= 0 {
		return true
	}
	s.later(left)
	return false
}

// later calls dispatch after d at the latest.
func (s *Scheduler) later(d time.Duration) {
	now := time.Now()
	at := now.Add(d)
	if s.wake == nil {
		s.wake = time.AfterFunc(d, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.wakeAt = time.Time{}
			s.dispatch()
		})
	} else if s.wakeAt.IsZero() || at.Before(s.wakeAt) {
		s.wake.Reset(d)
	} else {
		return
	}
	s.wakeAt = at
}

// sweep asks for what is missing of layers, in their order: on the level ahead of those that somebody reads most of, on
// the level background of all that something was read of. It reports whether there is room for more.
func (s *Scheduler) sweep(l level) bool {
	for range s.fillers {
		f := s.fillers[s.turn%len(s.fillers)]
		for f.most && l == ahead || s.opt.Background && f.used > 0 && l == background {
			i := f.nextMissing()
			if i < 0 || s.pausing(f) {
				break
			}
			if l == background && (!s.idle() || !s.thrifty() || !s.roomy()) || !s.space(l, f.layer.Frames[i].Size) {
				return false
			}
			if s.copies >= maxCopies {
				return false
			}
			fl := f.batchFrom(i, l, asked, s.batch())
			if fl.state != queued {
				continue
			}
			r := s.plan(fl)
			s.credit -= float64(r.end - r.off)
			s.send(r)
		}
		s.turn++
	}
	return true
}

// pausing reports whether a layer's last failure is too recent to go on with what nobody waits for, or each request for that would
// bring the whole blob.
func (s *Scheduler) pausing(f *Filler) bool {
	if f.whole {
		return true
	}
	left := time.Until(f.pausedUntil)
	if left <= 0 {
		return false
	}
	s.later(left)
	return true
}

// thrifty reports whether BackgroundRate allows another request. It may be in debt by one.
func (s *Scheduler) thrifty() bool {
	rate := float64(s.opt.BackgroundRate)
	if rate <= 0 {
		s.credit = 0
		return true
	}
	now := time.Now()
	s.credit = min(s.credit+rate*now.Sub(s.credited).Seconds(), rate/4)
	s.credited = now
	if s.credit < 0 {
		s.later(max(time.Duration(-s.credit/rate*float64(time.Second)), time.Millisecond))
		return false
	}
	return true
}

// grows is by how much frames grow when they are decompressed, at most as a rule; roomAgain is when there may be room again.
const (
	grows     = 4
	roomAgain = 10 * time.Second
)

// roomy reports whether the disk has room for more than what is on its way.
func (s *Scheduler) roomy() bool {
	if s.opt.Room == nil || s.opt.Room(grows*(s.held+maxRequest)) {
		return true
	}
	s.later(roomAgain)
	return false
}

// yield cancels background requests that would be in the way of somebody who waits.
func (s *Scheduler) yield() {
	for r := range s.requests {
		if r.level == background && r.left > s.est.bdp()/8 {
			r.cancel(errYield)
		}
	}
}

// nextMissing returns the next frame in the order of the layer that isn't in the sink nor on its way, or -1. It looks
// at every frame once, until one of them has failed or was missed.
func (f *Filler) nextMissing() int {
	for ; f.unswept > 0; f.unswept-- {
		if f.cursor >= len(f.layer.Frames) {
			f.cursor = 0
		}
		if f.flights[f.cursor] == nil && !f.there(f.cursor) {
			return f.cursor
		}
		f.cursor++
	}
	return -1
}

// batchFrom queues what is missing from frame first on, up to a number of bytes, and returns the first flight.
func (f *Filler) batchFrom(first int, l level, why evidence, batch int64) *flight {
	fl := f.flight(first, l, why)
	for i := first + 1; i < len(f.layer.Frames) && f.layer.Frames[i].End()-f.layer.Frames[first].Offset <= batch; i++ {
		if f.flights[i] != nil || f.there(i) {
			break
		}
		f.flight(i, l, why)
	}
	return fl
}
