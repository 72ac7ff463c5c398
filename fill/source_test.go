package fill

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fading is a sink that loses what it has, at some point.
type fading struct {
	*memory
	gone atomic.Bool
	read func()
}

func (s *fading) Have(chunk int) bool { return !s.gone.Load() && s.memory.Have(chunk) }

func (s *fading) ReadAt(p []byte, off int64) (int, error) {
	if s.read != nil {
		s.read()
	}
	if s.gone.Load() {
		return 0, errNotElsewhere
	}
	return s.memory.ReadAt(p, off)
}

// filled is a sink that has all of an image.
func filled(im *image) *fading {
	s := &fading{memory: newMemory(im)}
	for c := range im.Chunks {
		s.have.set(c)
	}
	return s
}

// What a Source has is copied, into layers that were open before and such that are opened later.
func TestSource(t *testing.T) {
	one, two := version(t, 1), version(t, 2)
	for name, first := range map[string]bool{"opened first": true, "opened later": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, l := NewScheduler(SchedulerOptions{}), dsl()
				defer s.Close()
				var b *lab
				if !first {
					b = openIn(t, s, l, two)
				}
				src := s.OpenSource(packed(t, one.Layer), filled(one))
				defer src.Close()
				if first {
					b = openIn(t, s, l, two)
				}
				synctest.Wait()
				b.read(t, 0, two.DataSize)
				b.sink.once(t)
				if st := b.Stats(); st.Missing > 0 || st.Fetched != changed(two, one) || st.Copied != int64(len(two.blob))-st.Fetched {
					t.Errorf("%+v, want %d bytes fetched", st, changed(two, one))
				}
			})
		})
	}
}

// A Source that is closed, or loses what it has, in the middle of copying is in the way of nobody, and Close waits for who reads.
func TestSourceThatGoes(t *testing.T) {
	one, two := version(t, 1), version(t, 2)
	for name, closes := range map[string]bool{"closed": true, "emptied": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := NewScheduler(SchedulerOptions{})
				defer s.Close()
				sink := filled(one)
				src := s.OpenSource(packed(t, one.Layer), sink)
				b := openIn(t, s, dsl(), two)
				synctest.Wait()
				var reads, reading atomic.Int64
				var going sync.WaitGroup
				sink.read = func() {
					reading.Add(1)
					defer reading.Add(-1)
					if reads.Add(1) == 10 {
						going.Go(func() {
							if !closes {
								sink.gone.Store(true)
								return
							}
							src.Close()
							if n := reading.Load(); n > 0 {
								t.Errorf("closed with %d who read", n)
							}
							sink.gone.Store(true)
						})
					}
					time.Sleep(time.Millisecond)
				}
				b.read(t, 0, two.DataSize)
				going.Wait()
				src.Close()
				b.sink.once(t)
				if st := b.Stats(); st.Missing+st.Errors+st.Corrupt > 0 || st.Copied == 0 || st.Fetched <= changed(two, one) {
					t.Errorf("%+v, want some copied and the rest fetched", st)
				}
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.copies != 0 || s.held != 0 || s.waiting != 0 || len(s.lenders) != 1 {
					t.Errorf("left are %d copies, %d bytes held, %d waiting, %d lenders", s.copies, s.held, s.waiting, len(s.lenders))
				}
			})
		})
	}
}
