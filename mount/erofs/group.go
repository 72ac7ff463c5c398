package erofs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Of linux/fanotify.h.
const (
	denyEIO      = unix.FAN_DENY | uint32(unix.EIO)<<24 // FAN_DENY_ERRNO(EIO)
	metadataSize = 24                                   // of struct fanotify_event_metadata
	rangeSize    = 24                                   // of struct fanotify_event_info_range

	// fewEvents is room for five events, or for one with more about it. Those that are taken from the kernel have descriptors before anybody
	// handles them.
	fewEvents = 256
)

// A group is a fanotify group of class FAN_CLASS_PRE_CONTENT.
type group struct{ *os.File }

// newGroup makes a group. Its queue has no limit: an event that finds the queue full is answered by the kernel with success.
func newGroup() (*group, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE|unix.FAN_UNLIMITED_MARKS,
		unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fanotify_init FAN_CLASS_PRE_CONTENT: %w", err)
	}
	return groupOf(fd), nil
}

// groupOf takes a descriptor, which does not block.
func groupOf(fd int) *group { return &group{os.NewFile(uintptr(fd), "fanotify")} }

// mark has reads of the file raise events, as long as something holds its inode: evictable, it doesn't do so itself.
func (g *group) mark(f *os.File) error {
	if err := g.change(unix.FAN_MARK_ADD|unix.FAN_MARK_EVICTABLE, f); err != nil {
		return fmt.Errorf("mark %s for pre-content events: %w", f.Name(), err)
	}
	return nil
}

// unmark takes the mark away. Events that wait still wait.
func (g *group) unmark(f *os.File) error {
	if err := g.change(unix.FAN_MARK_REMOVE, f); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmark %s: %w", f.Name(), err)
	}
	return nil
}

func (g *group) change(flags uint, f *os.File) error {
	return unix.FanotifyMark(int(g.Fd()), flags, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, procPath(f))
}

// An event is a read that waits.
type event struct {
	fd     int   // of the file, closed after the answer
	off, n int64 // the range in bytes
	err    error // why the range is unknown
}

// stop ends each, now or when it's called.
func (g *group) stop() { _ = g.SetReadDeadline(time.Unix(1, 0)) }

// resume takes stop back.
func (g *group) resume() { _ = g.SetReadDeadline(time.Time{}) }

// each hands events over, some at a time, until stop is called. What it cannot read, the kernel denies; it tells failed.
func (g *group) each(handle func(event), failed func(error)) {
	var buf [fewEvents]byte
	for {
		n, err := g.Read(buf[:])
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed):
			return
		case err != nil: // no descriptor is free, say
			failed(err)
			time.Sleep(10 * time.Millisecond)
		}
		for rest := buf[:max(n, 0)]; len(rest) > 0; {
			var e event
			if e, rest, err = parseEvent(rest); err != nil {
				failed(err)
				break
			}
			if e.fd >= 0 {
				handle(e)
			}
		}
	}
}

// parseEvent takes an event off b: struct fanotify_event_metadata, and records with more about it.
func parseEvent(b []byte) (e event, rest []byte, err error) {
	ne := binary.NativeEndian
	if len(b) < metadataSize {
		return e, nil, fmt.Errorf("fanotify event of %d bytes", len(b))
	}
	size, version, head := int64(ne.Uint32(b)), b[4], int(ne.Uint16(b[6:]))
	if version != unix.FANOTIFY_METADATA_VERSION || head < metadataSize || size < int64(head) || size > int64(len(b)) {
		return e, nil, fmt.Errorf("fanotify event of version %d, %d of %d bytes", version, size, len(b))
	}
	e.fd = int(int32(ne.Uint32(b[16:])))
	e.err = errors.New("fanotify event without a range")
	for info := b[head:size]; len(info) >= 4; {
		n := int(ne.Uint16(info[2:]))
		if n < 4 || n > len(info) {
			break
		}
		if info[0] == unix.FAN_EVENT_INFO_TYPE_RANGE && n >= rangeSize {
			e.off, e.n, e.err = int64(ne.Uint64(info[8:])), int64(ne.Uint64(info[16:])), nil
			if e.off < 0 || e.n < 0 {
				e.err = fmt.Errorf("fanotify event of %d bytes at %d", e.n, e.off)
			}
		}
		info = info[n:]
	}
	return e, b[size:], nil
}

// answer lets a reader go on, or fail with EIO. It reports whether one was waiting: those that were killed don't.
func (g *group) answer(fd int, ok bool) bool {
	var b [8]byte // struct fanotify_response
	response := denyEIO
	if ok {
		response = unix.FAN_ALLOW
	}
	binary.NativeEndian.PutUint32(b[:], uint32(fd))
	binary.NativeEndian.PutUint32(b[4:], response)
	_, err := g.Write(b[:])
	return err == nil
}

// denyAll answers every event of a number. A guardian's descriptors have the numbers of the daemon's.
func (g *group) denyAll(fd int) {
	for g.answer(fd, false) {
	}
}
