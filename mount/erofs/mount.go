package erofs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/behind"
)

// MountOptions say what to mount.
type MountOptions struct {
	// Image is the path of the metadata image. Nothing else may keep it open: that's how it is known whether it's in use.
	Image string
	// Data is the path of the data file, which has its full length.
	Data string
	// Target is an existing directory below Options.Root.
	Target string
	// Filler is called until Unmount has returned.
	Filler Filler
}

// state is what reads of a data file come to.
type state int

const (
	live      state = iota // the filler is asked
	complete               // there is no mark
	lingering              // unmounted, but the superblock is in use: reads are denied
)

// A Mount is a mounted layer. Its methods are safe for concurrent use.
type Mount struct {
	d    *Door
	opt  MountOptions
	id   fileID
	data *os.File // with O_PATH: these two raise no events, and don't count as use
	img  *os.File

	lifetime context.Context
	end      context.CancelCauseFunc
	calls    sync.WaitGroup // of the filler; added to while the state is not lingering

	// Guarded by Door.mu.
	state   state
	mounted bool
	behind  *behind.File // nil if the layer isn't complete
}

// Mount mounts a layer. The same data file cannot be mounted twice at a time.
func (d *Door) Mount(opt MountOptions) (*Mount, error) {
	m, err := d.open(opt)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", opt.Target, err)
	}
	before, err := m.register()
	if err != nil {
		m.close()
		return nil, fmt.Errorf("mount %s: %w", opt.Target, err)
	}
	if err := m.mount(); err != nil {
		m.undo(before)
		return nil, fmt.Errorf("mount %s: %w", opt.Target, err)
	}
	if before != nil {
		before.close()
	}
	d.mu.Lock()
	m.mounted = true
	closed := d.closed
	d.mu.Unlock()
	if closed { // which has unmounted what it knew of
		return nil, errors.Join(fmt.Errorf("mount %s: %w", opt.Target, ErrClosed), m.Unmount())
	}
	return m, nil
}

// open finds out which files are meant.
func (d *Door) open(opt MountOptions) (*Mount, error) {
	m := &Mount{d: d, opt: opt}
	var err error
	if m.img, err = os.OpenFile(opt.Image, unix.O_PATH, 0); err != nil {
		return nil, err
	}
	if m.data, err = os.OpenFile(opt.Data, unix.O_PATH, 0); err != nil {
		m.img.Close()
		return nil, err
	}
	m.lifetime, m.end = context.WithCancelCause(d.lifetime)
	if m.id, _, err = identify(int(m.data.Fd())); err != nil {
		m.close()
		return nil, fmt.Errorf("%s: %w", opt.Data, err)
	}
	return m, nil
}

func (m *Mount) close() {
	m.end(ErrUnmounted)
	m.behind.Close()
	m.img.Close()
	m.data.Close()
}

// register makes m the one that events of its data file are for, and returns the lingering one that was before.
func (m *Mount) register() (before *Mount, err error) {
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	if m.d.closed {
		return nil, ErrClosed
	}
	before = m.d.mounts[m.id]
	if before != nil && before.state != lingering {
		return nil, fmt.Errorf("%s is mounted at %s: %w", m.opt.Data, before.opt.Target, unix.EBUSY)
	}
	m.d.mounts[m.id] = m
	return before, nil
}

func (m *Mount) mount() error {
	if err := m.mark(); err != nil {
		return err
	}
	// By number: an option ends at a comma, and this is the file that was marked. No other flag than read-only, as mounts are
	// also bound into containers, where set-id programs and devices are to be what they are in an unpacked layer.
	if err := unix.Mount(m.opt.Image, m.opt.Target, "erofs", unix.MS_RDONLY, "device="+procPath(m.data)); err != nil {
		return fmt.Errorf("mount %s as erofs: %w", m.opt.Image, err)
	}
	return nil
}

// mark has reads of the data file raise events. The kernel's descriptor of it does if the mark is there when it is opened.
func (m *Mount) mark() error {
	m.d.marks.Lock()
	defer m.d.marks.Unlock()
	// The guardian first: it has to know of what it may find itself alone with.
	m.d.guard.watch(watched{Image: m.opt.Image, Data: m.opt.Data})
	return m.d.group.mark(m.data)
}

