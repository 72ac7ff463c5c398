package fill

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// lab is a layer behind a link, and the Filler of it.
type lab struct {
	*Filler
	s    *Scheduler
	im   *image
	link *link
	from *served
	sink *memory
}

// dsl is the link that the benchmarks of the repository are measured on: 200 Mbit/s, 20 ms.
func dsl() *link { return &link{rate: 25e6, rtt: 20 * time.Millisecond} }

func newLab(t testing.TB, l *link, im *image, opt SchedulerOptions) *lab {
	t.Helper()
	b := &lab{s: NewScheduler(opt), im: im, link: l, from: l.serve(im), sink: newMemory(im)}
	b.Filler = b.s.Open(im.Layer, b.from, b.sink, LayerOptions{Name: "sha256:test"})
	return b
}

// read asks for bytes as a kernel would, in steps of 128 KiB.
func (b *lab) read(t testing.TB, off, n int64) {
	t.Helper()
	for end := off + n; off < end; off += 128 << 10 {
		n := min(128<<10, end-off)
		if err := b.Fill(context.Background(), off, n); err != nil {
			t.Fatal(err)
		}
		first, last := b.im.ChunksOf(off, n)
		for c := first; c < last; c++ {
			if !b.sink.Have(c) {
				t.Fatalf("Fill(%d, %d) returned before chunk %d was written", off, n, c)
			}
		}
	}
}

func (b *lab) readFile(t testing.TB, i int) {
	t.Helper()
	f := b.im.file(i)
	b.read(t, f.off, f.n)
}

// fetchedOnce fails the test if a byte was asked for twice.
func (b *lab) fetchedOnce(t *testing.T) {
	t.Helper()
	b.from.mu.Lock()
	defer b.from.mu.Unlock()
	all := slices.Clone(b.from.asked)
	slices.SortFunc(all, func(x, y span) int { return cmp.Compare(x.off, y.off) })
	for i := 1; i < len(all); i++ {
		if all[i].off < all[i-1].end {
			t.Errorf("bytes from %d on were asked for twice", all[i].off)
			return
		}
	}
}

func TestFourReadersFetchEachFrameOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), imageOf(t, 64<<10, many(40, 300_000)...), SchedulerOptions{})
		defer b.s.Close()
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				for _, k := range rand.New(rand.NewPCG(1, uint64(i))).Perm(40) {
					b.readFile(t, k)
				}
			})
		}
		wg.Wait()
		b.sink.once(t)
		b.fetchedOnce(t)
		if b.Stats().Missing > 0 {
			t.Error("everything was read and something is missing")
		}
	})
}

// A sequential read fills the link although its reader asks for one piece after the other.
func TestSequentialColdReadReaches85PercentOfTheLink(t *testing.T) {
	for _, chunk := range []int64{4 << 20, 64 << 10} {
		for _, l := range []*link{dsl(), {rate: 60e6, rtt: 50 * time.Millisecond}, {rate: 2e6, rtt: 100 * time.Millisecond}} {
			t.Run(fmt.Sprintf("chunk %d, %.0f MB/s, %s", chunk, l.rate/1e6, l.rtt), func(t *testing.T) {
				size := int64(l.rate * 2)
				im := imageOf(t, chunk, size)
				synctest.Test(t, func(t *testing.T) {
					b := newLab(t, l, im, SchedulerOptions{})
					defer b.s.Close()
					start := time.Now()
					b.readFile(t, 0)
					d, ideal := time.Since(start), l.takes(int64(len(im.blob)))
					_, most, sent := l.figures()
					rate, rtt, measured := b.s.Link()
					if !measured {
						t.Error("the link isn't measured")
					}
					t.Logf("%s, %.0f %% of the link; at most %d requests outstanding; link estimated at %.1f MB/s, %s", d, 100*ideal.Seconds()/d.Seconds(), most, rate/1e6, rtt)
					if d > ideal*100/85 {
						t.Errorf("took %s, the link alone %s", d, ideal)
					}
					if sent != int64(len(im.blob)) {
						t.Errorf("sent %d of %d bytes", sent, len(im.blob))
					}
				})
			})
		}
	}
}

