package fill

import (
	"context"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// wholes is a blob that is sent as a whole, which takes no longer here, as long as that is set.
type wholes struct {
	*served
	set atomic.Bool
}

func (w *wholes) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	body, err := w.served.Fetch(ctx, off, n)
	return wholeBody{body, w.set.Load()}, err
}

type wholeBody struct {
	io.ReadCloser
	whole bool
}

func (b wholeBody) Whole() bool { return b.whole }

// Where each request brings the whole blob, there is none that nobody waits for, until ranges are served again.
func TestWholeBlobsAreNotFetchedInTheBackground(t *testing.T) {
	im := imageOf(t, 64<<10, many(1000, 20_000)...)
	for name, guess := range map[string]func(*lab){
		"background": func(*lab) {},
		"a profile":  func(b *lab) { b.Prefetch(0, im.DataSize) },
		"a copy":     func(b *lab) { b.Expect([]Expected{{Paths: []string{"/"}}}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newLab(t, dsl(), im, SchedulerOptions{Background: true})
				defer b.s.Close()
				from := &wholes{served: b.from}
				from.set.Store(true)
				b.Filler.from = from
				guess(b)
				b.readFile(t, 0)
				time.Sleep(time.Minute)
				requests, _, _ := b.link.figures()
				if requests > 12 {
					t.Errorf("%d requests, nearly all for what nobody waits for", requests)
				}
				for i := 500; i < 600; i++ {
					b.readFile(t, i)
				}
				more, _, _ := b.link.figures()
				if more -= requests; more > 25 {
					t.Errorf("%d requests for 100 files one behind the other", more)
				}
				from.set.Store(false)
				b.readFile(t, 800)
				time.Sleep(2 * time.Minute)
				if st := b.Stats(); st.Missing > 0 {
					t.Errorf("%d chunks are missing though ranges are served again", st.Missing)
				}
				b.sink.once(t)
			})
		})
	}
}
