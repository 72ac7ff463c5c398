package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

func TestCorruptOnceIsFetchedAgain(t *testing.T) {
	im := imageOf(t, 256<<10, 1<<20, 100)
	for _, big := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			b := newLab(t, dsl(), im, SchedulerOptions{})
			defer b.s.Close()
			fr := im.Frames[2]
			file := 0
			if !big {
				fr, file = im.Frames[len(im.Frames)-1], 1
			}
			spoilt := false
			var mu sync.Mutex
			b.link.spoil = func(off int64, p []byte) {
				mu.Lock()
				defer mu.Unlock()
				if at := fr.Offset + fr.Size/2; !spoilt && off <= at && at < off+int64(len(p)) {
					p[at-off] ^= 1
					spoilt = true
				}
			}
			told := 0
			b.opt.Corrupt = func() { told++ }
			b.readFile(t, file)
			if st := b.Stats(); !spoilt || told != 1 || st.Corrupt != 1 || st.Retries != 1 || st.Errors != 0 {
				t.Errorf("%+v", st)
			}
			b.sink.once(t)
		})
	}
}

// mirrored is a blob that comes from a mirror up to an offset, and from there on from the registry.
type mirrored struct {
	*served
	until  int64
	blamed []string // by Refetch
}

func (m *mirrored) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	body, err := m.served.Fetch(ctx, off, n)
	return &mirroredBody{body, m, off}, err
}

func (m *mirrored) Refetch(ctx context.Context, off, n int64, from string) (io.ReadCloser, error) {
	m.blamed = append(m.blamed, from)
	return m.Fetch(ctx, off, n)
}

type mirroredBody struct {
	io.ReadCloser
	of *mirrored
	at int64
}

func (b *mirroredBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.at += int64(n)
	return n, err
}

func (b *mirroredBody) Source() string {
	if b.at > b.of.until {
		return "registry"
	}
	return "mirror"
}

func TestWhoHasSentCorruptBytesIsBlamed(t *testing.T) {
	im := imageOf(t, 64<<10, 1<<20)
	for frame, want := range map[int]string{4: "mirror", 6: "registry"} {
		synctest.Test(t, func(t *testing.T) {
			b := newLab(t, dsl(), im, SchedulerOptions{})
			defer b.s.Close()
			from := &mirrored{served: b.from, until: im.Frames[5].Offset + 40<<10}
			b.Filler.from = from
			var spoilt atomic.Bool
			b.link.spoil = func(off int64, p []byte) {
				if at := im.Frames[frame].Offset + 100; off <= at && at < off+int64(len(p)) && !spoilt.Swap(true) {
					p[at-off] ^= 1
				}
			}
			b.readFile(t, 0)
			if got := from.blamed; len(got) != 1 || got[0] != want {
				t.Errorf("frame %d: blamed are %q, want %q", frame, got, want)
			}
		})
	}
}

func TestCorruptTwiceIsAnErrorThatNamesItself(t *testing.T) {
	im := imageOf(t, 256<<10, 100, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		fr := im.Frames[3]
		b.link.spoil = func(off int64, p []byte) {
			if at := fr.Offset + fr.Size/2; off <= at && at < off+int64(len(p)) {
				p[at-off] ^= 1
			}
		}
		f := im.file(1)
		err := b.Fill(t.Context(), f.off+f.n/2+1, 1)
		bad, ok := errors.AsType[*CorruptError](err)
		if !ok || bad.File != "1" || bad.Chunk != 2 || bad.Layer != "sha256:test" {
			t.Fatalf("error %v", err)
		}
		if !strings.HasPrefix(err.Error(), "read 1 (layer sha256:test): chunk 2: ") {
			t.Errorf("error %q", err)
		}
		if b.sink.Have(3) {
			t.Error("a corrupt chunk was written")
		}
		b.link.spoil = nil
		b.readFile(t, 1) // nothing is remembered of it
	})
}

