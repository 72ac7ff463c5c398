package fuse

import (
	"context"
	"fmt"
	"sync"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
)

// Open needs nothing: the kernel takes ENOSYS for success, forever.
func (t *tree) Open(_ <-chan struct{}, _ *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	if t.noOpen {
		return gofuse.ENOSYS
	}
	out.OpenFlags = gofuse.FOPEN_KEEP_CACHE
	return gofuse.OK
}

// Flush comes with close(2), until it is said not to.
func (t *tree) Flush(<-chan struct{}, *gofuse.FlushIn) gofuse.Status { return gofuse.ENOSYS }

// Read has a range arrive, and the kernel take it from the data file.
func (t *tree) Read(cancel <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	file := t.inode(in.NodeId)
	if status := t.sound(gofuse.OK); !status.Ok() {
		return nil, status
	}
	off := int64(in.Offset)
	n := min(int64(in.Size), file.Size-off)
	if n <= 0 {
		return gofuse.ReadResultData(nil), gofuse.OK
	}
	off += file.Data
	if !t.m.complete.Load() {
		if status := t.m.demand(cancel, off, n); !status.Ok() {
			return nil, status
		}
	}
	result, err := t.m.content(buf, off, int(n))
	if err != nil {
		t.m.d.denied(t.m.opt.Target, off, n, fmt.Errorf("read %s: %w", t.m.opt.Data.Name(), err))
		return nil, gofuse.EIO
	}
	return result, gofuse.OK
}

// demand has n bytes of the data space at off arrive.
func (m *Mount) demand(interrupt <-chan struct{}, off, n int64) gofuse.Status {
	ctx := &readContext{Context: m.lifetime, m: m, interrupt: interrupt}
	defer ctx.end()
	err := m.fill(ctx, off, n)
	if err == nil {
		return gofuse.OK
	}
	if ctx.interrupted() && m.lifetime.Err() == nil {
		return gofuse.EINTR
	}
	m.d.denied(m.opt.Target, off, n, err)
	return gofuse.EIO
}

// A readContext ends with the mount, or when a read is interrupted. Most reads wait for nothing and so never ask for Done,
// which needs a goroutine.
type readContext struct {
	context.Context
	m         *Mount
	interrupt <-chan struct{}

	once       sync.Once
	done, over chan struct{}
}

func (c *readContext) interrupted() bool {
	select {
	case <-c.interrupt:
		return true
	default:
		return false
	}
}

// Done is closed when the read is interrupted, or the mount ends.
func (c *readContext) Done() <-chan struct{} {
	c.once.Do(func() {
		c.done, c.over = make(chan struct{}), make(chan struct{})
		c.m.calls.Go(func() { // under a call, whose count keeps it from being waited for
			select {
			case <-c.interrupt:
				close(c.done)
			case <-c.Context.Done():
				close(c.done)
			case <-c.over:
			}
		})
	})
	return c.done
}

// Err says why Done is closed.
func (c *readContext) Err() error {
	if c.interrupted() {
		return context.Canceled
	}
	return c.Context.Err()
}

// end lets the goroutine go.
func (c *readContext) end() {
	c.once.Do(func() {})
	if c.over != nil {
		close(c.over)
	}
}
