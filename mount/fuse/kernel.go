package fuse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

const (
	// fsName is the source and the subtype of the mounts, as in /proc/mounts.
	fsName = "buildkitd-lazy"
	fsType = "fuse." + fsName

	helper        = "fusermount3"
	helperTimeout = 30 * time.Second
)

var errHelper = fmt.Errorf("%s has not ended in %v", helper, helperTimeout)

// A connection is what the kernel has of a mount.
type connection struct {
	number  string // in /sys/fs/fuse/connections, "" if unknown
	aborted bool   // nothing is asked any more
}

// mountOptions are what mount(2) and fusermount3 both take. Permissions are checked by the kernel, as those of any filesystem, for all users.
func mountOptions() string {
	return fmt.Sprintf("default_permissions,allow_other,max_read=%d", maxRequest)
}

// connect mounts, itself or with fusermount3's help, and returns the descriptor of the connection. It isn't inherited.
func connect(target string, help bool) (dev int, err error) {
	if !help {
		if dev, err = mountDirectly(target); !errors.Is(err, unix.EPERM) {
			return dev, err
		}
	}
	dev, herr := mountByHelper(target)
	if herr != nil {
		return -1, errors.Join(err, herr)
	}
	return dev, nil
}

func mountDirectly(target string) (dev int, err error) {
	dev, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse: %w", err)
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,%s", dev, unix.S_IFDIR, os.Geteuid(), os.Getegid(), mountOptions())
	// No other flag than read-only, as mounts are also bound into containers, where set-id programs and devices are to be what they are in
	// an unpacked layer.
	if err := unix.Mount(fsName, target, fsType, unix.MS_RDONLY, data); err != nil {
		unix.Close(dev)
		return -1, fmt.Errorf("mount as fuse: %w", err)
	}
	return dev, nil
}

// mountByHelper has fusermount3 mount, which sends the descriptor over a socket.
func mountByHelper(target string) (dev int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "socketpair")
	defer theirs.Close()
	if err := runHelper(theirs, "-o", "ro,fsname="+fsName+",subtype="+fsName+","+mountOptions(), "--", target); err != nil {
		return -1, err
	}
	theirs.Close()

	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("receive from %s: %w", helper, err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("%s sent %d messages instead of one: %w", helper, len(messages), errors.Join(err, unix.EPROTO))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("%s sent %d descriptors instead of one: %w", helper, len(fds), errors.Join(err, unix.EPROTO))
	}
	return fds[0], nil
}

// runHelper runs fusermount3. Commfd may be nil.
func runHelper(commfd *os.File, args ...string) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), helperTimeout, errHelper)
	defer cancel()
	cmd := exec.CommandContext(ctx, helper, args...)
	if commfd != nil {
		cmd.ExtraFiles = []*os.File{commfd}
		cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", helper, cmp.Or(context.Cause(ctx), err), strings.TrimSpace(string(out)))
	}
	return nil
}

// connectionNumber is the minor number of a mount's device.
func connectionNumber(target string) string {
	var st unix.Stat_t
	if unix.Lstat(target, &st) != nil {
		return ""
	}
	return strconv.Itoa(int(unix.Minor(uint64(st.Dev))))
}

// greet has go-fuse tell the kernel that there is no polling. Otherwise, the Go runtime of this process would ask for it when one of its files is opened,
// in a way that occupies one of the GOMAXPROCS that may have to answer. The name is go-fuse's.
func greet(target string) {
	fd, err := unix.Open(filepath.Join(target, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return // the mount works
	}
	defer unix.Close(fd)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
}

// unflushed has the kernel learn that there is no flush, which it asks for once, when the first file is closed. A process that is killed
// while it has a file of its own mount open, as a daemon that digests a step's files does, would ask when it can't answer any more, and
// wait for itself for ever, with all that its descriptors keep open.
func unflushed(target string, l *layer.Layer) {
	for i := range uint32(l.NumInodes()) {
		if in := l.Inode(i); !in.IsRegular() {
			continue
		}
		path, ok := l.Path(i)
		if !ok {
			continue
		}
		if fd, err := unix.Open(filepath.Join(target, path), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0); err == nil {
			unix.Close(fd)
			return
		}
	}
}

// unmount detaches the mount and ends the connection, whoever uses it: requests that wait fail, and so do all that follow. It's no error if
// nothing is mounted there.
func (c *connection) unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH|unix.MNT_FORCE)
	if err == nil {
		c.aborted = true
	}
	if errors.Is(err, unix.EPERM) { // forcing needs more than mounting did
		c.aborted = c.abort() == nil // before: the number is its own as long as it's mounted
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if errors.Is(err, unix.EPERM) {
		err = runHelper(nil, "-u", "-z", "--", target)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// abort ends the connection, by the file that the kernel has for that.
func (c *connection) abort() error {
	if c.number == "" {
		return os.ErrNotExist
	}
	return os.WriteFile(filepath.Join("/sys/fs/fuse/connections", c.number, "abort"), []byte("1"), 0)
}

// abortHeld ends the connection of a mount, and leaves the mount: who comes later gets an error, too, and not the directory below.
func (c *connection) abortHeld(target string) error {
	held, err := os.OpenFile(target, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer held.Close()
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_FORCE); errors.Is(err, unix.EPERM) {
		return c.abort()
	}
	return nil // it's busy: we hold it
}

// mountsBelow returns every mount of a Door below root, the latest first.
func mountsBelow(root string) ([]*mountinfo.Info, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		elsewhere, _ := mountinfo.PrefixFilter(root)(m)
		return elsewhere || m.FSType != fsType, false
	})
	if err != nil {
		return nil, fmt.Errorf("list mounts below %s: %w", root, err)
	}
	slices.Reverse(mounts)
	return mounts, nil
}

func connectionOf(m *mountinfo.Info) *connection { return &connection{number: strconv.Itoa(m.Minor)} }

// detachBelow detaches every mount of a Door below root.
func detachBelow(root string) error {
	mounts, err := mountsBelow(root)
	errs := []error{err}
	for _, m := range mounts {
		errs = append(errs, connectionOf(m).unmount(m.Mountpoint))
	}
	return errors.Join(errs...)
}

// abortBelow ends the connection of every mount of a Door below root.
func abortBelow(root string) error {
	mounts, err := mountsBelow(root)
	errs := []error{err}
	for _, m := range mounts {
		errs = append(errs, connectionOf(m).abortHeld(m.Mountpoint))
	}
	return errors.Join(errs...)
}
