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
}

// stream is one sequential read.
type stream struct {
	at      int64     // where its reader will go on
	window  int64     // bytes to ask for next
	end     int64     // where the last window ends
	windows []*window // contiguous, up to end
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
	i := slices.IndexFunc(r.streams, func(s *stream) bool { return s.at == off })
	if i >= 0 && slices.ContainsFunc(r.streams[i].windows, (*window).failed) {
		// What made a window fail may be over: start anew.
		r.streams = slices.Delete(r.streams, i, i+1)
		i = -1
	}
	if i < 0 {
		r.follow(&stream{at: off + n, window: min(n, r.opt.MaxWindow), end: off + n})
		r.mu.Unlock()
		body, err := r.next.Fetch(ctx, off, n)
		r.mu.Lock()
		return body, err
	}
	s := r.streams[i]
	r.streams = append(slices.Delete(r.streams, i, i+1), s)

	s.at = off + n
	s.windows = slices.DeleteFunc(s.windows, func(w *window) bool { return w.off+w.n <= off })
	for s.end < min(s.at+s.window, r.size) {
		r.open(s)
	}
	return &body{ctx: ctx, next: r.next, windows: slices.Clone(s.windows), off: off, end: off + n}, nil
}

// follow adds a stream, in the place of the one that wasn't used for longest.
func (r *Readahead) follow(s *stream) {
	if len(r.streams) == r.opt.Streams {
		for _, w := range r.streams[0].windows {
			w.abandon()
		}
		r.streams = slices.Delete(r.streams, 0, 1)
	}
	r.streams = append(r.streams, s)
}

// open asks for the stream's next window.
func (r *Readahead) open(s *stream) {
	n := min(s.window, r.size-s.end)
	ctx, cancel := context.WithCancelCause(r.ctx)
	w := &window{off: s.end, n: n, cancel: cancel, more: make(chan struct{})}
	s.windows = append(s.windows, w)
	s.end += n
	s.window = min(2*s.window, r.opt.MaxWindow)
	r.wg.Go(func() { w.fill(ctx, r.next) })
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
