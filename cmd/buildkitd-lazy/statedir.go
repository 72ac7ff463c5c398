package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/gofrs/flock"
)

// lockName is stock's: a stock daemon and ours exclude each other too.
const lockName = "buildkitd.lock"

// probeSize is what has to fit on the state directory's filesystem for a start to make sense. A full disk is better
// found here than half way: the choice of a snapshotter, for one, takes a failed write for a missing feature.
const probeSize = 1 << 20 // bytes

// stateDir is a state directory that no other daemon uses until it is closed.
type stateDir struct {
	path string
	lock *flock.Flock
}

// openStateDir creates the directory where it is missing, locks it and checks that it can be written to.
func openStateDir(path string) (*stateDir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w", path, err)
	}
	s := &stateDir{path: abs}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, s.explain(err)
	}
	s.lock = flock.New(filepath.Join(abs, lockName))
	locked, err := s.lock.TryLock()
	if err != nil {
		return nil, s.explain(err)
	}
	if !locked {
		return nil, fmt.Errorf("state directory %s is in use by another daemon: stop that one, or choose a directory by --root", abs)
	}
	// The lock can be taken on a read-only filesystem, so it says nothing.
	if err := s.tryWrite(); err != nil {
		return nil, errors.Join(s.explain(err), s.Close())
	}
	return s, nil
}

func (s *stateDir) tryWrite() error {
	f, err := os.CreateTemp(s.path, ".write-test-")
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, probeSize))
	if err == nil {
		err = f.Sync() // delayed allocation and network filesystems find out late
	}
	return errors.Join(err, f.Close(), os.Remove(f.Name()))
}

// Close gives the directory to the next daemon. The lock file goes first: were it removed after the lock, two
// daemons could hold one lock each, on the file that was and on the file that is.
func (s *stateDir) Close() error {
	err := os.Remove(s.lock.Path())
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.EROFS) {
		err = nil
	}
	return errors.Join(err, s.lock.Unlock())
}

// explain turns an error which the directory is to blame for into a sentence with a way out; other errors come back
// as they are.
func (s *stateDir) explain(err error) error {
	for _, e := range []struct {
		cause  error
		advice string
	}{
		{syscall.ENOSPC, "is full: make room on its filesystem, or choose another directory by --root"},
		{syscall.EDQUOT, "is over quota: make room, or choose another directory by --root"},
		{syscall.EROFS, "is on a read-only filesystem: choose another directory by --root"},
		{syscall.ENOTDIR, "cannot be made: part of the path is not a directory"},
		{syscall.EACCES, "is not accessible to this user: choose another directory by --root"},
		{syscall.EPERM, "is not accessible to this user: choose another directory by --root"},
		{syscall.EIO, "cannot be read or written, its disk reports errors: choose another directory by --root"},
	} {
		if errors.Is(err, e.cause) && s.concerns(err) {
			return fmt.Errorf("state directory %s %s (%w)", s.path, e.advice, err)
		}
	}
	return err
}

// concerns reports whether err is about a path in, or on the way to, the directory. No space and no writing are the
// directory's fault wherever they surface: some of BuildKit's errors have lost their path.
func (s *stateDir) concerns(err error) bool {
	var pe *os.PathError
	if !errors.As(err, &pe) || !filepath.IsAbs(pe.Path) {
		return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EDQUOT)
	}
	under := func(path, dir string) bool {
		rel, err := filepath.Rel(dir, path)
		return err == nil && filepath.IsLocal(rel)
	}
	return under(pe.Path, s.path) || under(s.path, pe.Path)
}
