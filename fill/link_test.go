package fill

import (
	"context"
	"io"
	"sync"
	"time"
)

// link is a network with a rate that its connections share and a round trip time. Time is virtual in a synctest bubble.
type link struct {
	rate float64 // bytes per second
	rtt  time.Duration

	mu                  sync.Mutex
	free                time.Time // when what was sent so far has arrived
	requests, most, now int       // in total, at most at the same time, at present
	sent                int64
	spoil               func(off int64, p []byte) // what happens to bytes on the way
	fail                func() error
}

// span is the range from off up to end.
type span struct{ off, end int64 }

// served is a blob at the other end of a link.
type served struct {
	*link
	blob []byte

	mu    sync.Mutex
	asked []span
}

func (l *link) serve(im *image) *served { return &served{link: l, blob: im.blob} }

// Fetch implements Fetcher.
func (s *served) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	s.mu.Lock()
	s.asked = append(s.asked, span{off, off + n})
	s.mu.Unlock()
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	s.requests++
	s.now++
	s.most = max(s.most, s.now)
	fail := s.fail
	b := &sending{ctx: ctx, s: s, off: off, end: off + n}
	s.link.mu.Unlock()
	err := sleep(ctx, s.rtt)
	if err == nil && fail != nil {
		err = fail()
	}
	s.link.mu.Lock()
	if err != nil {
		s.now--
		return nil, err
	}
	return b, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return context.Cause(ctx)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

type sending struct {
	ctx      context.Context
	s        *served
	off, end int64
	closed   bool
}

func (b *sending) Read(p []byte) (int, error) {
	if b.off == b.end {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), b.end-b.off, 8<<10)]
	s := b.s
	s.link.mu.Lock()
	now := time.Now()
	if s.free.Before(now) {
		s.free = now
	}
	s.free = s.free.Add(time.Duration(float64(len(p)) / s.rate * float64(time.Second)))
	wait := s.free.Sub(now)
	spoil := s.spoil
	s.sent += int64(len(p))
	s.link.mu.Unlock()
	if err := sleep(b.ctx, wait); err != nil {
		return 0, err
	}
	copy(p, s.blob[b.off:b.end])
	if spoil != nil {
		spoil(b.off, p)
	}
	b.off += int64(len(p))
	return len(p), nil
}

func (b *sending) Close() error {
	b.s.link.mu.Lock()
	defer b.s.link.mu.Unlock()
	if !b.closed {
		b.closed = true
		b.s.now--
	}
	return nil
}

func (l *link) figures() (requests, most int, sent int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.requests, l.most, l.sent
}

// idle reports whether no request is under way.
func (l *link) idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now == 0
}

// takes is how long n bytes take on an idle link, without the round trip.
func (l *link) takes(n int64) time.Duration {
	return time.Duration(float64(n) / l.rate * float64(time.Second))
}
