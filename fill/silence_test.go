package fill

import (
	"context"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// mute is a registry that accepts requests and says nothing.
type mute struct{}

func (mute) Fetch(ctx context.Context, _, _ int64) (io.ReadCloser, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// Whoever reads from a registry that answers doesn't wait for one that doesn't.
func TestSilentRegistryHoldsUpNoOther(t *testing.T) {
	dead, alive := imageOf(t, 64<<10, many(80, 200_000)...), imageOf(t, 64<<10, many(20, 64<<10)...)
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(SchedulerOptions{})
		f := s.Open(dead.Layer, mute{}, newMemory(dead), LayerOptions{})
		b := openIn(t, s, dsl(), alive)
		var readers sync.WaitGroup
		defer readers.Wait()
		defer s.Close()
		for i := range 80 {
			readers.Go(func() { _ = f.Fill(context.Background(), dead.file(i).off, 1) })
		}
		synctest.Wait()
		for i := range 20 {
			start := time.Now()
			b.readFile(t, i)
			if d := time.Since(start); d > 2*longSilence {
				t.Errorf("file %d took %s", i, d)
			}
		}
	})
}

// What is on its way from such a registry is fetched from another one that has it.
func TestSilentRegistryIsNotWaitedForElsewhere(t *testing.T) {
	im := treeOf(t, text("usr/lib/big", 200_000))
	synctest.Test(t, func(t *testing.T) {
		s := NewScheduler(SchedulerOptions{})
		l := dsl()
		dead, b := openIn(t, s, l, im), openIn(t, s, l, im)
		dead.Filler.from = mute{}
		synctest.Wait()
		var reader sync.WaitGroup
		defer reader.Wait()
		defer s.Close()
		reader.Go(func() { _ = dead.Fill(context.Background(), 0, im.DataSize) })
		synctest.Wait()
		start := time.Now()
		b.read(t, 0, im.DataSize)
		if d := time.Since(start); d > 3*longSilence {
			t.Errorf("it took %s", d)
		}
		if st := b.Stats(); st.Fetched != int64(len(im.blob)) {
			t.Errorf("%+v, want %d bytes fetched", st, len(im.blob))
		}
	})
}
