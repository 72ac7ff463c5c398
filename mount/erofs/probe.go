package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs/image"
)

// Probe mounts a layer of one file in a temporary directory below dir, reads it, and sees the read wait for its bytes; then
// sees a read denied. It leaves nothing behind and starts no process. The error says in words what is missing.
func Probe(dir string) (err error) {
	dir, err = os.MkdirTemp(dir, ".buildkitd-lazy-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	l := &layer.Layer{
		DataSize: 2 * probeSize,
		Inodes: []layer.Inode{
			{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Entries: []layer.Entry{{Name: "filled", Inode: 1}, {Name: "refused", Inode: 2}}},
			{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: probeSize},
			{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: probeSize, Data: probeSize},
		},
	}
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
	filler := &probeFiller{}
	if filler.data, err = OpenData(opt.Data); err != nil {
		return explain(err)
	}
	defer filler.data.Close()
	opt.Filler = filler
	m, err := d.Mount(opt)
	if err != nil {
		return explain(err)
	}
	defer func() { err = errors.Join(err, m.Unmount()) }()

	switch got, err := readSoon(filepath.Join(opt.Target, "filled")); {
	case err != nil:
		return fmt.Errorf("read through a file-backed EROFS mount: %w", err)
	case !bytes.Equal(got, probeContent()):
		return errors.New("a read through a file-backed EROFS mount did not wait for its bytes: the kernel raises no pre-content events for it")
	}
	if _, err := readSoon(filepath.Join(opt.Target, "refused")); !errors.Is(err, unix.EIO) {
		return fmt.Errorf("a read through a file-backed EROFS mount that was denied: %w, want EIO", cmpErr(err))
	}
	return nil
}

const probeSize = layer.BlockSize

func probeContent() []byte { return bytes.Repeat([]byte("lazy"), probeSize/4) }

// cmpErr gives success a name.
func cmpErr(err error) error {
	if err == nil {
		return errors.New("success")
	}
	return err
}

// probeFiller fills the first file and refuses the second.
type probeFiller struct{ data *os.File }

func (f *probeFiller) Fill(_ context.Context, off, n int64) error {
	if off+n > probeSize {
		return errors.New("refused")
	}
	_, err := f.data.WriteAt(probeContent(), 0)
	return err
}

// readSoon reads a file, and gives up when it takes long.
func readSoon(path string) ([]byte, error) {
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b, err := os.ReadFile(path)
		done <- result{b, err}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-time.After(10 * time.Second): // closing the group wakes it
		return nil, fmt.Errorf("%s: no answer in 10 seconds", path)
	}
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
