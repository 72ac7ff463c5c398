package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs/image"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/selftest"
)

// Probe mounts a layer of one file in a temporary directory below dir, reads it, and sees the read wait for its bytes; then
// sees a read denied. It leaves nothing behind and starts no process. The error says in words what is missing.
func Probe(dir string) (err error) {
	dir, err = os.MkdirTemp(dir, ".buildkitd-lazy-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	l := selftest.Layer()
	opt := MountOptions{Image: filepath.Join(dir, "image"), Data: filepath.Join(dir, "data"), Target: filepath.Join(dir, "layer")}
	var img bytes.Buffer
	if err := image.Write(&img, l, image.Options{}); err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(opt.Image, img.Bytes(), 0o600), os.WriteFile(opt.Data, nil, 0o600), os.Truncate(opt.Data, l.DataSize), os.Mkdir(opt.Target, 0o700)); err != nil {
		return err
	}

	d, err := Open(Options{Root: dir, unguarded: true})
	if err != nil {
		return explain(err)
	}
	defer d.Close()
	data, err := OpenData(opt.Data)
	if err != nil {
		return explain(err)
	}
	defer data.Close()
	opt.Filler = selftest.Filler{Data: data}
	m, err := d.Mount(opt)
	if err != nil {
		return explain(err)
	}
	defer func() { err = errors.Join(err, m.Unmount()) }()

	if err := selftest.Read(opt.Target); err != nil {
		return fmt.Errorf("through a file-backed EROFS mount with pre-content events: %w", err)
	}
	return nil
}

// explain says what an error of the kernel means.
func explain(err error) error {
	var why string
	switch {
	case errors.Is(err, unix.EPERM):
		why = "CAP_SYS_ADMIN in the initial user namespace is missing"
	case errors.Is(err, unix.ENOSYS):
		why = "the kernel has no fanotify permission events (CONFIG_FANOTIFY_ACCESS_PERMISSIONS)"
	case errors.Is(err, unix.ENODEV):
		why = "the kernel has no erofs, or its module is not loaded"
	case errors.Is(err, unix.ENOTBLK):
		why = "the kernel mounts erofs from block devices only: Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE is needed"
	case errors.Is(err, unix.EINVAL):
		why = "Linux 6.14 is needed"
	case errors.Is(err, unix.EOPNOTSUPP):
		why = "the filesystem of the state directory raises no pre-content events: ext4, xfs and btrfs do"
	default:
		return err
	}
	return fmt.Errorf("%s: %w", why, err)
}
