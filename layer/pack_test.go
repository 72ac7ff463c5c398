package layer_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// pack packs a layer into a file that is gone when it returns.
func pack(t testing.TB, l *layer.Layer) *layer.Layer {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "tree"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := l.Pack(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	f.Close()
	return p
}

// samePacked fails the test unless a layer says the same when it is packed.
func samePacked(t *testing.T, l *layer.Layer) {
	t.Helper()
	p := pack(t, l)
	if p.Inodes != nil || p.Digests != nil {
		t.Fatal("it isn't packed")
	}
	p.Rest()
	if p.NumInodes() != l.NumInodes() || p.HasACLs() != l.HasACLs() || p.DataSize != l.DataSize {
		t.Fatalf("%d inodes, ACLs %v, %d bytes", p.NumInodes(), p.HasACLs(), p.DataSize)
	}
	for i, want := range l.All() {
		got := p.Inode(i)
		if bare := l.Inode(i); !reflect.DeepEqual(got, bare) {
			t.Errorf("inode %d: %+v\nwant %+v", i, got, bare)
		}
		for n, e := range want.Entries {
			if got, ok := p.Entry(i, n); !ok || got != e {
				t.Errorf("inode %d: entry %d is %+v, want %+v", i, n, got, e)
			}
			if child, ok := p.Child(i, e.Name); !ok || child != e.Inode {
				t.Errorf("inode %d: %q leads to %d, %v", i, e.Name, child, ok)
			}
			for _, none := range []string{"", e.Name + "\x00", e.Name[:len(e.Name)-1]} {
				_, got := p.Child(i, none)
				if _, want := l.Child(i, none); got != want {
					t.Errorf("inode %d: %q is there: %v, want %v", i, none, got, want)
				}
			}
		}
		for _, n := range []int{-1, len(want.Entries)} {
			if e, ok := p.Entry(i, n); ok {
				t.Errorf("inode %d: entry %d is %+v", i, n, e)
			}
		}
		path, _ := p.Path(i)
		if back, err := l.Lookup(path); err != nil || back != i {
			t.Errorf("inode %d: path %q, which is inode %d, %v", i, path, back, err)
		}
		if back, err := p.Lookup(path); err != nil || back != i {
			t.Errorf("path %q: inode %d, %v, want %d", path, back, err, i)
		}
		if want.IsDir() && p.Parent(i) != l.Parent(i) {
			t.Errorf("inode %d is in %d, want %d", i, p.Parent(i), l.Parent(i))
		}
	}
	for i, got := range p.All() {
		if want := l.Inodes[i]; len(got.Entries)+len(want.Entries) > 0 && !reflect.DeepEqual(*got, want) {
			t.Errorf("inode %d of all: %+v, want %+v", i, got, want)
		}
	}
	for c := range l.Chunks {
		if p.Digest(c) != l.Digests[c] {
			t.Errorf("chunk %d has another digest", c)
		}
		got, ok := p.FileAt(c)
		if want, _ := l.FileAt(c); !ok || got != want {
			t.Errorf("chunk %d is of inode %d, %v, want %d", c, got, ok, want)
		}
	}
	if i, ok := p.FileAt(len(l.Chunks)); ok {
		t.Errorf("inode %d has a chunk more than there are", i)
	}
	runtime.KeepAlive(p)
}

func TestPack(t *testing.T) {
	xattrs := func(in *layer.Inode) {
		in.Xattrs = []layer.Xattr{{Name: "security.capability", Value: []byte{1, 0, 2}}, {Name: "user.a", Value: []byte{}}}
	}
	usual := xattr("system.posix_acl_access", acl([3]uint32{1, 6, 0}, [3]uint32{2, 5, 1000}, [3]uint32{4, 5, 0}, [3]uint32{16, 5, 0}, [3]uint32{32, 4, 0}))
	for name, in := range map[string][]entry{
		"nothing": {},
		"all kinds": {
			dir("a", mode(0o2755), owner(7, 1<<30), mtime(-5, 6)), file("a/x", "content", xattrs), link("b", "a/x"), file("empty", ""),
			symlink("a/s", "../somewhere"), node("null", unix.S_IFCHR, 1, 3), node("disk", unix.S_IFBLK, 259, 70000), fifo("p"),
			file("deep/er/.wh..wh..opq", ""), file("deep/.wh.gone", ""), file("deep/er/file", "of several bytes", usual),
		},
		"several files in a frame, and one that is replaced": {
			raw("z", 10), frame(100), chunk(0, 4, 0), chunk(4, 6, 4), raw("a", 5), chunk(0, 5, 20), raw("gone", 1), chunk(0, 1, 30), dir("gone"),
			raw("m", 1), chunk(0, 1, 40),
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := build(layer.BuilderOptions{}, in...)
			if err != nil {
				t.Fatal(err)
			}
			samePacked(t, l)
		})
	}
}