// Files read in the order of the layer, as tar does it, come at link speed, however small they are.
func TestTarReadsAtLinkSpeedInBoundedMemory(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var sizes []int64
	for range 4000 {
		sizes = append(sizes, 1+int64(rnd.ExpFloat64()*12_000))
	}
	im := imageOf(t, 4<<20, sizes...)
	synctest.Test(t, func(t *testing.T) {
		const bound = 4 << 20
		b := newLab(t, dsl(), im, SchedulerOptions{Memory: bound})
		defer b.s.Close()
		var most int64
		b.sink.slow = func() {
			b.s.mu.Lock()
			most = max(most, b.s.held)
			b.s.mu.Unlock()
		}
		start := time.Now()
		for i := range sizes {
			b.readFile(t, i)
		}
		d, ideal := time.Since(start), b.link.takes(int64(len(im.blob)))
		requests, _, sent := b.link.figures()
		t.Logf("%s, %.0f %% of the link; %d requests, %d of %d bytes; at most %d held", d, 100*ideal.Seconds()/d.Seconds(), requests, sent, len(im.blob), most)
		if d > ideal*100/85 {
			t.Errorf("took %s, the link alone %s", d, ideal)
		}
		if most > bound+2<<20 {
			t.Errorf("held %d bytes", most)
		}
	})
}

// A slow sink holds back requests, not only decoders.
func TestSlowSinkHoldsRequestsBack(t *testing.T) {
	im := imageOf(t, 256<<10, many(30, 1<<20)...)
	synctest.Test(t, func(t *testing.T) {
		const bound = 2 << 20
		b := newLab(t, &link{rate: 1e9, rtt: time.Millisecond}, im, SchedulerOptions{Memory: bound, Decoders: 2})
		defer b.s.Close()
		var mu sync.Mutex
		var most int64
		b.sink.slow = func() {
			time.Sleep(20 * time.Millisecond)
			b.s.mu.Lock()
			defer b.s.mu.Unlock()
			mu.Lock()
			defer mu.Unlock()
			most = max(most, b.s.held)
		}
		if err := b.Fill(t.Context(), 0, im.DataSize); err != nil {
			t.Fatal(err)
		}
		if most > bound+2<<20 {
			t.Errorf("%d bytes held", most)
		}
	})
}

func TestRandomSmallReadsFetchLittleMoreThanExact(t *testing.T) {
	for _, c := range []struct {
		name  string
		chunk int64
		sizes []int64
	}{
		{"small files", 4 << 20, many(4000, 20_000)},
		{"tiny files", 4 << 20, many(20_000, 1500)},
		{"a large file in large chunks", 1 << 20, []int64{100 << 20}},
		{"a large file in small chunks", 64 << 10, []int64{100 << 20}},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := imageOf(t, c.chunk, c.sizes...)
			synctest.Test(t, func(t *testing.T) {
				b := newLab(t, dsl(), im, SchedulerOptions{})
				defer b.s.Close()
				rnd := rand.New(rand.NewPCG(3, 4))
				frames := map[int]bool{}
				var exact int64
				for exact < 8<<20 || c.chunk == 1<<20 && exact < 20<<20 {
					ch := &im.Chunks[rnd.IntN(len(im.Chunks))]
					b.read(t, ch.Data, 1)
					if i := int(ch.Frame); !frames[i] {
						frames[i] = true
						exact += im.Frames[i].Size
					}
				}
				time.Sleep(5 * time.Second)
				_, _, sent := b.link.figures()
				t.Logf("%.2f times exact", float64(sent)/float64(exact))
				if sent > exact*13/10 {
					t.Errorf("sent %d bytes for %d", sent, exact)
				}
			})
		})
	}
}