// undo puts things back after a mount that failed.
func (m *Mount) undo(before *Mount) {
	if before == nil {
		m.release()
		return
	}
	m.d.mu.Lock()
	m.d.mounts[m.id] = before
	m.d.mu.Unlock()
	m.close()
}

// fill asks the filler.
func (m *Mount) fill(off, n int64) error {
	m.d.mu.Lock()
	if m.state == lingering {
		m.d.mu.Unlock()
		return ErrUnmounted
	}
	m.calls.Add(1)
	m.d.mu.Unlock()
	defer m.calls.Done()
	if m.lifetime.Err() != nil {
		return context.Cause(m.lifetime)
	}
	return m.opt.Filler.Fill(m.lifetime, off, n)
}

// Complete says that no byte is missing any more, and none will be: from now on, reads raise no events.
func (m *Mount) Complete() error {
	m.d.mu.Lock()
	was := m.state
	if was == live {
		m.state = complete
		m.calls.Add(1) // Unmount may come, and closes the data file
	}
	m.d.mu.Unlock()
	if was != live {
		return nil
	}
	defer m.calls.Done()
	if err := m.d.group.unmark(m.data); err != nil { // events that wait are answered all the same
		return fmt.Errorf("complete %s: %w", m.opt.Target, err)
	}
	m.d.guard.forget(m.opt.Image)
	b := behind.Open(int(m.data.Fd()))
	m.d.mu.Lock()
	m.behind = b
	m.d.mu.Unlock()
	return nil
}

// Warm has the image read into the page cache, as far as it isn't there, without waiting for it. The kernel reads
// it block by block, as it looks for inodes, each block when it needs it: where memory was short meanwhile, or the page cache was
// dropped, that's a thousand small reads for a walk through the tree.
func (m *Mount) Warm() {
	f, err := os.Open(m.opt.Image) // for no longer than this: see inUse
	if err != nil {
		return // gone with its mount
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_WILLNEED) // what fails costs time only
}

// Unmount unmounts the layer, and returns when no call of the Filler is under way; their contexts end. What still reads through
// it, an overlayfs mount or an open file, gets EIO for what has not arrived. The data file may be removed, or mounted
// again.
func (m *Mount) Unmount() error {
	m.d.mu.Lock()
	mounted := m.mounted
	m.mounted = false
	if m.state == live {
		m.state = lingering
	}
	m.d.mu.Unlock()
	m.end(ErrUnmounted)
	m.calls.Wait()
	if mounted {
		if err := unmount(m.opt.Target); err != nil {
			m.d.mu.Lock()
			m.mounted = true
			m.d.mu.Unlock()
			return err
		}
	}
	m.d.sweep()
	return nil
}

// sweep forgets what is unmounted and in use no more.
func (d *Door) sweep() {
	for _, m := range d.snapshot() {
		d.mu.Lock()
		state, mounted := m.state, m.mounted
		d.mu.Unlock()
		if !mounted && (state == complete || state == lingering && !inUse(m.img)) {
			m.release()
		}
	}
}

// release forgets the data file, and takes the mark away.
func (m *Mount) release() {
	if m.forget() {
		m.calls.Wait() // of Complete, if another's Unmount swept this
		m.close()
	}
}

// forget reports whether the data file was this mount's to forget. Whoever mounts it again meanwhile marks it after the mark was
// taken away, or has made it another's: the new mount would be without one.
func (m *Mount) forget() bool {
	m.d.marks.Lock()
	defer m.d.marks.Unlock()
	m.d.mu.Lock()
	mine := m.d.mounts[m.id] == m
	if mine {
		delete(m.d.mounts, m.id)
	}
	marked := m.state != complete
	m.d.mu.Unlock()
	if mine && marked {
		_ = m.d.group.unmark(m.data) // it is gone with its inode, at the latest
		m.d.guard.forget(m.opt.Image)
	}
	return mine
}

// look has pages dropped behind the readers of a complete layer. It reports whether anything was read from the disk since the last look. Only
// one goroutine calls it.
func (m *Mount) look() bool {
	m.d.mu.Lock()
	b := m.behind
	on := b != nil && m.mounted
	if on {
		m.calls.Add(1) // Unmount may come, and closes the files
	}
	m.d.mu.Unlock()
	if !on {
		return false
	}
	defer m.calls.Done()
	return b.Look()
}
