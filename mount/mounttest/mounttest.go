// Package mounttest is a suite for doors: what a lazy layer must look like through a mount, however it's mounted, and what must
// become of reads of it.
package mounttest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A Mount is a mounted layer.
type Mount interface {
	Complete() error
	Unmount() error
}

// A Door mounts layers below a directory.
type Door interface {
	// Mount mounts f.Layer at f.Target. What else it needs of files it makes in f.Dir.
	Mount(t testing.TB, f *Files) (Mount, error)
	Close() error
}

// Files is a layer, and what is to be mounted.
type Files struct {
	*Tree
	Dir, Target string
	// Data is the data file, of its full length and empty, opened before the door has heard of it.
	Data *os.File
	// Filler fills it.
	Filler *Filler
}

// Path returns where a file of the layer is.
func (f *Files) Path(name string) string { return filepath.Join(f.Target, name) }

// Lay makes a directory below dir for a layer that is to be mounted.
func Lay(t testing.TB, dir string, tree *Tree) *Files {
	t.Helper()
	dir, err := os.MkdirTemp(dir, "layer,") //nolint:usetesting // below dir; a comma must not end an option
	if err != nil {
		t.Fatal(err)
	}
	f := &Files{Tree: tree, Dir: dir, Target: filepath.Join(dir, "mnt")}
	if err := os.Mkdir(f.Target, 0o700); err != nil {
		t.Fatal(err)
	}
	if f.Data, err = os.Create(filepath.Join(dir, "data")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Data.Close() })
	if err := f.Data.Truncate(tree.Layer.DataSize); err != nil {
		t.Fatal(err)
	}
	f.Filler = &Filler{content: tree.Content, data: f.Data}
	return f
}

// A Filler fills from memory, and counts.
type Filler struct {
	content []byte
	data    *os.File
	// Calls is how often Fill was called.
	Calls atomic.Int64
	// Before, if set, may wait and refuse.
	Before func(ctx context.Context, off, n int64) error
}

// Fill writes a range to the data file.
func (f *Filler) Fill(ctx context.Context, off, n int64) error {
	f.Calls.Add(1)
	if f.Before != nil {
		if err := f.Before(ctx, off, n); err != nil {
			return err
		}
	}
	if off+n > int64(len(f.content)) {
		return fmt.Errorf("%d bytes at %d of %d", n, off, len(f.content))
	}
	_, err := f.data.WriteAt(f.content[off:off+n], off)
	return err
}

// A Tree is a layer with its content.
type Tree struct {
	Layer *layer.Layer
	// Content is the data space when it's filled.
	Content []byte
	// Files is the content of regular files, by path.
	Files map[string][]byte
}

// An Entry is a name in a layer, and what there is.
type Entry struct {
	Name  string
	Inode layer.Inode
	// Content makes it a regular file.
	Content []byte
	// Link makes it another name of an earlier entry.
	Link string
}

