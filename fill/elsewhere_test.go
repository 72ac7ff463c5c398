package fill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// openPacked opens layers behind one link as the engine does, which packs them: their chunks can be found by their digests.
func openPacked(t testing.TB, l *link, opt SchedulerOptions, images ...*image) []*lab {
	t.Helper()
	s := NewScheduler(opt)
	var labs []*lab
	for _, im := range images {
		labs = append(labs, openIn(t, s, l, im))
	}
	return labs
}

func openIn(t testing.TB, s *Scheduler, l *link, im *image) *lab {
	t.Helper()
	b := &lab{s: s, im: im, link: l, from: l.serve(im), sink: newMemory(im)}
	b.Filler = s.Open(im.Layer, b.from, b.sink, LayerOptions{Name: "sha256:test", Packed: packed(t, im.Layer)})
	return b
}

func packed(t testing.TB, l *layer.Layer) *layer.Layer {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "tree"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := l.Pack(f)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// version is an image of files that are the same in each version, and of one that isn't.
func version(t testing.TB, n int) *image {
	t.Helper()
	var entries []entry
	for i := range 50 {
		entries = append(entries, text(fmt.Sprintf("usr/lib/%02d", i), 10_000+i))
		if i%10 == n {
			entries = append(entries, text(fmt.Sprintf("usr/lib/%02d-version-%d", i, n), 30_000))
		}
	}
	return treeOf(t, entries...)
}

// changed is the bytes of the frames of one version that the other hasn't.
func changed(im, other *image) (n int64) {
	has := map[[32]byte]bool{}
	for _, d := range other.Digests {
		has[d] = true
	}
	for c, d := range im.Digests {
		if !has[d] {
			n += im.Frames[im.Chunks[c].Frame].Size
		}
	}
	return n
}

func TestWhatIsElsewhereIsNotFetched(t *testing.T) {
	one, two := version(t, 1), version(t, 2)
	synctest.Test(t, func(t *testing.T) {
		l := dsl()
		labs := openPacked(t, l, SchedulerOptions{}, one, two)
		defer labs[0].s.Close()
		synctest.Wait()
		for k, b := range labs {
			b.read(t, 0, b.im.DataSize)
			b.sink.once(t)
			if m := b.Stats().Missing; m > 0 {
				t.Errorf("version %d: %d chunks are missing", k, m)
			}
		}
		first, second := labs[0].Stats(), labs[1].Stats()
		if want := changed(two, one); first.Fetched != int64(len(one.blob)) || second.Fetched != want {
			t.Errorf("fetched %d and %d bytes, want %d and %d", first.Fetched, second.Fetched, len(one.blob), want)
		}
		if want := int64(len(two.blob)) - second.Fetched; first.Copied != 0 || second.Copied != want {
			t.Errorf("copied %d and %d bytes, want none and %d", first.Copied, second.Copied, want)
		}
		if second.Written != first.Written {
			t.Errorf("wrote %d bytes, want %d", second.Written, first.Written)
		}
	})
}

// A layer that has a file twice has it fetched once, also if both are read at the same time.
func TestWhatIsOnItsWayElsewhereIsWaitedFor(t *testing.T) {
	var entries []entry
	for _, dir := range []string{"a", "b"} {
		for i := range 20 {
			e := text(fmt.Sprintf("%d", i), 100_000)
			e.name = dir + "/" + e.name
			entries = append(entries, e)
		}
	}
	im := treeOf(t, entries...)
	synctest.Test(t, func(t *testing.T) {
		b := openPacked(t, dsl(), SchedulerOptions{}, im)[0]
		defer b.s.Close()
		synctest.Wait()
		var readers sync.WaitGroup
		for _, dir := range []string{"a", "b"} {
			readers.Go(func() {
				for i := range 20 {
					b.readPath(t, fmt.Sprintf("%s/%d", dir, i))
				}
			})
		}
		readers.Wait()
		b.sink.once(t)
		st := b.Stats()
		if st.Missing > 0 || st.Fetched != st.Copied || st.Fetched != int64(len(im.blob)/2) {
			t.Errorf("%+v, want half of %d bytes fetched", st, len(im.blob))
		}
	})
}

// shaky is a sink that reads other bytes than were written.
type shaky struct {
	*memory
	err error
}

func (s *shaky) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.memory.ReadAt(p, off)
	p[n/2] ^= 1
	return n, errors.Join(err, s.err)
}

