package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs/image"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
}

// files is a layer as a directory with an image and an empty data file, and what is to become of the latter.
type files struct {
	opt     MountOptions // without Filler
	content []byte       // of the data space
	paths   map[string][]byte
}

// layers counts the directories that lay has made.
var layers atomic.Int64

// lay writes a layer of the given files, in a directory below dir.
func lay(t testing.TB, dir string, content map[string][]byte, order ...string) *files {
	t.Helper()
	l := &layer.Layer{Inodes: []layer.Inode{{Mode: unix.S_IFDIR | 0o755, Nlink: 2}}}
	f := &files{paths: content}
	for _, name := range order {
		b := content[name]
		l.Inodes[0].Entries = append(l.Inodes[0].Entries, layer.Entry{Name: name, Inode: uint32(len(l.Inodes))})
		l.Inodes = append(l.Inodes, layer.Inode{Mode: unix.S_IFREG | 0o755, Nlink: 1, Size: int64(len(b)), Data: l.DataSize})
		f.content = append(f.content, b...)
		f.content = append(f.content, make([]byte, -len(b)&(layer.BlockSize-1))...)
		l.DataSize = int64(len(f.content))
	}
	var img bytes.Buffer
	if err := image.Write(&img, l, image.Options{}); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(dir, fmt.Sprint("layer,", layers.Add(1))) // a comma must not end an option
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f.opt = MountOptions{Image: filepath.Join(dir, "image"), Data: filepath.Join(dir, "data"), Target: filepath.Join(dir, "mnt")}
	if err := errors.Join(os.WriteFile(f.opt.Image, img.Bytes(), 0o600), os.WriteFile(f.opt.Data, nil, 0o600), os.Truncate(f.opt.Data, l.DataSize), os.Mkdir(f.opt.Target, 0o700)); err != nil {
		t.Fatal(err)
	}
	return f
}

// one is a layer of one file of random bytes, none of which is zero.
func one(t testing.TB, dir string, size int) *files {
	return lay(t, dir, map[string][]byte{"file": noise(size)}, "file")
}

func noise(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(size)}).Read(b)
	for i := range b {
		b[i] |= 1
	}
	return b
}

func (f *files) path(name string) string { return filepath.Join(f.opt.Target, name) }

// A source fills from memory, and counts.
type source struct {
	content []byte
	data    *os.File
	calls   atomic.Int64
	before  func(ctx context.Context, off, n int64) error // if set, may refuse
}

func (f *files) source(t testing.TB) *source {
	t.Helper()
	data, err := OpenData(f.opt.Data)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { data.Close() })
	return &source{content: f.content, data: data}
}

func (s *source) Fill(ctx context.Context, off, n int64) error {
	s.calls.Add(1)
	if s.before != nil {
		if err := s.before(ctx, off, n); err != nil {
			return err
		}
	}
	if off+n > int64(len(s.content)) {
		return fmt.Errorf("%d bytes at %d of %d", n, off, len(s.content))
	}
	_, err := s.data.WriteAt(s.content[off:off+n], off)
	return err
}

// denials collects what a Door tells.
type denials struct {
	mu   sync.Mutex
	errs []error
}

func (d *denials) add(_ string, _, _ int64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.errs = append(d.errs, err)
}

// all returns what was told so far. That a read has ended, seen through the kernel, orders nothing for the race detector.
func (d *denials) all() []error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.errs)
}

func openDoor(t testing.TB, root string) (*Door, *denials) {
	t.Helper()
	needRoot(t)
	told := &denials{}
	d, err := Open(Options{Root: root, Denied: told.add})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, told
}

// mount mounts f, and fills it from s.
func mount(t testing.TB, d *Door, f *files, s Filler) *Mount {
	t.Helper()
	opt := f.opt
	opt.Filler = s
	m, err := d.Mount(opt)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// forgetCache drops what the kernel keeps of the files, and of the mount.
func forgetCache(t testing.TB, f *files) {
	t.Helper()
	unix.Sync()
	for name := range f.paths {
		drop(t, f.path(name))
	}
	drop(t, f.opt.Data)
}

func drop(t testing.TB, path string) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

func checkFile(t testing.TB, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: content differs", path)
	}
}
