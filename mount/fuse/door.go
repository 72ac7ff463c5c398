// Package fuse is the door for where the kernel door is not to be had: lazy layers as FUSE filesystems whose content arrives when it is read.
//
// # Concept
//
// A layer never changes, so there is little to do. A node's number is its index in [layer.Layer.Inodes] and one, the
// root's is 1 as the protocol wants it. Any request is answered from the layer alone: nothing is counted, looked up or
// locked, and what the kernel forgets, or asks for again after having forgotten it, needs no bookkeeping. Requests run in
// parallel, each in a goroutine, and there are never more of these than reads that wait and a few. A read asks the layer's
// [Filler] and then has the kernel take the bytes from the data file, by splice(2) unless they are few.
//
// What the kernel has heard once it keeps: names, names that don't exist, attributes, directories, symlinks and pages. Open, close and
// access are not asked for at all. What is read of a complete layer isn't kept in memory twice (package mount/behind).
//
// # What becomes of a layer
//
// The same as in package mount/erofs: hardlinks have one inode number, whiteouts are character devices 0:0, opaque
// directories have trusted.overlay.opaque (user.overlay.opaque, see [MountOptions]), times keep their nanoseconds. Permissions are checked by the kernel.
//
// # Guarantees
//
// A read is answered with bytes only after Fill has returned nil; else the reader gets EIO, and a later read asks again. A read that a
// signal interrupts ends with EINTR if the kernel asks for that, which it does for O_DIRECT, not for reads into the page cache;
// those end by a fatal signal. What Fill has begun is the Filler's to go on with.
//
// No read returns zeros in place of missing bytes when the daemon is gone. The kernel ends the connection when nobody has its descriptor,
// and it's only the daemon that has it, since it isn't inherited: what waits and what comes later gets ENOTCONN or ECONNABORTED. A daemon that waits
// for itself when it's killed, as it reads a layer or mounts an overlay of one, would never be gone: so each Door has a guardian, a process
// of its own ([GuardianMain]), which ends the mounts' connections then. The next [Open] waits for it, and detaches the mounts that are left.
//
// # Failure modes
//
// The daemon must not map files of its own mounts into memory, nor run programs from them or in them: both wait for the
// daemon's own goroutines in a state in which it may not be able to run them. Reading is fine.
//
// Unmounting ends the connection, whoever still uses it, as an overlayfs mount or by an open file. Without
// CAP_SYS_ADMIN that needs /sys/fs/fuse/connections; where this is missing too, what is used goes on to be served, by
// the metadata alone: reads are EIO.
//
// # Why not
//
//   - FUSE passthrough (Linux 6.9), by which the kernel reads a file without asking us, is for whole files from their
//     beginning on: what it's told of a file is a descriptor, and no offset (struct fuse_backing_map, in Linux 6.18). Those of a layer are ranges of one
//     data file. It also needs an open for each file.
//   - Requests of 1 MiB don't fit into a pipe together with their header, and the kernel's readahead asks for 128 KiB at most. More of it would fetch
//     what nobody wants, and each layer's goroutines have buffers for the largest request. With 256 KiB, bytes that are there were read about 1.5 times as fast.
//   - go-fuse's package fs keeps a tree of nodes, with locks and counts, next to the tree that a layer is.
//
// Needed are /dev/fuse and either CAP_SYS_ADMIN in the user namespace or fusermount3. [Probe] tries all that.
package fuse

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/behind"
)

// A Filler makes content arrive. It is called from many goroutines at once.
type Filler interface {
	// Fill returns nil when n bytes at off, of the data space, are in the data file. It returns early when ctx ends.
	Fill(ctx context.Context, off, n int64) error
}

// Options configure a Door.
type Options struct {
	// Root is the directory that all mounts are below. It is the Door's own: mounts of an earlier Door that are found in it when it
	// is opened are detached.
	Root string
	// Denied, if set, is told of reads that got EIO: where the layer is mounted, the range, and why. It's called before the reader is
	// woken.
	Denied func(target string, off, n int64, err error)
	// Notice, if set, is told of what else goes wrong in serving a mount, and has no caller to tell it to.
	Notice func(target string, err error)

	// Of tests.
	helper   bool // mount by fusermount3
	noSplice bool
	wrap     func(gofuse.RawFileSystem) gofuse.RawFileSystem
}

var (
	// ErrClosed is why reads fail that wait while the Door is closed.
	ErrClosed = errors.New("the FUSE door is closed")
	// ErrUnmounted is why reads fail that wait while a layer is unmounted.
	ErrUnmounted = errors.New("the layer is not mounted any more")
)

// A Door is the FUSE mounts of a daemon. Its methods are safe for concurrent use.
type Door struct {
	opt      Options
	guard    *guard
	lifetime context.Context //nolint:containedctx // of the mounts
	end      context.CancelCauseFunc

	loop   sync.WaitGroup
	ending sync.Once
	mu     sync.Mutex
	mounts map[string]*Mount // by target
	closed bool
}

// Open waits for the end of an earlier daemon's guardian, detaches what that daemon left below Options.Root, and starts a guardian.
func Open(opt Options) (*Door, error) {
	root, err := filepath.EvalSymlinks(opt.Root)
	if err != nil {
		return nil, fmt.Errorf("open FUSE door: %w", err)
	}
	if opt.Root, err = filepath.Abs(root); err != nil {
		return nil, fmt.Errorf("open FUSE door: %w", err)
	}
	lock, err := lockRoot(opt.Root)
	if err != nil {
		return nil, fmt.Errorf("open FUSE door: %w", err)
	}
	guard, err := startGuard(opt.Root, lock)
	if err == nil {
		if err = detachBelow(opt.Root); err != nil {
			guard.end()
		}
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("open FUSE door: %w", err)
	}
	d := &Door{opt: opt, guard: guard, mounts: make(map[string]*Mount)}
	d.lifetime, d.end = context.WithCancelCause(context.Background())
	d.loop.Go(func() { behind.Drop(d.lifetime, d.look) })
	return d, nil
}

// look has pages dropped behind the readers of complete layers.
func (d *Door) look() (grown bool) {
	for _, m := range d.list() {
		grown = m.look() || grown
	}
	return grown
}

func (d *Door) list() (mounts []*Mount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m != nil {
			mounts = append(mounts, m)
		}
	}
	return mounts
}

// Close ends what waits, unmounts, and waits for the Fillers to return, for the goroutines that serve, and for the guardian.
func (d *Door) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	mounts := d.list()
	d.end(ErrClosed)
	d.loop.Wait()

	var errs []error
	for _, m := range mounts {
		errs = append(errs, m.Unmount())
	}
	d.ending.Do(d.guard.end)
	return errors.Join(errs...)
}

// reserve makes a target the caller's.
func (d *Door) reserve(target string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	if _, ok := d.mounts[target]; ok {
		return unix.EBUSY
	}
	d.mounts[target] = nil
	return nil
}

// settle puts a mount in its reserved place, or frees that if m is nil. It reports whether the Door is open.
func (d *Door) settle(target string, m *Mount) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m == nil {
		delete(d.mounts, target)
	} else {
		d.mounts[target] = m
	}
	return !d.closed
}

func (d *Door) denied(target string, off, n int64, err error) {
	if d.opt.Denied != nil {
		d.opt.Denied(target, off, n, err)
	}
}