// packAnew packs a layer into a file in place of what is there.
func packAnew(t *testing.T, l *layer.Layer, f *os.File) *layer.Layer {
	t.Helper()
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	p, err := l.Pack(f)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A tree that the disk doesn't give back any more ends neither the process nor anything else: what is asked is answered with nothing, and Err says so.
func TestUnreadableTree(t *testing.T) {
	b := layer.NewBuilder(layer.BuilderOptions{})
	for i := range 1000 {
		name := fmt.Sprint("directory/with a file", i)
		if err := b.Add(name, layer.Inode{Mode: unix.S_IFREG | 0o644, Size: 1, Xattrs: []layer.Xattr{{Name: "user.x", Value: []byte("y")}}}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(b.Frame(int64(i)), b.Chunk(0, 1, 0, sha256.Sum256([]byte{'x'}))); err != nil {
			t.Fatal(err)
		}
	}
	l, err := b.Build(1000, nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "tree"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sound := pack(t, l)
	for name, use := range map[string]func(p *layer.Layer){
		"Inode":  func(p *layer.Layer) { p.Inode(uint32(p.NumInodes() - 1)) },
		"Digest": func(p *layer.Layer) { p.Digest(999) },
		"Child":  func(p *layer.Layer) { p.Child(1, "with a file999") },
		"Entry":  func(p *layer.Layer) { p.Entry(1, 999) },
		"Parent": func(p *layer.Layer) { p.Parent(uint32(p.NumInodes() - 1)) },
		"NameIn": func(p *layer.Layer) { p.NameIn(1, uint32(p.NumInodes()-1)) },
		"Path":   func(p *layer.Layer) { p.Path(uint32(p.NumInodes() - 1)) },
		"FileAt": func(p *layer.Layer) { p.FileAt(999) },
		"Lookup": func(p *layer.Layer) { _, _ = p.Lookup("directory/with a file999") },
		"All": func(p *layer.Layer) {
			for range p.All() {
			}
		},
		"WithDigest": func(p *layer.Layer) {
			for range p.WithDigest(sha256.Sum256([]byte{'x'})) {
			}
		},
		"Shared with itself": func(p *layer.Layer) { p.Shared(p, func(int) {}, func(int) {}) },
		"Shared":             func(p *layer.Layer) { p.Shared(sound, func(int) {}, func(int) {}) },
		"Shared of another":  func(p *layer.Layer) { sound.Shared(p, func(int) {}, func(int) {}) },
		"ReadChunk": func(p *layer.Layer) {
			if _, err := p.ReadChunk(999, strings.NewReader("x"), make([]byte, 1)); !errors.Is(err, layer.ErrUnreadable) {
				t.Errorf("a chunk is read: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := packAnew(t, l, f)
			if _, err := p.ReadChunk(999, strings.NewReader("x"), make([]byte, 1)); err != nil || p.Err() != nil {
				t.Fatal(err, p.Err())
			}
			if err := f.Truncate(0); err != nil { // to the process that's the same as a disk that has failed: SIGBUS
				t.Fatal(err)
			}
			use(p)
			if !errors.Is(p.Err(), layer.ErrUnreadable) {
				t.Errorf("Err is %v", p.Err())
			}
		})
	}
	if l.Err() != nil || sound.Err() != nil {
		t.Error("what isn't packed is unreadable, or what is sound:", l.Err(), sound.Err())
	}

	// Who has made a mistake is told so as ever.
	p := packAnew(t, l, f)
	defer func() {
		if recover() == nil || p.Err() != nil {
			t.Error("an index out of range is taken for a fault of the disk")
		}
	}()
	p.Digest(1 << 40)
}
