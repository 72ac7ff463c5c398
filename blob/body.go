package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

var errStalled = errors.New("no byte arrived")

// body is the body of a range request that asks again for what didn't arrive.
type body struct {
	r   *Reader
	ctx context.Context //nolint:containedctx // an io.Reader has no other way to be cancelled

	off, end int64 // what is still to come

	deadline time.Time // when a read without a byte is given up

	rc     io.ReadCloser
	cancel context.CancelCauseFunc
	stall  *time.Timer
	err    error // sticky
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
	b.deadline = start.Add(b.r.opt.RetryFor)
	for {
		if b.rc == nil {
			if err := b.open(); err != nil {
				b.err = b.fail(err)
				return 0, b.err
			}
		}
		b.stall.Reset(b.r.opt.Stall)
		n, err := b.rc.Read(p)
		if n > 0 {
			b.off += int64(n)
			if f := b.r.opt.Fetched; f != nil {
				f(b.r.dgst, int64(n), time.Since(start))
			}
			return n, nil
		}
		if err != nil {
			// Short body, reset or silence: go on with a new request from here.
			b.hangUp(err)
			if time.Now().After(b.deadline) {
				b.err = b.fail(err)
				return 0, b.err
			}
		}
	}
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

// open asks the hosts in their order, and again after a pause, until one answers
// with a body, no host can, or the deadline has passed.
func (b *body) open() error {
	var (
		last  error
		pause = firstPause
	)
	for {
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
		retry := false
		var after time.Duration
		for _, h := range hosts {
			err := b.try(func(ctx context.Context) (io.ReadCloser, error) {
				return b.r.get(ctx, h, b.off, b.end)
			})
			if err == nil {
				return nil
			}
			if context.Cause(b.ctx) != nil {
				return context.Cause(b.ctx)
			}
			last = err
			if !permanent(err) {
				retry = true
			}
			if se, ok := errors.AsType[*statusError](err); ok {
				after = max(after, se.after)
			}
		}
		wait := max(after, pause+rand.N(pause))
		if !retry || time.Now().Add(wait).After(b.deadline) {
			return last
		}
		pause = min(2*pause, maxPause)
		select {
		case <-time.After(wait):
		case <-b.ctx.Done():
			return context.Cause(b.ctx)
		}
	}
}

// try runs one attempt under a watchdog which ends it when it is silent.
func (b *body) try(get func(context.Context) (io.ReadCloser, error)) error {
	ctx, cancel := context.WithCancelCause(b.ctx)
	stall := time.AfterFunc(b.r.opt.Stall, func() {
		cancel(fmt.Errorf("%w in %s", errStalled, b.r.opt.Stall))
	})
	rc, err := get(ctx)
	if err != nil {
		stall.Stop()
		if cause := context.Cause(ctx); errors.Is(cause, errStalled) {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		cancel(err)
		return err
	}
	b.rc, b.cancel, b.stall = rc, cancel, stall
	return nil
}

func (b *body) fail(err error) error {
	err = fmt.Errorf("read blob %s of %s: bytes %d-%d: %w", b.r.dgst, b.r.ref.Locator, b.off, b.end-1, err)
	if f := b.r.opt.Failed; f != nil && context.Cause(b.ctx) == nil {
		f(b.r.dgst, err)
	}
	return err
}
