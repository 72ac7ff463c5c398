package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestStateDirIsExclusive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	first, err := openStateDir(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
	if _, err := openStateDir(path); err == nil || !strings.Contains(err.Error(), path+" is in use by another daemon") {
		t.Errorf("second: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(path)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	again, err := openStateDir(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestExplain(t *testing.T) {
	s := &stateDir{path: "/state"}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{&os.PathError{Op: "write", Path: "/state/cache.db", Err: syscall.ENOSPC}, "state directory /state is full"},
		{fmt.Errorf("open build cache: %w", syscall.ENOSPC), "state directory /state is full"},
		{&os.PathError{Op: "mkdir", Path: "/state", Err: syscall.EROFS}, "state directory /state is on a read-only filesystem"},
		{&os.PathError{Op: "mkdir", Path: "/", Err: syscall.ENOTDIR}, "state directory /state cannot be made"},
		{&os.PathError{Op: "open", Path: "/state/x", Err: syscall.EACCES}, "state directory /state is not accessible"},
		{&os.PathError{Op: "open", Path: "/etc/x", Err: syscall.EACCES}, "open /etc/x: permission denied"},
		{&os.PathError{Op: "open", Path: "/stateless", Err: syscall.ENOTDIR}, "open /stateless: not a directory"},
		{fmt.Errorf("runc: %w", syscall.EPERM), "runc: operation not permitted"},
	} {
		if got := s.explain(tt.err); !strings.HasPrefix(got.Error(), tt.want) {
			t.Errorf("%v: got %v, want %s", tt.err, got, tt.want)
		}
	}
}

// What a user gets to see: one line, no stack trace, exit status 1.
func TestUnusableStateDir(t *testing.T) {
	start := func(t *testing.T, root, mount, options string, args ...string) outcome {
		t.Helper()
		cmd := daemonCommand(t, []string{mountHere + "=" + mount, mountOptions + "=" + options},
			append([]string{"--root", root, "--addr", "unix://" + filepath.Join(t.TempDir(), "bk.sock")}, args...)...)
		inNamespaces(cmd)
		return runDaemon(t, cmd)
	}
	oneLine := func(t *testing.T, o outcome, want string) {
		t.Helper()
		if o.status != 1 || o.stderr != o.lastLine()+"\n" || !strings.HasPrefix(o.lastLine(), "buildkitd-lazy: "+want) {
			t.Errorf("status %d, stderr:\n%swant: %s", o.status, o.stderr, want)
		}
	}
	t.Run("full", func(t *testing.T) {
		dir := t.TempDir()
		oneLine(t, start(t, dir, dir, "size=64k"), "state directory "+dir+" is full: make room")
	})
	t.Run("out of inodes", func(t *testing.T) {
		dir := t.TempDir()
		oneLine(t, start(t, dir+"/root", dir, "nr_inodes=1"), "state directory "+dir+"/root is full: make room")
	})
	t.Run("read-only", func(t *testing.T) {
		dir := t.TempDir()
		oneLine(t, start(t, dir, dir, "ro"), "state directory "+dir+" is on a read-only filesystem: choose another")
	})
	t.Run("not there on read-only", func(t *testing.T) {
		dir := t.TempDir()
		oneLine(t, start(t, dir+"/a/b", dir, "ro"), "state directory "+dir+"/a/b is on a read-only filesystem: choose another")
	})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("a file", func(t *testing.T) {
		oneLine(t, start(t, file, "", ""), "state directory "+file+" cannot be made: part of the path is not a directory")
	})
	t.Run("below a file", func(t *testing.T) {
		oneLine(t, start(t, file+"/x", "", ""), "state directory "+file+"/x cannot be made: part of the path is not a directory")
	})
	t.Run("locked", func(t *testing.T) {
		dir := t.TempDir()
		held, err := openStateDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer held.Close()
		oneLine(t, start(t, dir, "", ""), "state directory "+dir+" is in use by another daemon: stop that one")
	})
	t.Run("with --debug", func(t *testing.T) {
		o := start(t, file, "", "", "--debug")
		if o.status != 1 || !strings.Contains(o.stderr, "buildkitd-lazy: state directory "+file) {
			t.Errorf("status %d, stderr:\n%s", o.status, o.stderr)
		}
	})
}
