package fuse

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
)

// Probe mounts a layer of two files in a temporary directory below dir, reads one, which has the bytes arrive, and sees the other
// refused. It leaves nothing behind. The error says in words what is missing.
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
	target := filepath.Join(dir, "layer")
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	data, err := os.Create(filepath.Join(dir, "data"))
	if err != nil {
		return err
	}
	defer data.Close()
	if err := data.Truncate(l.DataSize); err != nil {
		return err
	}

	d, err := Open(Options{Root: dir})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if _, err := d.Mount(MountOptions{Layer: l, Data: data, Target: target, Filler: probeFiller{data}}); err != nil {
		return explain(err)
	}
	switch got, err := readSoon(filepath.Join(target, "filled")); {
	case err != nil:
		return fmt.Errorf("read through a FUSE mount: %w", err)
	case !bytes.Equal(got, probeContent()):
		return errors.New("a read through a FUSE mount did not wait for its bytes")
	}
	if _, err := readSoon(filepath.Join(target, "refused")); !errors.Is(err, unix.EIO) {
		if err == nil {
			err = errors.New("success")
		}
		return fmt.Errorf("a read through a FUSE mount that was refused: %w, want EIO", err)
	}
	return nil
}

const probeSize = layer.BlockSize

func probeContent() []byte { return bytes.Repeat([]byte("lazy"), probeSize/4) }

// probeFiller fills the first file and refuses the second.
type probeFiller struct{ data *os.File }

func (f probeFiller) Fill(_ context.Context, off, n int64) error {
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
	case <-time.After(10 * time.Second): // unmounting wakes it
		return nil, fmt.Errorf("%s: no answer in 10 seconds", path)
	}
}

// explain says what an error means.
func explain(err error) error {
	var why string
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		why = "the kernel has no fuse, its module is not loaded, or /dev/fuse is missing"
	case errors.Is(err, unix.EACCES):
		why = "/dev/fuse is not to be opened"
	case errors.Is(err, unix.EPERM):
		why = "neither is there CAP_SYS_ADMIN in the user namespace, nor did fusermount3 help"
	default:
		return err
	}
	return fmt.Errorf("%s: %w", why, err)
}
