package erofs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A fileID tells files apart.
type fileID struct {
	dev, ino uint64
}

// identify returns which regular file a descriptor is of, and its length.
func identify(fd int) (id fileID, size int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return id, 0, fmt.Errorf("fstat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return id, 0, errors.New("not a regular file")
	}
	return fileID{uint64(st.Dev), st.Ino}, st.Size, nil
}

// maxDescriptors returns how many descriptors this process may have.
func maxDescriptors() int {
	const most = 1 << 20 // of which nobody has as many
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > most {
		return most
	}
	return int(limit.Cur)
}

// procPath names an open file. The file must stay open while the name is used.
func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// OpenData opens a data file for reading and writing by a descriptor that never raises pre-content events. A descriptor that
// fanotify itself opens is such a one, so this provokes a notification of its own.
func OpenData(path string) (*os.File, error) {
	f, err := openSilent(path)
	if err != nil {
		return nil, fmt.Errorf("open %s without events: %w", path, err)
	}
	return f, nil
}

func openSilent(path string) (*os.File, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDWR|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fanotify_init: %w", err)
	}
	defer unix.Close(fd)
	at, err := os.OpenFile(path, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if _, _, err := identify(int(at.Fd())); err != nil {
		return nil, err
	}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_OPEN, unix.AT_FDCWD, procPath(at)); err != nil {
		return nil, fmt.Errorf("fanotify_mark: %w", err)
	}
	opened, err := os.Open(procPath(at))
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	var b [metadataSize]byte // room for one event: others that open the file meanwhile don't cost descriptors
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return nil, fmt.Errorf("read fanotify event: %w", err)
	}
	if n < metadataSize {
		return nil, fmt.Errorf("fanotify event of %d bytes", n)
	}
	return os.NewFile(uintptr(binary.NativeEndian.Uint32(b[16:])), path), nil
}

// inUse reports whether a mount, or anything else, has an image open; where that cannot be found out, it does. Only a file
// that nobody has open can get a write lease.
func inUse(image *os.File) bool {
	f, err := os.Open(procPath(image))
	if err != nil {
		return true
	}
	defer f.Close()
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	return err != nil
}

// unmount unmounts target, in the background if it is in use. It's no error if nothing is mounted there.
func unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// detachBelow detaches every EROFS mount below root, the latest first.
func detachBelow(root string) error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		elsewhere, _ := mountinfo.PrefixFilter(root)(m)
		return elsewhere || m.FSType != "erofs", false
	})
	if err != nil {
		return fmt.Errorf("list mounts below %s: %w", root, err)
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		errs = append(errs, unmount(m.Mountpoint))
	}
	return errors.Join(errs...)
}
