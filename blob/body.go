package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second

	// crawl is the least that must arrive, in bytes, while a reader waits for as long as a host may be silent. A byte now and then
	// is as good as silence; a link that is merely slow brings more, also to each of many requests.
	crawl = 1 << 10
)

var errStalled = errors.New("no byte arrived")

// body is the body of a range request that asks again for what didn't arrive.
type body struct {
	r   *Reader
	ctx context.Context //nolint:containedctx // an io.Reader has no other way to be cancelled

	off, end int64 // what is still to come

	blamed string // the host that is asked last, as it has sent corrupt bytes; else ""
	whole  bool   // a host may answer with the whole blob: all were asked for the range

	opening  time.Duration // how long Fetch took, 0 once a byte has arrived
	deadline time.Time     // when a read without a byte is given up
	passed   int64         // how far attempts have come in front of off

	pause   time.Duration // before the next round of attempts, 0 if a byte arrived since the last
	hurried bool          // the last pause was cut short for the deadline
	last    error         // of the last request that failed

	attempt context.Context //nolint:containedctx // of rc; its cause tells why rc ended
	rc      io.ReadCloser
	host    string
	cancel  context.CancelCauseFunc
	stall   *time.Timer // runs while somebody waits
	err     error       // sticky

	// What the attempt has brought while its reader waited, since that was last looked at.
	brought int64
	waited  time.Duration
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.off >= b.end {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	p = p[:min(int64(len(p)), b.end-b.off)]
	start := time.Now()
	b.deadline = start.Add(b.r.opt.RetryFor - b.opening)
	for {
		if b.rc == nil {
			if err := b.open(); err != nil {
				b.err = b.fail(err)
				return 0, b.err
			}
		}
		b.stall.Reset(max(0, b.patience()))
		from, asked := b.at(), time.Now()
		n, err := b.rc.Read(p)
		b.stall.Stop()
		if n > 0 {
			b.off += int64(n)
			b.crawls(int64(n), time.Since(asked))
			wait := b.opening + time.Since(start)
			b.opening, b.pause, b.hurried = 0, 0, false
			if f := b.r.opt.Fetched; f != nil {
				f(b.r.dgst, int64(n), wait)
			}
			return n, nil
		}
		if err == nil {
			// Bytes have arrived, in front of those that are wanted. Only where none has been before, they are a reason to go on, or a
			// connection that always breaks there would be made again for ever.
			at := b.at()
			if at > b.passed {
				b.passed, b.deadline = at, time.Now().Add(b.r.opt.RetryFor)
			}
			b.crawls(at-from, time.Since(asked))
			continue
		}
		// Short body, reset or silence: go on with a new request from here.
		if cause := context.Cause(b.attempt); cause != nil {
			err = cause
			if errors.Is(err, errStalled) {
				b.r.avoid(b.host, avoidFor)
			}
		} else if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		b.last = fmt.Errorf("%s: %w", b.host, err)
		b.hangUp(err)
		b.retrying()
	}
}

// crawls ends an attempt that brings next to nothing: the rest is asked for anew, at another host first.
func (b *body) crawls(n int64, waited time.Duration) {
	b.brought += n
	b.waited += waited
	if b.waited < b.r.opt.Stall {
		return
	}
	if b.brought < crawl && b.off < b.end {
		b.r.avoid(b.host, avoidFor)
		b.last = fmt.Errorf("%s: only %d bytes arrived within %s", b.host, b.brought, b.waited.Round(time.Millisecond))
		b.hangUp(b.last)
		b.retrying()
	}
	b.brought, b.waited = 0, 0
}

// Source is the host that answered last: see Reader.Fetch.
func (b *body) Source() string { return b.host }

// Whole reports whether what comes is cut out of a whole blob: see Reader.AcceptWhole.
func (b *body) Whole() bool {
	_, ok := b.rc.(*cutting)
	return ok
}

// Close ends the request.
func (b *body) Close() error {
	b.hangUp(context.Canceled)
	if b.err == nil {
		b.err = io.ErrClosedPipe
	}
	return nil
}

func (b *body) hangUp(cause error) {
	if b.rc == nil {
		return
	}
	b.stall.Stop()
	if b.off < b.end {
		b.cancel(cause)
	}
	b.rc.Close()
	b.cancel(cause)
	b.rc = nil
}

// patience is how long the present attempt may be silent. What one that goes through a whole blob takes for that is no silence.
func (b *body) patience() time.Duration {
	left := time.Until(b.deadline)
	if c, ok := b.rc.(*cutting); ok && c.skip < b.off {
		left = b.r.opt.RetryFor
	}
	return min(b.r.opt.Stall, left)
}

// at is how far in the blob the present attempt has come.
func (b *body) at() int64 {
	if c, ok := b.rc.(*cutting); ok {
		return b.off - c.skip
	}
	return b.off
}

// open asks the hosts in their order, and again after a pause, until one answers
// with a body, no host can, or the deadline has passed.
func (b *body) open() error {
	var after time.Duration // the least that a host asked for by Retry-After, of those that are worth another round
	for {
		if err := b.rest(after); err != nil {
			return err
		}
		b.r.mu.Lock()
		hostsOf := b.r.hosts
		b.r.mu.Unlock()
		hosts, err := hostsOf()
		if err != nil {
			return err
		}
		if len(hosts) == 0 {
			return fmt.Errorf("no host serves %s", b.r.ref.Hostname())
		}
		hosts = b.r.order(hosts, b.blamed)
		b.whole = b.whole || len(hosts) == 1 && b.r.acceptsWhole()
		retry := false
		after = maxRetryAfter
		for i, h := range hosts {
			patience := b.patience()
			if patience <= 0 && b.last != nil {
				return b.last
			}
			err := b.try(h, patience)
			if err == nil {
				return nil
			}
			if context.Cause(b.ctx) != nil {
				return context.Cause(b.ctx)
			}
			b.last = err
			again := !permanent(err)
			if errors.Is(err, ErrNoRange) && b.r.acceptsWhole() {
				b.whole, again = true, true
			}
			if again {
				retry, after = true, min(after, pauseOf(err))
			}
			if retry || i < len(hosts)-1 {
				b.retrying()
			}
		}
		if !retry {
			return b.last
		}
	}
}

// rest waits before another round, longer from round to round as long as no byte
// arrives; the first is for free. What would outlast the deadline is cut short, once. The error is the last round's
// if there is no time for another, or the hosts have asked for more than there is.
func (b *body) rest(asked time.Duration) error {
	var wait time.Duration
	if b.pause > 0 {
		wait = b.pause + rand.N(b.pause)
	}
	wait = max(wait, asked)
	b.pause = min(max(2*b.pause, firstPause), maxPause)
	if wait == 0 {
		return nil
	}
	if left := time.Until(b.deadline); b.last != nil && wait > left {
		if asked > left || b.hurried {
			return b.last
		}
		wait, b.hurried = max(left/2, asked), true
	}
	select {
	case <-time.After(wait):
		return nil
	case <-b.ctx.Done():
		return context.Cause(b.ctx)
	}
}

// try sends one request under a watchdog which ends it when it is silent.
func (b *body) try(h docker.RegistryHost, patience time.Duration) error {
	if f := b.r.opt.Retried; f != nil && b.last != nil {
		f(b.r.dgst)
	}
	ctx, cancel := context.WithCancelCause(b.ctx)
	stall := time.AfterFunc(patience, func() {
		cancel(fmt.Errorf("%w within %s", errStalled, b.r.opt.Stall))
	})
	rc, err := b.r.get(ctx, h, b.off, b.end, b.whole)
	stall.Stop()
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errStalled) {
			err = fmt.Errorf("%s: %w", h.Host, cause)
		}
		after := pauseOf(err)
		if errors.Is(err, errStalled) || errors.Is(err, ErrNoRange) {
			after = avoidFor
		}
		b.r.avoid(h.Host, after)
		cancel(err)
		return err
	}
	b.attempt, b.rc, b.host, b.cancel, b.stall = ctx, rc, h.Host, cancel, stall
	b.brought, b.waited = 0, 0
	return nil
}

func (b *body) retrying() {
	if f := b.r.opt.Retrying; f != nil {
		f(b.r.dgst, b.last)
	}
}

func (b *body) fail(err error) error {
	err = fmt.Errorf("read blob %s of %s: bytes %d-%d: %w", b.r.dgst, b.r.ref.Locator, b.off, b.end-1, err)
	if f := b.r.opt.Failed; f != nil && context.Cause(b.ctx) == nil {
		f(b.r.dgst, err)
	}
	return err
}
