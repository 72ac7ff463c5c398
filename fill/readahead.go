package fill

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
)

// Fetcher reads a range of a blob. blob.Reader is one.
type Fetcher interface {
	Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// Options tune a Readahead. The zero value works.
type Options struct {
	// MaxWindow is the largest number of bytes asked for ahead in one request.
	// 0 means 2 MiB: what a link of 200 Mbit/s carries in four round trips of 20 ms.
	MaxWindow int64
	// Streams is how many sequential reads are followed at the same time, the
	// least recently used being forgotten. 0 means 8.
	Streams int
}

const (
	defaultMaxWindow = 2 << 20
	defaultStreams   = 8

	// maxBehind is how much of what was fetched ahead and not asked for is kept
	// behind its reader, in windows of the largest size.
	maxBehind = 4
)

var (
	errClosed    = errors.New("readahead is closed")
	errAbandoned = errors.New("no sequential read expects these bytes any more")
)

// Readahead fetches ahead of sequential reads of one blob. Make it with [New].
type Readahead struct {
	next   Fetcher
	size   int64
	opt    Options
	ctx    context.Context // of the windows
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	streams []*stream // most recently used last
	windows []*window // oldest first, disjoint
	asked   spans     // what readers have asked for, and have
}

// stream is one sequential read.
type stream struct {
	at    int64 // where its reader will go on
	ahead int64 // bytes to have on the way from there
}

// New returns a Readahead over a blob of size bytes.
func New(next Fetcher, size int64, opt Options) *Readahead {
	if opt.MaxWindow <= 0 {
		opt.MaxWindow = defaultMaxWindow
	}
	if opt.Streams <= 0 {
		opt.Streams = defaultStreams
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	return &Readahead{next: next, size: size, opt: opt, ctx: ctx, cancel: cancel}
}

// Fetch returns the n bytes at off, as Fetcher does. ctx bounds the wait for
// bytes, not the windows which others may wait for too.
func (r *Readahead) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errClosed
	}
	// What made a window fail may be over: who needs it asks anew.
	r.windows = slices.DeleteFunc(r.windows, (*window).failed)

	end := off + n
	i := slices.IndexFunc(r.streams, func(s *stream) bool {
		// Skipping over some of what was fetched ahead is going on, too.
		return s.at == off || s.at < off && off < r.past(s.at)
	})
	switch {
	case i >= 0:
		s := r.streams[i]
		r.streams = append(slices.Delete(r.streams, i, i+1), s)
		r.ahead(s, off, end)
		r.asked.add(off, end)
		s.at = r.asked.past(end)
	default:
		r.asked.add(off, end)
		r.follow(&stream{at: r.asked.past(end), ahead: min(n, r.opt.MaxWindow)})
	}
	held := r.run(off)
	r.trim()
	if len(held) == 0 {
		r.mu.Unlock()
		body, err := r.next.Fetch(ctx, off, n)
		r.mu.Lock()
		return body, err
	}
	return &body{ctx: ctx, next: r.next, windows: held, off: off, end: end}, nil
}

// ahead asks for what comes after a sequential read of the range from off up to end, and
// for the range itself if that isn't on its way.
func (r *Readahead) ahead(s *stream, off, end int64) {
	from, to := r.past(off), min(end+s.ahead, r.size)
	if from >= to {
		return
	}
	// A window is no smaller than the last one, and leaves out what readers have.
	to = min(max(to, from+s.ahead), r.size, r.asked.next(from))
	for _, w := range r.windows {
		if w.off > from {
			to = min(to, w.off)
		}
	}
	s.ahead = min(2*s.ahead, r.opt.MaxWindow)
	ctx, cancel := context.WithCancelCause(r.ctx)
	w := &window{owner: s, off: from, n: to - from, cancel: cancel, more: make(chan struct{})}
	r.windows = append(r.windows, w)
	r.wg.Go(func() { w.fill(ctx, r.next) })
}

// past returns the first position from pos on that is in no window and that no reader has asked for.
func (r *Readahead) past(pos int64) int64 {
	for {
		was := pos
		pos = r.asked.past(pos)
		for _, w := range r.windows {
			if w.has(pos) {
				pos = w.off + w.n
			}
		}
		if pos == was {
			return pos
		}
	}
}

// run returns the windows that hold the bytes from off on, as far as they go without a gap.
func (r *Readahead) run(off int64) (held []*window) {
	for {
		i := slices.IndexFunc(r.windows, func(w *window) bool { return w.has(off) })
		if i < 0 {
			return held
		}
		held = append(held, r.windows[i])
		off = r.windows[i].off + r.windows[i].n
	}
}

// trim forgets windows that have been asked for from end to end, and the oldest of those that
// their readers have left behind if these hold too much.
func (r *Readahead) trim() {
	var behind int64
	left := func(w *window) bool { return !slices.Contains(r.streams, w.owner) || w.off+w.n <= w.owner.at }
	r.windows = slices.DeleteFunc(r.windows, func(w *window) bool {
		if r.asked.has(w.off, w.off+w.n) {
			return true // who asked reads it
		}
		if left(w) {
			behind += w.n
		}
		return false
	})
	r.windows = slices.DeleteFunc(r.windows, func(w *window) bool {
		forget := behind > maxBehind*r.opt.MaxWindow && left(w)
		if forget {
			behind -= w.n
			w.abandon()
		}
		return forget
	})
}

// follow adds a stream, in the place of the one that wasn't used for longest.
func (r *Readahead) follow(s *stream) {
	if len(r.streams) == r.opt.Streams {
		// What has arrived for it stays a while; what hasn't nobody waits for.
		r.windows = slices.DeleteFunc(r.windows, func(w *window) bool {
			forget := w.owner == r.streams[0] && !w.complete()
			if forget {
				w.abandon()
			}
			return forget
		})
		r.streams = slices.Delete(r.streams, 0, 1)
	}
	r.streams = append(r.streams, s)
}

// Forget drops what was fetched and is held: its reader has found it corrupt, and is
// going to ask again.
func (r *Readahead) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range r.windows {
		w.abandon()
	}
	r.windows, r.streams, r.asked = nil, nil, nil
}

// Err returns an error after Close, nil before.
func (r *Readahead) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errClosed
	}
	return nil
}

// Close cancels what is under way and waits for it. Reads of it fail.
func (r *Readahead) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel(errClosed)
	r.wg.Wait()
	return nil
}

// body reads a range out of windows.
type body struct {
	ctx      context.Context //nolint:containedctx // an io.Reader has no other way to be cancelled
	next     Fetcher
	windows  []*window
	off, end int64
	direct   io.ReadCloser // the rest of the range, if its stream was forgotten
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.off >= b.end {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), b.end-b.off)]
	for len(b.windows) > 0 && b.windows[0].off+b.windows[0].n <= b.off {
		b.windows = b.windows[1:]
	}
	var n int
	err := errAbandoned
	if b.direct == nil && len(b.windows) > 0 {
		n, err = b.windows[0].readAt(b.ctx, p, b.off)
	}
	if errors.Is(err, errAbandoned) {
		if b.direct == nil {
			if b.direct, err = b.next.Fetch(b.ctx, b.off, b.end-b.off); err != nil {
				return 0, err
			}
		}
		n, err = b.direct.Read(p)
	}
	b.off += int64(n)
	return n, err
}

// Close implements io.Closer. The windows live on for the next read.
func (b *body) Close() error {
	if b.direct != nil {
		return b.direct.Close()
	}
	return nil
}
