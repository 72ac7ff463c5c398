// Package erofs is the kernel door: lazy layers as file-backed EROFS mounts whose content arrives when it is read.
//
// A layer is two files: an image of its metadata, written by package image, and a sparse data file that the image
// points into. [Door.Mount] marks the data file for fanotify's pre-content events and mounts the image. From then on
// the kernel answers every metadata call and every read of its page cache by itself. A read that goes to the data file, hole or
// not, waits until the Door has answered an event with its range; the Door asks the layer's [Filler], and answers
// when the bytes are there. [Mount.Complete] takes the mark away when nothing is missing any more.
// From then on the Door sees to it that what was read isn't in memory twice (package mount/behind).
//
// # Descriptors of the data file
//
// Whether a descriptor raises events is decided when it's opened. One that was opened before the mark never does; one
// that was opened later does, for writes too: a Filler that wrote through it would wait for itself. [OpenData] opens
// one that never does, whenever. Through it reading, writing, punching holes and mapping are silent. Truncating is not:
// give the data file its length before it is mounted.
//
// # Guarantees
//
// An event is answered with success only after Fill has returned nil; else the reader gets EIO, and a later read asks again. A demand never
// waits for another: each has a goroutine, and there are no more of them than threads that read; but of those that wait, each takes a
// descriptor, and no more than a quarter of what the process may have are taken at a time.
//
// No read returns zeros in place of missing bytes when the daemon is gone. The kernel lets reads through when the last descriptor
// of a fanotify group is closed, so the guardian holds another: a process that the Door starts from its own executable
// ([GuardianMain]). When the daemon has ended, however that came about, the guardian answers waiting and later events with
// EIO, detaches the mounts below [Options.Root], and stays until nothing reads through them, as overlayfs mounts and open files can outlive them.
// The next [Open] takes the group over, so that what still reads is served again as soon as its layer is mounted again.
//
// # Failure modes
//
// If both the daemon and the guardian are killed, reads of missing bytes through mounts that are left over return zeros. The guardian asks
// not to be chosen when memory is out, and is started anew when it ends before the daemon does.
//
// The daemon must not map files of its own mounts into memory, nor run programs from them: a page fault that waits for an event
// holds locks of the process that would answer it. Reading is fine.
//
// Needed are Linux 6.14, CAP_SYS_ADMIN in the initial user namespace, /proc, and data files on ext4, xfs or btrfs.
// [Probe] tries all that.
package erofs

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/behind"
)

// A Filler makes content arrive. It is called from many goroutines at once.
type Filler interface {
	// Fill returns nil when n bytes at off, of the data space, are in the data file. It returns early when ctx ends. It must
	// not write by a descriptor that raises events: see OpenData.
	Fill(ctx context.Context, off, n int64) error
}

// Options configure a Door.
type Options struct {
	// Root is the directory that all mounts are below. It is the Door's own: EROFS mounts that are found in it when it
	// is opened are detached, and it holds the guardian's socket.
	Root string
	// Guardian is the program whose main calls GuardianMain; "" means the running one, even if its file was replaced.
	Guardian string
	// Denied, if set, is told of reads that got EIO: where the layer is mounted, the range, and why. It's called before the reader is
	// woken.
	Denied func(target string, off, n int64, err error)

	unguarded bool
}

var (
	// ErrClosed is why reads fail that wait while the Door is closed.
	ErrClosed = errors.New("the EROFS door is closed")
	// ErrUnmounted is why reads fail through what outlives a mount, such as overlayfs.
	ErrUnmounted = errors.New("the layer is not mounted any more")
)

// A Door is the fanotify group of a daemon, and the goroutines that answer its events.
type Door struct {
	opt      Options
	group    *group
	guard    *guard // nil if unguarded
	lifetime context.Context
	end      context.CancelCauseFunc
	loop     sync.WaitGroup
	answers  sync.WaitGroup

	// marks is held while a data file gets its mark, or loses it with its place in mounts. It's taken before mu.
	marks sync.Mutex

	mu     sync.Mutex
	mounts map[fileID]*Mount // by data file; lingering ones too
	closed bool
}