func TestACopyThatIsNotRightIsFetched(t *testing.T) {
	one, two := version(t, 1), version(t, 2)
	for name, err := range map[string]error{"other bytes": nil, "an error": errors.New("bad block")} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := dsl()
				s := NewScheduler(SchedulerOptions{})
				defer s.Close()
				a := &lab{s: s, im: one, link: l, from: l.serve(one), sink: newMemory(one)}
				a.Filler = s.Open(one.Layer, a.from, &shaky{a.sink, err}, LayerOptions{Name: "sha256:shaky", Packed: packed(t, one.Layer)})
				a.read(t, 0, one.DataSize)
				b := openIn(t, s, l, two)
				synctest.Wait()
				b.read(t, 0, two.DataSize)
				b.sink.once(t)
				if st := b.Stats(); st.Missing+st.Copied+st.Corrupt+st.Errors != 0 || st.Fetched != int64(len(two.blob)) {
					t.Errorf("%+v, want all of %d bytes fetched, and no error", st, len(two.blob))
				}
			})
		})
	}
}

// What somebody waits for doesn't wait for background work, though that brings the same bytes.
func TestACopyIsAsUrgentAsItsReader(t *testing.T) {
	one, two := version(t, 1), version(t, 2)
	big := treeOf(t, text("big", 20<<20))
	synctest.Test(t, func(t *testing.T) {
		l := &link{rate: 2e6, rtt: 20 * time.Millisecond}
		labs := openPacked(t, l, SchedulerOptions{}, big, one, two)
		defer labs[0].s.Close()
		synctest.Wait()
		labs[0].Prefetch(0, big.DataSize)
		labs[1].Prefetch(0, one.DataSize)
		i, err := two.Lookup("usr/lib/49")
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := labs[2].Fill(t.Context(), two.Inodes[i].Data, two.Inodes[i].Size); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d > 200*time.Millisecond {
			t.Errorf("a file of 10 kB took %s, behind what nobody waits for", d)
		}
		if n := labs[2].Stats().Fetched; n > 0 {
			t.Errorf("fetched %d bytes that were on their way", n)
		}
	})
}

// A layer may be closed while others copy from it or wait for what it fetches.
func TestClosingALayerThatOthersCopyFrom(t *testing.T) {
	one, two := version(t, 1), version(t, 2)
	for _, after := range []time.Duration{0, 30 * time.Millisecond, 45 * time.Millisecond, time.Second} {
		t.Run(after.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &link{rate: 5e6, rtt: 20 * time.Millisecond}
				labs := openPacked(t, l, SchedulerOptions{}, one, two)
				defer labs[0].s.Close()
				synctest.Wait()
				var wg sync.WaitGroup
				wg.Go(func() { _ = labs[0].Fill(context.Background(), 0, one.DataSize) })
				time.Sleep(after)
				wg.Go(func() { labs[1].read(t, 0, two.DataSize) })
				synctest.Wait()
				wg.Go(func() { labs[0].Close() })
				wg.Wait()
				if m := labs[1].Stats().Missing; m > 0 {
					t.Errorf("%d chunks are missing", m)
				}
				labs[1].sink.once(t)
				s := labs[0].s
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.copies != 0 || s.held != 0 || s.waiting != 0 {
					t.Errorf("left are %d copies, %d bytes held, %d waiting", s.copies, s.held, s.waiting)
				}
			})
		})
	}
}

// All of a layer is had by background work, what is elsewhere without a request.
func TestBackgroundWorkCopies(t *testing.T) {
	one, two := version(t, 1), version(t, 2)
	synctest.Test(t, func(t *testing.T) {
		labs := openPacked(t, dsl(), SchedulerOptions{Background: true}, one, two)
		defer labs[0].s.Close()
		synctest.Wait()
		labs[0].read(t, 0, one.DataSize)
		labs[1].readHead(t, "usr/lib/00")
		time.Sleep(time.Minute)
		if st := labs[1].Stats(); st.Missing > 0 || st.Fetched != changed(two, one) {
			t.Errorf("%+v, want %d bytes fetched", st, changed(two, one))
		}
	})
}

// What needn't be fetched and is small doesn't make a request end.
func TestRequestsGoOnBehindWhatIsElsewhere(t *testing.T) {
	var some, all []entry
	for i := range 200 {
		e := text(fmt.Sprintf("usr/share/%03d", i), 1000)
		if all = append(all, e); i%5 == 2 {
			some = append(some, e)
		}
	}
	one, two := treeOf(t, some...), treeOf(t, all...)
	synctest.Test(t, func(t *testing.T) {
		labs := openPacked(t, dsl(), SchedulerOptions{}, one, two)
		defer labs[0].s.Close()
		synctest.Wait()
		labs[0].read(t, 0, one.DataSize)
		b := labs[1]
		b.Prefetch(0, two.DataSize)
		b.read(t, 0, two.DataSize)
		b.sink.once(t)
		if st := b.Stats(); st.Requests > 8 || st.Copied == 0 || st.Missing > 0 {
			t.Errorf("%+v, want at most 8 requests for 200 kB", st)
		}
	})
}