// Who waits is served as if background work didn't exist, but for the round trip that it may take to stop.
func TestDemandIsNotDelayedByBackground(t *testing.T) {
	for _, l := range []*link{dsl(), {rate: 1e6, rtt: 100 * time.Millisecond}} {
		im := imageOf(t, 4<<20, append(many(500, 20_000), many(20, 1<<20)...)...)
		synctest.Test(t, func(t *testing.T) {
			b := newLab(t, l, im, SchedulerOptions{Background: true, Idle: 300 * time.Millisecond})
			defer b.s.Close()
			b.readFile(t, 519)
			b.s.mu.Lock()
			b.cursor = 500 // what is large comes first
			b.s.mu.Unlock()
			var worst time.Duration
			met := 0
			for i := 0; i < 400; i += 40 {
				time.Sleep(350*time.Millisecond + time.Duration(i)*time.Millisecond/10)
				if l.idle() || b.sink.Have(i) {
					continue // not under way
				}
				met++
				start := time.Now()
				b.read(t, b.im.file(i).off, 1)
				worst = max(worst, time.Since(start))
			}
			t.Logf("%s: at worst %s, %d times", l.rtt, worst, met)
			if met < 3 || worst > 2*l.rtt+l.takes(20_000)+20*time.Millisecond {
				t.Errorf("a read of 20 kB waited %s", worst)
			}
			time.Sleep(2 * time.Minute)
			if b.Stats().Missing > 0 {
				t.Errorf("nobody asks for anything and %d chunks are missing", b.Stats().Missing)
			}
			b.sink.once(t)
			if _, _, sent := l.figures(); sent > int64(len(im.blob))*11/10 {
				t.Errorf("sent %d bytes of %d: yielding costs too much", sent, len(im.blob))
			}
		})
	}
}

func TestBackgroundKeepsToItsRate(t *testing.T) {
	im := imageOf(t, 64<<10, many(64, 64<<10)...)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{Background: true, BackgroundRate: 1 << 20})
		defer b.s.Close()
		b.readFile(t, 0)
		time.Sleep(2 * time.Second)
		_, _, sent := b.link.figures()
		if sent < 1<<20 || sent > 5<<19 {
			t.Errorf("%d bytes in 1.5 s", sent)
		}
	})
}

// Who computes what it has read isn't disturbed.
func TestBackgroundWaitsForWhoComputes(t *testing.T) {
	im := imageOf(t, 64<<10, many(64, 64<<10)...)
	synctest.Test(t, func(t *testing.T) {
		var busy atomic.Bool
		busy.Store(true)
		b := newLab(t, dsl(), im, SchedulerOptions{Background: true, Busy: busy.Load})
		defer b.s.Close()
		b.readFile(t, 0)
		time.Sleep(time.Minute)
		if _, _, sent := b.link.figures(); sent > 1<<20 {
			t.Errorf("%d bytes were fetched meanwhile", sent)
		}
		busy.Store(false)
		time.Sleep(10 * time.Second)
		if _, _, sent := b.link.figures(); sent < 4<<20 {
			t.Errorf("%d bytes of 4 MiB were fetched afterwards", sent)
		}
	})
}

func TestBackgroundLeavesRoom(t *testing.T) {
	im := imageOf(t, 64<<10, many(64, 64<<10)...)
	synctest.Test(t, func(t *testing.T) {
		var room atomic.Int64
		b := newLab(t, dsl(), im, SchedulerOptions{Background: true, Room: func(n int64) bool { return n < room.Load() }})
		defer b.s.Close()
		b.readFile(t, 0)
		time.Sleep(time.Minute)
		if _, _, sent := b.link.figures(); sent > 1<<20 {
			t.Errorf("%d bytes were fetched without room for them", sent)
		}
		b.readFile(t, 60) // whoever waits gets what there is
		room.Store(1 << 30)
		time.Sleep(time.Minute)
		if _, _, sent := b.link.figures(); sent < 4<<20 {
			t.Errorf("%d bytes of 4 MiB were fetched once there was room", sent)
		}
	})
}

// The first of several frames that come in one request is there when it has arrived.
func TestFirstFrameDoesNotWaitForTheLast(t *testing.T) {
	im := imageOf(t, 64<<10, 2<<20, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, &link{rate: 1e6, rtt: 10 * time.Millisecond}, im, SchedulerOptions{})
		defer b.s.Close()
		b.readFile(t, 1) // the link is known
		start := time.Now()
		go func() { _ = b.Fill(context.Background(), 0, im.DataSize) }()
		synctest.Wait()
		b.read(t, 0, 1)
		if d := time.Since(start); d > 10*time.Millisecond+8*b.link.takes(64<<10) {
			t.Errorf("waited %s", d)
		}
	})
}

