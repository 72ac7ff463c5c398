package fuse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/selftest"
)

// Probe mounts a layer of two files in a temporary directory below dir, reads one, which has the bytes arrive, and sees the other
// refused. It leaves nothing behind. The error says in words what is missing.
func Probe(dir string) (err error) {
	dir, err = os.MkdirTemp(dir, ".buildkitd-lazy-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	l := selftest.Layer()
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
	if _, err := d.Mount(MountOptions{Layer: l, Data: data, Target: target, Filler: selftest.Filler{Data: data}}); err != nil {
		return explain(err)
	}
	if err := selftest.Read(target); err != nil {
		return fmt.Errorf("through a FUSE mount: %w", err)
	}
	return nil
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
