package mounttest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Compare fails the test for everything below root that isn't as the tree says: metadata, and nothing that needs content. Overlaid
// says that root is an overlayfs mount of it and a [Skeleton].
func Compare(t testing.TB, root string, tree *Tree, overlaid bool) {
	t.Helper()
	c := &comparison{t: t, l: tree.Layer, overlaid: overlaid, numbers: map[uint32]number{}, inodes: map[number]uint32{}}
	c.compare(root, layer.Root)
}

// Skeleton is a directory that has those of a tree, for overlayfs to merge them with: in what is in one layer only, it shows whiteouts.
func Skeleton(t testing.TB, tree *Tree) string {
	t.Helper()
	root := t.TempDir()
	var fill func(path string, inode uint32)
	fill = func(path string, inode uint32) {
		for _, e := range tree.Layer.Inodes[inode].Entries {
			if !tree.Layer.Inodes[e.Inode].IsDir() {
				continue
			}
			p := filepath.Join(path, e.Name)
			if err := os.Mkdir(p, 0o755); err != nil {
				t.Fatal(err)
			}
			fill(p, e.Inode)
		}
	}
	fill(root, layer.Root)
	return root
}

type comparison struct {
	t        testing.TB
	l        *layer.Layer
	overlaid bool
	// That two names have one inode, and no other has its number.
	numbers map[uint32]number
	inodes  map[number]uint32
}

// A number is an inode's, and its device's.
type number struct{ dev, ino uint64 }

func (c *comparison) compare(path string, inode uint32) {
	c.t.Helper()
	in := &c.l.Inodes[inode]
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		c.t.Errorf("%q: %v", path, err)
		return
	}
	got, want := statLine(&st, in, c.overlaid), wantLine(in, c.overlaid)
	if got != want && (!c.overlaid || inode != layer.Root) { // which is the upper directory's
		c.t.Errorf("%q:\n got %s\nwant %s", path, got, want)
	}
	is := number{uint64(st.Dev), st.Ino}
	if n, ok := c.numbers[inode]; ok && n != is {
		c.t.Errorf("%q: inode number %d, and %d by another name", path, is, n)
	}
	if i, ok := c.inodes[is]; ok && i != inode {
		c.t.Errorf("%q: inode number %d is that of another file", path, is)
	}
	c.numbers[inode], c.inodes[is] = is, inode
	c.xattrs(path, in)
	if in.Mode&unix.S_IFMT == unix.S_IFLNK {
		if target, err := os.Readlink(path); err != nil || target != in.Target {
			c.t.Errorf("%q: link to %q, %v, want %q", path, target, err, in.Target)
		}
	}
	if in.IsDir() {
		c.dir(path, &st, inode)
	}
}

func statLine(st *unix.Stat_t, in *layer.Inode, overlaid bool) string {
	size, nlink := st.Size, st.Nlink
	if in.IsDir() { // every filesystem has its own idea
		size = 0
		if overlaid {
			nlink = 0
		}
	}
	return fmt.Sprintf("mode %o, nlink %d, owner %d:%d, device %d:%d, size %d, mtime %d.%09d", st.Mode, nlink, st.Uid, st.Gid,
		unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)), size, st.Mtim.Sec, st.Mtim.Nsec)
}

func wantLine(in *layer.Inode, overlaid bool) string {
	nlink := in.Nlink
	if overlaid && in.IsDir() {
		nlink = 0
	}
	return fmt.Sprintf("mode %o, nlink %d, owner %d:%d, device %d:%d, size %d, mtime %d.%09d", in.Mode, nlink, in.UID, in.GID,
		in.Major, in.Minor, in.Size, in.Mtime, in.MtimeNsec)
}