func TestFullDiskIsAnErrorUntilThereIsSpace(t *testing.T) {
	im := imageOf(t, 64<<10, many(10, 200_000)...)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{Background: true})
		defer b.s.Close()
		b.sink.fail = func(int) error { return syscall.ENOSPC }
		if err := b.Fill(t.Context(), 0, 1); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("error %v", err)
		}
		before, _, _ := b.link.figures()
		time.Sleep(10 * time.Second)
		if after, _, _ := b.link.figures(); after-before > 20 {
			t.Errorf("%d requests while there is no space", after-before)
		}
		b.sink.mu.Lock()
		b.sink.fail = nil
		b.sink.mu.Unlock()
		b.readFile(t, 0)
		time.Sleep(time.Minute)
		if b.Stats().Missing > 0 {
			t.Error("background work didn't go on")
		}
	})
}

func TestFailedFetchIsTriedAgainByTheNextRead(t *testing.T) {
	im := imageOf(t, 64<<10, 1000)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		gone := errors.New("registry.test answered 503")
		b.link.fail = func() error { return gone }
		err := b.Fill(t.Context(), 0, 1)
		if !errors.Is(err, gone) || !strings.HasPrefix(err.Error(), "read 0 (layer sha256:test): ") {
			t.Fatalf("error %v", err)
		}
		b.link.fail = nil
		b.readFile(t, 0)
	})
}

func TestCallerLeavesAndTheFetchGoesOn(t *testing.T) {
	im := imageOf(t, 1<<20, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		stop := errors.New("build cancelled")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(5*time.Millisecond, func() { cancel(stop) })
		start := time.Now()
		if err := b.Fill(ctx, 0, 1); !errors.Is(err, stop) || time.Since(start) != 5*time.Millisecond {
			t.Errorf("error %v after %s", err, time.Since(start))
		}
		b.readFile(t, 0)
		if n, _, _ := b.link.figures(); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

func TestCloseDuringFetch(t *testing.T) {
	im := imageOf(t, 256<<10, 20<<20)
	for _, after := range []time.Duration{0, time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond, 300 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			b := newLab(t, dsl(), im, SchedulerOptions{Background: true})
			errs := make(chan error, 1)
			go func() { errs <- b.Fill(context.Background(), 0, im.DataSize) }()
			time.Sleep(after)
			b.Close()
			b.Close()
			if err := <-errs; err == nil || !strings.Contains(err.Error(), "layer is closed") {
				t.Errorf("error %v", err)
			}
			b.s.Close()
			if err := b.Fill(t.Context(), im.DataSize-1, 1); err == nil {
				t.Error("Fill after Close")
			}
			if len(b.s.requests) != 0 || b.s.outstanding != 0 || b.s.held != 0 || b.s.waiting != 0 || len(b.flights) != 0 {
				t.Errorf("left: %d requests, %d bytes outstanding, %d held, %d waiting, %d flights", len(b.s.requests), b.s.outstanding, b.s.held, b.s.waiting, len(b.flights))
			}
		})
	}
}

// doubtful is a sink after an unclean stop.
type doubtful struct {
	*memory
	doubts bitmap
	wrong  int // a chunk that isn't what was written
}

func (d *doubtful) Doubtful() iter.Seq[int] {
	return func(yield func(int) bool) {
		for c := range d.im.Chunks {
			if d.doubts.has(c) && !yield(c) {
				return
			}
		}
	}
}

func (d *doubtful) Verify(chunk int) bool {
	if d.doubts.has(chunk) && chunk != d.wrong {
		d.have.set(chunk)
	}
	return d.Have(chunk)
}

func TestWhatIsInDoubtIsVerifiedRatherThanFetched(t *testing.T) {
	im := imageOf(t, 64<<10, many(20, 5000)...)
	synctest.Test(t, func(t *testing.T) {
		l := dsl()
		s := NewScheduler(SchedulerOptions{})
		defer s.Close()
		sink := &doubtful{newMemory(im), newBitmap(len(im.Chunks)), 7}
		for c := range 15 {
			sink.doubts.set(c)
		}
		from := l.serve(im)
		f := s.Open(im.Layer, from, sink, LayerOptions{})
		for i := range 10 {
			if err := f.Fill(t.Context(), im.file(i).off, 1); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		for _, a := range from.asked {
			for i := range 15 {
				if fr := im.Frames[i]; i != 7 && a.off < fr.End() && fr.Offset < a.end {
					t.Errorf("frame %d was fetched", i)
				}
			}
		}
		if !sink.Have(7) {
			t.Error("what was wrong is still missing")
		}
	})
}

// unreadable packs a layer. From a call of fail on, the disk doesn't give its tree back any more, until one of heal.
func unreadable(t *testing.T, l *layer.Layer) (packed *layer.Layer, fail, heal func()) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Error(err)
		}
	}
	name := filepath.Join(t.TempDir(), "tree")
	f, err := os.Create(name)
	check(err)
	t.Cleanup(func() { f.Close() })
	packed, err = l.Pack(f)
	check(err)
	tree, err := os.ReadFile(name)
	check(err)
	fail = func() { check(f.Truncate(0)) }
	heal = func() {
		_, err := f.WriteAt(tree, 0)
		check(err)
	}
	return packed, fail, heal
}

