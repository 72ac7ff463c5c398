package fill

import (
	"testing"
	"testing/synctest"
	"time"
)

// Two places of a library are enough to know that it's linked, after which it's read all over, however large it is.
func TestALargeLibraryComesWhole(t *testing.T) {
	const frames = program - 1
	im := imageOf(t, 1<<20, frames<<20, 16<<20)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		b.binary.set(0)
		for _, at := range []int64{0, 5 << 20} {
			b.read(t, at, 1)
		}
		time.Sleep(time.Second)
		for i := range frames {
			if !b.sink.Have(i) {
				t.Errorf("frame %d was not fetched", i)
			}
		}
	})
}

// Who reads a large file here and there, and happens to come to the frame behind another one, doesn't read it from front to back.
func TestHereAndThereIsNotFrontToBack(t *testing.T) {
	im := imageOf(t, 1<<20, 40<<20)
	synctest.Test(t, func(t *testing.T) {
		l := dsl()
		b := newLab(t, l, im, SchedulerOptions{})
		defer b.s.Close()
		for _, frame := range []int64{14, 13, 12, 15} {
			b.read(t, frame<<20, 1)
		}
		time.Sleep(time.Second)
		if _, _, sent := l.figures(); sent > 45<<17 {
			t.Errorf("%d bytes were fetched for 4 frames of 1 MiB", sent)
		}
		b.read(t, 16<<20, 1)
		time.Sleep(time.Second)
		if !b.sink.Have(17) {
			t.Error("nothing was read ahead of who goes on")
		}
	})
}