// Build makes a layer of entries.
func Build(t testing.TB, entries ...Entry) *Tree {
	t.Helper()
	b := layer.NewBuilder(layer.BuilderOptions{})
	tree := &Tree{Files: map[string][]byte{}}
	blob := int64(0)
	for _, e := range entries {
		if e.Link != "" {
			if c, ok := tree.Files[e.Link]; ok {
				tree.Files[e.Name] = c
			}
			if err := b.Link(e.Name, e.Link, inodeOf(entries, e.Link)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		in := e.Inode
		if in.Mode&unix.S_IFMT == unix.S_IFREG {
			in.Size = int64(len(e.Content))
			if !strings.HasPrefix(filepath.Base(e.Name), ".wh.") {
				tree.Files[e.Name] = e.Content
			}
		}
		if err := b.Add(e.Name, in); err != nil {
			t.Fatal(err)
		}
		if len(e.Content) > 0 {
			if err := errors.Join(b.Frame(blob), b.Chunk(0, in.Size, 0, sha256.Sum256(e.Content))); err != nil {
				t.Fatal(err)
			}
			blob += 100
		}
	}
	l, err := b.Build(blob, nil)
	if err != nil {
		t.Fatal(err)
	}
	tree.Layer, tree.Content = l, make([]byte, l.DataSize)
	for name, content := range tree.Files {
		copy(tree.Content[l.Inodes[tree.Inode(t, name)].Data:], content)
	}
	return tree
}

// Inode returns the index of what a path leads to. Other than Layer.Lookup, it takes what isn't UTF-8.
func (tree *Tree) Inode(t testing.TB, path string) uint32 {
	t.Helper()
	inode := uint32(layer.Root)
	for name := range strings.SplitSeq(path, "/") {
		var ok bool
		if inode, ok = tree.Layer.Child(inode, name); !ok {
			t.Fatalf("no %q in the layer", path)
		}
	}
	return inode
}

func inodeOf(entries []Entry, name string) layer.Inode {
	for _, e := range entries {
		if e.Name == name {
			return e.Inode
		}
	}
	return layer.Inode{}
}

// Dir is a directory.
func Dir(name string) Entry { return Entry{Name: name, Inode: layer.Inode{Mode: unix.S_IFDIR | 0o755}} }

// File is a regular file.
func File(name string, content []byte) Entry {
	return Entry{Name: name, Inode: layer.Inode{Mode: unix.S_IFREG | 0o644}, Content: content}
}

// Symlink is a symlink.
func Symlink(name, target string) Entry {
	return Entry{Name: name, Inode: layer.Inode{Mode: unix.S_IFLNK | 0o777, Target: target}}
}

// Node is a device, a pipe or a socket.
func Node(name string, kind, major, minor uint32) Entry {
	return Entry{Name: name, Inode: layer.Inode{Mode: kind | 0o640, Major: major, Minor: minor}}
}

// Link is another name.
func Link(name, target string) Entry { return Entry{Name: name, Link: target} }

// With changes the inode.
func (e Entry) With(change func(*layer.Inode)) Entry { change(&e.Inode); return e }

// Perm sets permissions, set-id and sticky bits.
func (e Entry) Perm(perm uint32) Entry {
	return e.With(func(in *layer.Inode) { in.Mode = in.Mode&unix.S_IFMT | perm })
}

// Xattr adds an extended attribute.
func (e Entry) Xattr(name, value string) Entry {
	return e.With(func(in *layer.Inode) { in.Xattrs = append(in.Xattrs, layer.Xattr{Name: name, Value: []byte(value)}) })
}

// Noise returns bytes none of which is zero.
func Noise(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(size >> 16)}).Read(b)
	for i := range b {
		b[i] |= 1
	}
	return b
}

// capability is a VFS_CAP_REVISION_2 with CAP_NET_RAW: the kernel refuses to hand out what is none.
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// Everything is a layer with one of everything.
func Everything(t testing.TB) *Tree {
	entries := []Entry{
		Dir("."),
		Dir("dir").With(func(in *layer.Inode) { in.UID, in.GID, in.Mtime, in.MtimeNsec = 1000, 70000, 1700000000, 123456789 }),
		File("dir/file", Noise(10_000)).With(func(in *layer.Inode) { in.UID, in.Mtime, in.MtimeNsec = 1<<31, 1<<33, 999_999_999 }),
		File("dir/before 1970", nil).With(func(in *layer.Inode) { in.Mtime, in.MtimeNsec = -1000, 1 }),
		File("empty", nil),
		File("one", []byte("x")),
		File("block", Noise(layer.BlockSize)),
		File("blocks", Noise(3*layer.BlockSize)),
		File("big", Noise(3<<20+17)),
		File("set-id", Noise(100)).Perm(0o6755),
		File("secret", Noise(100)).Perm(0),
		File("capable", Noise(50)).Xattr("security.capability", capability).Perm(0o755),
		File("attributed", Noise(60)).Xattr("user.a", "b").Xattr("user.empty", "").Xattr("user.long", string(Noise(2000))),
		Dir("sticky").Perm(0o1777).Xattr("user.dir", "yes"),
		Symlink("symlink", "dir/file"),
		Symlink("dangling", "/no/where"),
		Symlink("long symlink", strings.Repeat("../x", 1000)),
		Node("char", unix.S_IFCHR, 5, 1),
		Node("device", unix.S_IFBLK, 259, 70_000),
		Node("fifo", unix.S_IFIFO, 0, 0),
		Node("socket", unix.S_IFSOCK, 0, 0),
		Link("dir/link", "dir/file"),
		Link("link", "dir/file"),
		Link("fifo link", "fifo"),
		Dir("opaque"),
		File("opaque/.wh..wh..opq", nil),
		File("opaque/new", Noise(20)),
		File("dir/.wh.gone", nil),
		File(".wh.gone", nil),
		File("implied/by/this", Noise(5)),
		File("dir/"+strings.Repeat("é", 127), Noise(2)),
		File("dir/\xff\xfe\n\"", Noise(3)),
		Dir("many"),
		Dir("none"),
	}
	for i := range 3000 {
		entries = append(entries, File(fmt.Sprintf("many/%d of %x", i, Noise(i%50)), Noise(i%7)))
	}
	return Build(t, entries...)
}
