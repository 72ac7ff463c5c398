package fuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/behind"
)

// MountOptions say what to mount.
type MountOptions struct {
	// Layer is the metadata.
	Layer *layer.Layer
	// Data is the data file, which has its full length. It need not stay open: Mount keeps a descriptor of its own.
	Data *os.File
	// Target is an existing directory below Options.Root.
	Target string
	// Filler is called until Unmount has returned.
	Filler Filler
	// UserXattr marks opaque directories by user.overlay.opaque, for overlayfs mounts with the option userxattr.
	UserXattr bool
}

const (
	// maxRequest is the most that is read at once, in bytes. The kernel's readahead is as much.
	maxRequest = 128 << 10
	// maxReadahead is how many readahead requests of a layer wait at a time. The protocol's default of 12 would have a demand wait for others.
	maxReadahead = 256
)

// A Mount is a mounted layer. Its methods are safe for concurrent use.
type Mount struct {
	d      *Door
	opt    MountOptions
	data   int // descriptor of the data file, open while there is a server, then -1
	conn   connection
	served chan struct{} // closed when nothing is served any more

	lifetime context.Context //nolint:containedctx // of calls of the filler
	end      context.CancelCauseFunc
	complete atomic.Bool

	mu     sync.Mutex
	ended  bool
	behind *behind.File   // nil if the layer isn't complete
	calls  sync.WaitGroup // of the filler, and looks behind; added to under mu, until ended

	unmounting sync.Mutex
	unmounted  bool
}

// Mount mounts a layer. There can be one mount at a target.
func (d *Door) Mount(opt MountOptions) (*Mount, error) {
	m, err := d.mount(opt)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", opt.Target, err)
	}
	return m, nil
}

func (d *Door) mount(opt MountOptions) (*Mount, error) {
	if err := d.reserve(opt.Target); err != nil {
		return nil, err
	}
	m, err := d.serve(opt)
	if err != nil {
		d.settle(opt.Target, nil)
		return nil, err
	}
	if !d.settle(opt.Target, m) { // Close didn't know of it
		return nil, errors.Join(ErrClosed, m.Unmount())
	}
	return m, nil
}

// serve mounts a layer and starts to answer requests.
func (d *Door) serve(opt MountOptions) (*Mount, error) {
	m := &Mount{d: d, opt: opt, served: make(chan struct{})}
	var st unix.Stat_t
	if err := unix.Fstat(int(opt.Data.Fd()), &st); err != nil {
		return nil, fmt.Errorf("%s: %w", opt.Data.Name(), err)
	}
	// A reply that ends early is the end of the file to the kernel, and what's behind it zeros.
	if st.Size < opt.Layer.DataSize {
		return nil, fmt.Errorf("%s has %d bytes, want %d", opt.Data.Name(), st.Size, opt.Layer.DataSize)
	}
	var err error
	if m.data, err = unix.FcntlInt(opt.Data.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("%s: %w", opt.Data.Name(), err)
	}
	m.lifetime, m.end = context.WithCancelCause(d.lifetime)
	server, err := m.connect()
	if err != nil {
		m.end(ErrUnmounted)
		unix.Close(m.data)
		return nil, err
	}
	go func() {
		server.Serve()
		m.mu.Lock()
		unix.Close(m.data)
		m.data = -1
		m.mu.Unlock()
		close(m.served)
	}()
	m.conn.number = connectionNumber(opt.Target)
	greet(opt.Target)
	unflushed(opt.Target, opt.Layer)
	return m, nil
}

// connect mounts, and agrees with the kernel on the protocol.
func (m *Mount) connect() (*gofuse.Server, error) {
	dev, err := connect(m.opt.Target, m.d.opt.helper)
	if err != nil {
		return nil, err
	}
	t := newTree(m)
	var fs gofuse.RawFileSystem = t
	if m.d.opt.wrap != nil {
		fs = m.d.opt.wrap(t)
	}
	// By a number, go-fuse takes a descriptor over with which the mount has been made. Its own would be inherited by every
	// program that the daemon starts, and keep the connection alive when the daemon is dead.
	server, err := gofuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", dev), &gofuse.MountOptions{
		Name:                     fsName,
		MaxWrite:                 maxRequest, // and read
		MaxBackground:            maxReadahead,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		EnableAcl:                t.acls,
		// We pass no file through. With it the kernel takes this for a filesystem that is on another one, and the overlay that a step has as its
		// root can't be a layer of an overlay any more.
		DisabledCapabilities: gofuse.CAP_PASSTHROUGH,
		DisableSplice:        m.d.opt.noSplice,
		Logger:               log.New(notices{m}, "", 0),
	})
	if err != nil {
		return nil, errors.Join(err, m.conn.unmount(m.opt.Target))
	}
	return server, nil
}

// notices is where go-fuse logs to.
type notices struct{ m *Mount }

func (n notices) Write(p []byte) (int, error) {
	n.m.mu.Lock()
	ended := n.m.ended
	n.m.mu.Unlock()
	if tell := n.m.d.opt.Notice; tell != nil && !ended { // replies to a connection that was ended fail
		tell(n.m.opt.Target, errors.New(strings.TrimSpace(string(p))))
	}
	return len(p), nil
}

var _ io.Writer = notices{}

// fill asks the filler.
func (m *Mount) fill(ctx context.Context, off, n int64) error {
	m.mu.Lock()
	if m.ended {
		m.mu.Unlock()
		return ErrUnmounted
	}
	m.calls.Add(1)
	m.mu.Unlock()
	defer m.calls.Done()
	return m.opt.Filler.Fill(ctx, off, n)
}

// Complete says that no byte is missing any more, and none will be: from now on, the Filler isn't called.
func (m *Mount) Complete() error {
	m.complete.Store(true)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.behind == nil && m.data >= 0 && !m.ended {
		m.behind = behind.Open(m.data)
	}
	return nil
}

// look has pages dropped behind the readers of a complete layer. It reports whether anything was read from the disk since the last look. Only
// one goroutine calls it.
func (m *Mount) look() bool {
	m.mu.Lock()
	b := m.behind
	on := b != nil && !m.ended
	if on {
		m.calls.Add(1) // Unmount closes it
	}
	m.mu.Unlock()
	if !on {
		return false
	}
	defer m.calls.Done()
	return b.Look()
}

// Unmount unmounts the layer, and returns when no call of the Filler is under way, whose contexts end, and nothing is served any
// more. What still reads through it, an overlayfs mount or an open file, gets ENOTCONN. The data file may be removed.
func (m *Mount) Unmount() error {
	m.unmounting.Lock()
	defer m.unmounting.Unlock()
	if m.unmounted {
		return nil
	}
	m.mu.Lock()
	m.ended = true
	m.mu.Unlock()
	m.end(ErrUnmounted)
	m.calls.Wait()
	m.behind.Close()
	if err := m.conn.unmount(m.opt.Target); err != nil {
		return err
	}
	if m.conn.aborted {
		<-m.served
	}
	m.unmounted = true
	m.d.settle(m.opt.Target, nil)
	return nil
}
