package fill

import (
	"context"
	"io"
	"sync"
)

// window is a range that is fetched once and read while it arrives.
type window struct {
	owner  *stream
	off, n int64
	cancel context.CancelCauseFunc

	mu   sync.Mutex
	buf  []byte // what has arrived
	err  error  // why nothing more will
	done bool
	more chan struct{} // closed and replaced when any of these changes
}

// fill fetches the window.
func (w *window) fill(ctx context.Context, from Fetcher) {
	err := w.copy(ctx, from)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err, w.done = err, true
	close(w.more)
	w.cancel(err)
}

func (w *window) copy(ctx context.Context, from Fetcher) error {
	body, err := from.Fetch(ctx, w.off, w.n)
	if err != nil {
		return err
	}
	defer body.Close()
	buf := make([]byte, w.n)
	for have := 0; have < len(buf); {
		n, err := body.Read(buf[have:])
		have += n
		if n > 0 {
			w.mu.Lock()
			w.buf = buf[:have]
			close(w.more)
			w.more = make(chan struct{})
			w.mu.Unlock()
		}
		if err != nil && have < len(buf) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// readAt copies bytes at off, which is inside of the window, waiting for the first
// of them.
func (w *window) readAt(ctx context.Context, p []byte, off int64) (int, error) {
	for {
		w.mu.Lock()
		n := 0
		if at := off - w.off; at < int64(len(w.buf)) {
			n = copy(p, w.buf[at:])
		}
		err, done, more := w.err, w.done, w.more
		w.mu.Unlock()
		switch {
		case n > 0:
			return n, nil
		case err != nil:
			return 0, err
		case done:
			return 0, io.ErrUnexpectedEOF
		}
		select {
		case <-more:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// abandon stops fetching what nobody expects to be read any more.
func (w *window) abandon() { w.cancel(errAbandoned) }

// has reports whether the byte at off is in the window.
func (w *window) has(off int64) bool { return w.off <= off && off < w.off+w.n }

func (w *window) complete() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.done
}

func (w *window) failed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err != nil
}