// A layer whose tree the disk doesn't give back any more can't be verified: that's nobody's corruption, and isn't fetched again.
func TestUnreadableTreeIsAnErrorThatSaysSo(t *testing.T) {
	im := imageOf(t, 256<<10, many(200, 1000)...)
	packed, fail, _ := unreadable(t, im.Layer)
	fail()
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		f := b.s.Open(im.Layer, b.from, b.sink, LayerOptions{Packed: packed})
		defer f.Close()
		err := f.Fill(t.Context(), 0, 1)
		if _, corrupt := errors.AsType[*CorruptError](err); corrupt || !errors.Is(err, layer.ErrUnreadable) {
			t.Errorf("error %v", err)
		}
		if st := f.Stats(); st.Corrupt != 0 || st.Retries != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// What is guessed by such a tree is nothing, rather than the daemon's end.
func TestUnreadableTreeEndsGuesses(t *testing.T) {
	im := imageOf(t, 64<<10, many(200, 1000)...)
	for name, guess := range map[string]func(*walk, place){
		"a walk":              func(w *walk, _ place) { w.ask(1<<20, 1<<20) },
		"a library":           func(_ *walk, file place) { file.need() },
		"a program":           func(_ *walk, file place) { file.start(linked) },
		"its arguments":       func(_ *walk, file place) { file.called([]string{"-c"}) },
		"a helper":            func(_ *walk, file place) { file.isHelper() },
		"what a program runs": func(_ *walk, file place) { file.f.run(map[place]bool{file: true}) },
		"what files mention":  func(_ *walk, file place) { document{f: file.f, inode: file.inode}.follow() },
	} {
		t.Run(name, func(t *testing.T) {
			packed, fail, _ := unreadable(t, im.Layer)
			synctest.Test(t, func(t *testing.T) {
				b := newLab(t, dsl(), im, SchedulerOptions{})
				defer b.s.Close()
				f := b.s.Open(im.Layer, b.from, b.sink, LayerOptions{Packed: packed})
				w := &walk{layers: view{f}, lists: &listings{}}
				if !w.seek(f, 0) {
					t.Fatal("the first file isn't found")
				}
				fail()
				guess(w, place{f, 100})
			})
		})
	}
}

// The disk may give back what it hasn't a moment before.
func TestListingOfATreeThatComesAndGoes(t *testing.T) {
	var entries []entry
	for i := range 4000 {
		entries = append(entries, text(fmt.Sprintf("%d/%d", i/40, i), 1))
	}
	im := treeOf(t, entries...)
	packed, fail, heal := unreadable(t, im.Layer)
	s := NewScheduler(SchedulerOptions{})
	defer s.Close()
	f := s.Open(im.Layer, dsl().serve(im), newMemory(im), LayerOptions{Packed: packed})
	var dirs []place
	for _, e := range im.Inodes[layer.Root].Entries {
		dirs = append(dirs, place{f, e.Inode})
	}
	done := make(chan struct{})
	var disk sync.WaitGroup
	disk.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(5 * time.Millisecond):
				fail()
				heal()
			}
		}
	})
	less := 0
	for start := time.Now(); time.Since(start) < time.Second; {
		if len(list(dirs)) < len(entries) {
			less++
		}
	}
	close(done)
	disk.Wait()
	if less == 0 {
		t.Error("nothing was ever unreadable")
	}
}