func (c *comparison) xattrs(path string, in *layer.Inode) {
	c.t.Helper()
	want := map[string]string{}
	for _, x := range in.Xattrs {
		want[x.Name] = string(x.Value)
	}
	if in.Opaque && !c.overlaid {
		want["trusted.overlay.opaque"] = "y"
	}
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		c.t.Errorf("%q: listxattr: %v", path, err)
		return
	}
	var names []string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name != "" {
			names = append(names, name)
		}
	}
	if size, err := unix.Llistxattr(path, nil); err != nil || size != n && !c.overlaid { // which counts its own
		c.t.Errorf("%q: listxattr says %d bytes, %v, and gives %d", path, size, err, n)
	}
	if len(names) != len(want) {
		c.t.Errorf("%q: xattrs %q, want %d", path, names, len(want))
	}
	for name, value := range want {
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil || !slices.Contains(names, name) || string(buf[:n]) != value {
			c.t.Errorf("%q: xattr %s is %q, %v, want %q; listed are %q", path, name, buf[:max(n, 0)], err, value, names)
		}
		if len(value) > 1 {
			if _, err := unix.Lgetxattr(path, name, buf[:1]); !errors.Is(err, unix.ERANGE) {
				c.t.Errorf("%q: xattr %s into one byte: %v, want ERANGE", path, name, err)
			}
		}
	}
	if _, err := unix.Lgetxattr(path, "trusted.missing", buf); !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
		c.t.Errorf("%q: an xattr that is missing: %v", path, err)
	}
}

func (c *comparison) dir(path string, st *unix.Stat_t, inode uint32) {
	c.t.Helper()
	entries, err := readDir(path)
	if err != nil {
		c.t.Errorf("%q: %v", path, err)
		return
	}
	if self := entries["."]; self.ino != st.Ino && !c.overlaid {
		c.t.Errorf("%q: inode number %d, and . is %d", path, st.Ino, self.ino)
	}
	if _, ok := entries[".."]; !ok {
		c.t.Errorf("%q: no ..", path)
	}
	delete(entries, ".")
	delete(entries, "..")
	for _, e := range c.l.Inodes[inode].Entries {
		in := &c.l.Inodes[e.Inode]
		if c.overlaid && in.IsWhiteout() {
			continue
		}
		p := filepath.Join(path, e.Name)
		got, ok := entries[e.Name]
		if delete(entries, e.Name); !ok {
			c.t.Errorf("%q isn't listed", p)
			continue
		}
		c.compare(p, e.Inode)
		if kind := in.Mode >> 12; uint32(got.kind) != kind {
			c.t.Errorf("%q: listed with type %d, want %d", p, got.kind, kind)
		}
		if ino := c.numbers[e.Inode].ino; got.ino != ino && !c.overlaid {
			c.t.Errorf("%q: listed with inode number %d, has %d", p, got.ino, ino)
		}
	}
	for name := range entries {
		c.t.Errorf("%q: %q should not be there", path, name)
	}
	for _, name := range []string{"no such name", "~", "\x01"} {
		if _, err := os.Lstat(filepath.Join(path, name)); !errors.Is(err, os.ErrNotExist) {
			c.t.Errorf("%q in %q: %v", name, path, err)
		}
	}
}

type dirent struct {
	ino  uint64
	kind byte
}

// readDir is getdents64(2), which the standard library hides the better part of.
func readDir(path string) (map[string]dirent, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries := map[string]dirent{}
	buf := make([]byte, 4096)
	for {
		n, err := unix.Getdents(int(f.Fd()), buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return entries, nil
		}
		for b := buf[:n]; len(b) > 0; {
			size := binary.NativeEndian.Uint16(b[16:])
			name, _, _ := bytes.Cut(b[19:size], []byte{0})
			if _, ok := entries[string(name)]; ok {
				return nil, fmt.Errorf("%q is listed twice", name)
			}
			entries[string(name)] = dirent{binary.NativeEndian.Uint64(b), b[18]}
			b = b[size:]
		}
	}
}

// CheckFile fails the test if a file hasn't the content.
func CheckFile(t testing.TB, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
		return
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%q: %d bytes differ from the %d that are right", path, len(got), len(want))
	}
}