// Open makes a group, or takes over that of a daemon that has ended, and starts a guardian. It waits until the earlier
// guardian has denied what was waiting.
func Open(opt Options) (*Door, error) {
	root, err := filepath.EvalSymlinks(opt.Root)
	if err != nil {
		return nil, fmt.Errorf("open EROFS door: %w", err)
	}
	if opt.Root, err = filepath.Abs(root); err != nil {
		return nil, fmt.Errorf("open EROFS door: %w", err)
	}
	d := &Door{opt: opt, mounts: make(map[fileID]*Mount)}
	d.lifetime, d.end = context.WithCancelCause(context.Background())

	var old *estate
	if !opt.unguarded {
		if old, err = takeOver(opt.Root); err != nil {
			return nil, fmt.Errorf("open EROFS door: %w", err)
		}
		defer old.release()
		d.group = old.group
	}
	if d.group == nil {
		if d.group, err = newGroup(); err != nil {
			return nil, fmt.Errorf("open EROFS door: %w", err)
		}
	}
	if !opt.unguarded {
		if err := detachBelow(opt.Root); err != nil {
			d.group.Close()
			return nil, fmt.Errorf("open EROFS door: %w", err)
		}
		if d.guard, err = startGuard(opt, d.group); err != nil {
			d.group.Close()
			return nil, fmt.Errorf("open EROFS door: %w", err)
		}
		for _, f := range old.files {
			d.linger(f)
		}
		old.accept()
	}
	d.loop.Go(d.answerEvents)
	d.loop.Go(func() { behind.Drop(d.lifetime, d.look) })
	return d, nil
}

// linger remembers what an earlier daemon's mounts still read. Its mark is in the group that was taken over.
func (d *Door) linger(f watched) {
	m, err := d.open(MountOptions{Image: f.Image, Data: f.Data})
	if err != nil {
		return // removed meanwhile: reads are denied, as of any file that is unknown
	}
	m.state = lingering
	d.mounts[m.id] = m
	d.guard.watch(f)
}

// Close denies what waits, unmounts, and waits for the Fillers to return. What outlives its mount is left to the guardian;
// if nothing does, the guardian has ended too.
func (d *Door) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	d.end(ErrClosed)

	var errs []error
	for _, m := range d.snapshot() {
		if err := m.Unmount(); err != nil {
			errs = append(errs, err)
		}
	}
	d.group.stop()
	d.loop.Wait()
	d.answers.Wait()
	left := d.snapshot()
	for _, m := range left {
		m.close() // but not the mark
	}
	d.group.Close()
	if d.guard != nil {
		d.guard.end(len(left) == 0)
	}
	return errors.Join(errs...)
}

func (d *Door) snapshot() []*Mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]*Mount, 0, len(d.mounts))
	for _, m := range d.mounts {
		list = append(list, m)
	}
	return list
}

// look has pages dropped behind the readers of complete layers.
func (d *Door) look() (grown bool) {
	for _, m := range d.snapshot() {
		grown = m.look() || grown
	}
	return grown
}

// mount returns what a data file belongs to, or nil.
func (d *Door) mount(id fileID) *Mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mounts[id]
}

// answerEvents gives each event a goroutine. Those that would take too many descriptors are left with the kernel, where they wait, too: it
// denies what it has no descriptor for when it's asked for it.
func (d *Door) answerEvents() {
	turns := make(chan struct{}, max(1, maxDescriptors()/4))
	d.group.each(
		func(e event) {
			d.guard.numbers(e.fd)
			turns <- struct{}{}
			d.answers.Go(func() {
				d.answer(e)
				<-turns
			})
		},
		func(err error) { d.denied("", event{}, fmt.Errorf("take a read that waits from the kernel: %w", err)) },
	)
}

func (d *Door) answer(e event) {
	target, err := d.fill(e)
	if err != nil {
		d.denied(target, e, err)
	}
	d.group.answer(e.fd, err == nil)
	unix.Close(e.fd) // not before: the kernel knows the event by this number
}

func (d *Door) denied(target string, e event, err error) {
	if d.opt.Denied != nil {
		d.opt.Denied(target, e.off, e.n, err)
	}
}

// fill has the content of an event's range arrive.
func (d *Door) fill(e event) (target string, err error) {
	if e.err != nil {
		return "", e.err
	}
	id, size, err := identify(e.fd)
	if err != nil {
		return "", err
	}
	m := d.mount(id)
	if m == nil {
		return "", ErrUnmounted
	}
	// Readahead reaches behind the end.
	n := min(e.n, size-e.off)
	if n <= 0 {
		return m.opt.Target, nil
	}
	return m.opt.Target, m.fill(e.off, n)
}