func TestSlowReadsAreTold(t *testing.T) {
	im := imageOf(t, 1<<20, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		l := &link{rate: 1e5, rtt: time.Second}
		var told []string
		var waits []time.Duration
		s := NewScheduler(SchedulerOptions{Waited: func(d time.Duration) { waits = append(waits, d) }})
		defer s.Close()
		start := time.Now()
		var over time.Duration
		var misses []Miss
		f := s.Open(im.Layer, l.serve(im), newMemory(im), LayerOptions{
			Slow: func(file string, d time.Duration) func() {
				told = append(told, fmt.Sprint(file, " ", d))
				if q := s.Queue(); q != (Queue{Demand: int64(len(im.blob))}) {
					t.Errorf("queue %+v", q)
				}
				return func() { over = time.Since(start) }
			},
			Missed: func(m Miss) { misses = append(misses, m) },
		})
		for range 2 { // the second one hits
			if err := f.Fill(t.Context(), 0, 1); err != nil {
				t.Fatal(err)
			}
		}
		if fmt.Sprint(told) != "[0 5s]" || len(waits) != 1 || waits[0] < 10*time.Second || over != waits[0] {
			t.Errorf("told %v, over after %v, waits %v", told, over, waits)
		}
		if want := []Miss{{Bytes: 1, Start: start, Waited: over}}; !slices.Equal(misses, want) {
			t.Errorf("misses %+v, want %+v", misses, want)
		}
		if q := s.Queue(); q != (Queue{}) {
			t.Errorf("queue %+v when all is there", q)
		}
		if st := f.Stats(); st.Waited != waits[0] || st.Misses != 1 || st.Fetched != int64(len(im.blob)) || st.Written != 1<<20 || st.Missing != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// Who has gone while a read waited got no error, and there is none in the figures, which agree while it goes on.
func TestAReaderThatGoesIsNoError(t *testing.T) {
	im := imageOf(t, 1<<20, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		l := &link{rate: 1e5, rtt: time.Second}
		s := NewScheduler(SchedulerOptions{})
		defer s.Close()
		var misses []Miss
		f := s.Open(im.Layer, l.serve(im), newMemory(im), LayerOptions{Missed: func(m Miss) { misses = append(misses, m) }})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		time.AfterFunc(time.Second, func() {
			if st := f.Stats(); st.Misses != 0 || st.Waited != 0 {
				t.Errorf("while it waits: %+v", st)
			}
		})
		start := time.Now()
		if err := f.Fill(ctx, 0, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Fill: %v", err)
		}
		if want := []Miss{{Bytes: 1, Start: start, Waited: 2 * time.Second}}; !slices.Equal(misses, want) {
			t.Errorf("misses %+v, want %+v", misses, want)
		}
		if st := f.Stats(); st.Misses != 1 || st.Waited != 2*time.Second || st.Errors != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// What a profile names comes before anybody asks, in few requests although it leaves out this and that.
func TestPrefetch(t *testing.T) {
	im := imageOf(t, 4<<20, many(3000, 5000)...)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		wanted := int64(0)
		for i := range 3000 {
			if f := b.im.file(i); i%8 != 0 {
				b.Prefetch(f.off, f.n)
				wanted += f.n
			}
		}
		time.Sleep(10 * time.Second)
		for i := range 3000 {
			if i%8 != 0 && !b.sink.Have(i) {
				t.Fatalf("file %d isn't there", i)
			}
		}
		requests, most, sent := b.link.figures()
		t.Logf("%d requests, %d at a time, %.2f times exact", requests, most, float64(sent)/float64(wanted))
		if requests > 200 || sent > wanted*13/10 {
			t.Errorf("%d requests, %d bytes for %d", requests, sent, wanted)
		}
	})
}

// keeper has a part of a blob.
type keeper struct {
	*served
	from int64
}

func (k *keeper) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if off < k.from {
		return k.served.Fetch(ctx, off, n)
	}
	return kept{io.NopCloser(bytes.NewReader(k.blob[off : off+n]))}, nil
}

type kept struct{ io.ReadCloser }

func (kept) Local() bool { return true }

// What was kept comes in no time; the link is no other for it.
func TestLocalBytesSayNothingOfTheLink(t *testing.T) {
	im := imageOf(t, 64<<10, many(60, 60_000)...)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		b.Filler.from = &keeper{b.from, im.Frames[30].Offset}
		for i := range 30 {
			b.readFile(t, i)
		}
		rate, rtt, _ := b.s.Link()
		for i := range 10 {
			b.readFile(t, 59-3*i)
		}
		if r, d, _ := b.s.Link(); r != rate || d != rtt {
			t.Errorf("link is %.0f B/s, %v; after local bytes %.0f B/s, %v", rate, rtt, r, d)
		}
	})
}
