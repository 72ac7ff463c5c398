package fill

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Whatever readers, links and disks do, every read ends, what it says is true, and in the end everything is there and
// nothing is left behind.
func TestNothingIsLostInConfusion(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	var images []*image
	for k := range 3 {
		var sizes []int64
		for range 150 {
			sizes = append(sizes, 1+int64(rnd.ExpFloat64()*30_000))
		}
		sizes = append(sizes, 3<<20, 1, 5<<20)
		images = append(images, imageOf(t, []int64{64 << 10, 1 << 20, 4 << 20}[k], sizes...))
	}
	images = append(images, images[0]) // a layer that has what another one has
	seeds := uint64(30)
	if testing.Short() {
		seeds = 3
	}
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) { confuse(t, seed, images) })
	}
}

func confuse(t *testing.T, seed uint64, images []*image) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	chance := func(oneIn int) func() bool {
		r, mu := rand.New(rand.NewPCG(seed, rnd.Uint64())), new(sync.Mutex)
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return r.IntN(oneIn) == 0
		}
	}
	l := &link{rate: 1e6 * float64(1+rnd.IntN(100)), rtt: time.Duration(1+rnd.IntN(80)) * time.Millisecond}
	s := NewScheduler(SchedulerOptions{
		Requests: 8 + rnd.IntN(30), Decoders: 1 + rnd.IntN(4), Memory: int64(1+rnd.IntN(8)) << 20,
		Background: seed%2 == 0, Idle: 50 * time.Millisecond, BackgroundRate: int64(rnd.IntN(2)) * 5e6,
	})
	defer s.Close()
	broken, flipped, full := chance(15), chance(400), chance(60)
	l.fail = func() error {
		if broken() {
			return errors.New("reset")
		}
		return nil
	}
	l.spoil = func(_ int64, p []byte) {
		if flipped() {
			p[len(p)/2] ^= 0x10
		}
	}
	var labs []*lab
	for _, im := range images {
		b := &lab{s: s, im: im, link: l, from: l.serve(im), sink: newMemory(im)}
		b.sink.fail = func(int) error {
			if full() {
				return syscall.ENOSPC
			}
			return nil
		}
		b.sink.slow = func() { time.Sleep(time.Millisecond) }
		b.Filler = s.Open(im.Layer, b.from, b.sink, LayerOptions{Name: "sha256:test", Packed: packed(t, im.Layer)})
		defer b.Close()
		labs = append(labs, b)
	}
	stop := errors.New("step cancelled")
	var readers sync.WaitGroup
	for k := range 6 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(k)))
			for range 120 {
				b := labs[rnd.IntN(len(labs))]
				off := rnd.Int64N(b.im.DataSize)
				n := 1 + rnd.Int64N(256<<10)
				ctx, cancel := context.WithCancelCause(context.Background())
				switch rnd.IntN(10) {
				case 0:
					b.Prefetch(off, n)
				case 1:
					time.AfterFunc(time.Duration(rnd.IntN(100))*time.Millisecond, func() { cancel(stop) })
				}
				if err := b.Fill(ctx, off, n); err == nil {
					first, end := b.im.ChunksOf(off, n)
					for c := first; c < end; c++ {
						if !b.sink.Have(c) {
							t.Errorf("seed %d: Fill returned without chunk %d", seed, c)
						}
					}
				}
				cancel(nil)
				time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
			}
		})
	}
	readers.Wait()
	l.mu.Lock()
	l.fail, l.spoil = nil, nil
	l.mu.Unlock()
	for _, b := range labs {
		b.sink.mu.Lock()
		b.sink.fail = nil
		b.sink.mu.Unlock()
		for range 3 { // what was spoilt before may still be on its way
			_ = b.Fill(t.Context(), 0, b.im.DataSize)
		}
		if err := b.Fill(t.Context(), 0, b.im.DataSize); err != nil || b.Stats().Missing > 0 {
			t.Errorf("seed %d: %v, %+v", seed, err, b.Stats())
		}
		b.sink.once(t)
	}
	time.Sleep(time.Minute)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.requests) != 0 || s.outstanding != 0 || s.held != 0 || s.waiting != 0 || s.copies != 0 {
		t.Errorf("seed %d: left are %d requests, %d bytes outstanding, %d held, %d waiting, %d copies",
			seed, len(s.requests), s.outstanding, s.held, s.waiting, s.copies)
	}
	for _, b := range labs {
		if len(b.flights) != 0 {
			t.Errorf("seed %d: %d flights left", seed, len(b.flights))
		}
		var guessed [reasons]int64
		for i, why := range b.guesses {
			if why != asked {
				guessed[why] += b.im.Frames[i].Size
			}
		}
		if guessed != b.guessed {
			t.Errorf("seed %d: %d bytes guessed, %d counted", seed, guessed, b.guessed)
		}
	}
}
