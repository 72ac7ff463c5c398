package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// trees are layers that have been thought of.
func trees() map[string]*tree {
	all := map[string]*tree{"empty": newTree()}

	kinds := newTree()
	kinds.Inodes[0].Mtime, kinds.Inodes[0].MtimeNsec = 1700000000, 123456789
	kinds.add("bin", layer.Inode{Mode: unix.S_IFDIR | 0o755, Mtime: 1})
	kinds.link("bin/hardlink", kinds.add("bin/busybox", layer.Inode{Mode: unix.S_IFREG | 0o4755, Size: 70000, Mtime: -5, MtimeNsec: 999999999}))
	kinds.link("hardlink2", kinds.byPath["bin/busybox"])
	kinds.add("bin/sh", layer.Inode{Mode: unix.S_IFLNK | 0o777, Target: "busybox"})
	kinds.add("bin/empty", layer.Inode{Mode: unix.S_IFREG | 0o644})
	kinds.add("bin/block", layer.Inode{Mode: unix.S_IFREG, Size: BlockSize})
	kinds.add("bin/byte", layer.Inode{Mode: unix.S_IFREG | 0o1777, Size: 1, UID: 1 << 31, GID: 1 << 30})
	kinds.add("null", layer.Inode{Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 3})
	kinds.add("vda", layer.Inode{Mode: unix.S_IFBLK | 0o600, Major: 4095, Minor: 1<<20 - 1})
	kinds.add("fifo", layer.Inode{Mode: unix.S_IFIFO | 0o600})
	kinds.add("sock", layer.Inode{Mode: unix.S_IFSOCK | 0o600})
	kinds.add("gone", layer.Inode{Mode: unix.S_IFCHR})
	kinds.add("opaque", layer.Inode{Mode: unix.S_IFDIR | 0o755, Opaque: true, Xattrs: []layer.Xattr{{Name: "trusted.overlay.opaque", Value: []byte("x")}}})
	kinds.add("capable", layer.Inode{Mode: unix.S_IFREG | 0o755, Size: 5, Xattrs: []layer.Xattr{{Name: "security.capability", Value: capability}}})
	kinds.add("acl", layer.Inode{Mode: unix.S_IFREG | 0o754, Xattrs: []layer.Xattr{{Name: "system.posix_acl_access", Value: acl}}})
	kinds.add("acldir", layer.Inode{Mode: unix.S_IFDIR | 0o754, Xattrs: []layer.Xattr{{Name: "system.posix_acl_default", Value: acl}}})
	all["kinds"] = kinds

	names := newTree()
	for _, name := range []string{"!", "-", "+.", "...", ".a", "..a", "\xff\xfe", "\x01", "new\nline", "a b", strings.Repeat("n", maxName), "été", "a", "a.", "a.b", "a0", "ab"} {
		names.add(name, layer.Inode{Mode: unix.S_IFREG})
	}
	all["names"] = names

	big := newTree()
	big.add("d", layer.Inode{Mode: unix.S_IFDIR | 0o755})
	for i := range 10000 {
		big.add(fmt.Sprintf("d/file-%x", i*2654435761%1000003), layer.Inode{Mode: unix.S_IFREG | 0o644, Size: int64(i % 3)})
	}
	all["10k entries"] = big

	deep := newTree()
	for p := "d"; len(p) < 3900; p += "/" + strings.Repeat("d", len(p)%200+1) {
		deep.add(p, layer.Inode{Mode: unix.S_IFDIR | 0o755})
	}
	all["deep"] = deep

	xattrs := newTree()
	for i, size := range []int{0, 1, 2, 3, 4, 1000, 2000, 4000, 4096, 8000, 60000, 65535} {
		value := content(int64(size))
		xattrs.add(fmt.Sprint("one", i), layer.Inode{Mode: unix.S_IFREG | 0o644, Xattrs: []layer.Xattr{{Name: "trusted." + strings.Repeat("v", i*20+1), Value: value}}})
		xattrs.add(fmt.Sprint("dir", i), layer.Inode{Mode: unix.S_IFDIR | 0o755, Xattrs: []layer.Xattr{{Name: "user.v", Value: value[:size/2]}, {Name: "user.w", Value: value[size/2:]}}})
		xattrs.add(fmt.Sprint("link", i), layer.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", 1+size%maxTarget), Xattrs: []layer.Xattr{{Name: "trusted.l", Value: value}}})
	}
	many := layer.Inode{Mode: unix.S_IFREG}
	for i := range 300 { // more than can be shared
		many.Xattrs = append(many.Xattrs, layer.Xattr{Name: fmt.Sprintf("trusted.%03d", i), Value: []byte{byte(i)}})
	}
	xattrs.add("many", many)
	xattrs.add("many2", many)
	all["xattrs"] = xattrs

	targets := newTree()
	for _, n := range []int{1, 59, 60, 2000, maxTail, maxTail + 1, 3000, maxTarget} {
		targets.add(fmt.Sprint("link", n), layer.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", n)})
	}
	all["symlinks"] = targets
	return all
}

// acl is user::rwx, user:1000:r-x, group::r-x, mask::r-x, other::r--.
var acl = []byte{
	2, 0, 0, 0,
	1, 0, 7, 0, 255, 255, 255, 255,
	2, 0, 5, 0, 0xe8, 3, 0, 0,
	4, 0, 5, 0, 255, 255, 255, 255,
	0x10, 0, 5, 0, 255, 255, 255, 255,
	0x20, 0, 4, 0, 255, 255, 255, 255,
}

// Every tree is what it was when go-erofs reads its image.
func TestRead(t *testing.T) {
	for name, tree := range trees() {
		t.Run(name, func(t *testing.T) { testRead(t, &tree.Layer) })
	}
}

func testRead(t *testing.T, l *layer.Layer) {
	img, data := write(t, l, Options{}), content(l.DataSize)
	compareGo(t, readByGo(t, img, data), nodes(l, Options{}, data))
	if !bytes.Equal(img, write(t, l, Options{})) {
		t.Error("written twice, the image differs")
	}
}

// Every tree is what it was when the kernel has mounted its image, and fsck.erofs is content.
func TestMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
	for name, tree := range trees() {
		t.Run(name, func(t *testing.T) { testMount(t, &tree.Layer, Options{}) })
	}
	t.Run("userxattr", func(t *testing.T) { testMount(t, &trees()["kinds"].Layer, Options{UserXattr: true}) })
	for seed := range uint64(30) {
		t.Run(fmt.Sprint("random", seed), func(t *testing.T) {
			testMount(t, &randomTree(rand.New(rand.NewPCG(seed, 0)), 1<<(seed%12)).Layer, Options{})
		})
	}
}

func testMount(t *testing.T, l *layer.Layer, opt Options) {
	img, data := write(t, l, opt), content(l.DataSize)
	want := nodes(l, opt, data)
	compareGo(t, readByGo(t, img, data), want)

	dir := t.TempDir()
	imgFile, dataFile, target := filepath.Join(dir, "image"), filepath.Join(dir, "data"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.WriteFile(imgFile, img, 0o600), os.WriteFile(dataFile, data, 0o600), os.Mkdir(target, 0o700)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "fsck.erofs", "--extract", "--device="+dataFile, imgFile).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
	if err := unix.Mount(imgFile, target, "erofs", unix.MS_RDONLY, "device="+dataFile); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(target, 0); err != nil {
			t.Error(err)
		}
	}()
	compare(t, "kernel", readByKernel(t, target), want)
}

// FuzzWrite has go-erofs read the images of random trees.
func FuzzWrite(f *testing.F) {
	for seed := range uint64(8) {
		f.Add(seed, uint16(1)<<seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64, n uint16) {
		testRead(t, &randomTree(rand.New(rand.NewPCG(seed, 1)), int(n%4096)).Layer)
	})
}

// What an image cannot hold is refused.
func TestRefused(t *testing.T) {
	reg := layer.Inode{Mode: unix.S_IFREG, Nlink: 1}
	for name, change := range map[string]func(*tree){
		"no root":           func(t *tree) { t.Inodes = nil },
		"root is a file":    func(t *tree) { t.Inodes[0].Mode = unix.S_IFREG },
		"slash":             func(t *tree) { t.Inodes[0].Entries[0].Name = "a/b" },
		"NUL":               func(t *tree) { t.Inodes[0].Entries[0].Name = "a\x00" },
		"dot":               func(t *tree) { t.Inodes[0].Entries[0].Name = "." },
		"dotdot":            func(t *tree) { t.Inodes[0].Entries[0].Name = ".." },
		"no name":           func(t *tree) { t.Inodes[0].Entries[0].Name = "" },
		"long name":         func(t *tree) { t.Inodes[0].Entries[0].Name = strings.Repeat("a", 256) },
		"order":             func(t *tree) { t.Inodes[0].Entries[0].Name = "z" },
		"twice":             func(t *tree) { t.Inodes[0].Entries[0].Name = "dir" },
		"no inode":          func(t *tree) { t.Inodes[0].Entries[0].Inode = 99 },
		"loop":              func(t *tree) { t.Inodes[0].Entries[0].Inode = 0 },
		"directory linked":  func(t *tree) { t.Inodes[0].Entries[0].Inode = t.byPath["dir"] },
		"directory alone":   func(t *tree) { t.Inodes = append(t.Inodes, layer.Inode{Mode: unix.S_IFDIR}) },
		"no type":           func(t *tree) { t.Inodes[t.byPath["a"]].Mode = 0o644 },
		"unaligned":         func(t *tree) { t.Inodes[t.byPath["a"]].Data = 1 },
		"behind the data":   func(t *tree) { t.Inodes[t.byPath["a"]].Data = t.DataSize },
		"overflow":          func(t *tree) { t.Inodes[t.byPath["a"]].Size = 1<<63 - 1 },
		"negative":          func(t *tree) { t.Inodes[t.byPath["a"]].Size = -1 },
		"data":              func(t *tree) { t.DataSize = 1 << 62 },
		"major":             func(t *tree) { t.add("c", layer.Inode{Mode: unix.S_IFCHR, Major: 1 << 12}) },
		"minor":             func(t *tree) { t.add("c", layer.Inode{Mode: unix.S_IFBLK, Minor: 1 << 20}) },
		"no target":         func(t *tree) { t.add("l", layer.Inode{Mode: unix.S_IFLNK}) },
		"long target":       func(t *tree) { t.add("l", layer.Inode{Mode: unix.S_IFLNK, Target: strings.Repeat("a", 4096)}) },
		"long xattr":        func(t *tree) { t.Inodes[0].Xattrs = []layer.Xattr{{Name: "user.a", Value: make([]byte, 1<<16)}} },
		"long xattr's name": func(t *tree) { t.Inodes[0].Xattrs = []layer.Xattr{{Name: "user." + strings.Repeat("a", 256)}} },
		"xattrs": func(t *tree) {
			for i := range 5 {
				t.Inodes[0].Xattrs = append(t.Inodes[0].Xattrs, layer.Xattr{Name: fmt.Sprint("user.", i), Value: make([]byte, 65000)})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			tree := newTree()
			file := reg
			file.Size = 1
			tree.add("a", file)
			tree.add("dir", layer.Inode{Mode: unix.S_IFDIR})
			change(tree)
			if err := Write(io.Discard, &tree.Layer, Options{}); !errors.Is(err, ErrLayer) {
				t.Errorf("Write: %v, want ErrLayer", err)
			} else {
				t.Log(err)
			}
		})
	}
}

type failing struct{ after int }

func (f *failing) Write(p []byte) (int, error) {
	if f.after--; f.after < 0 {
		return 0, unix.ENOSPC
	}
	return len(p), nil
}

func TestWriteError(t *testing.T) {
	tree := trees()["10k entries"]
	for after := range 3 {
		if err := Write(&failing{after}, &tree.Layer, Options{}); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("Write: %v, want ENOSPC", err)
		}
	}
}

// The image of 104,001 inodes, which must take less than half a second.
func BenchmarkWrite(b *testing.B) {
	tree := newTree()
	for d := range 8000 {
		dir := fmt.Sprintf("dir%04d", d)
		tree.add(dir, layer.Inode{Mode: unix.S_IFDIR | 0o755, Mtime: int64(d)})
		for f := range 11 {
			tree.add(fmt.Sprintf("%s/file%d.name", dir, f), layer.Inode{Mode: unix.S_IFREG | 0o644, Size: int64(f * 1000), Mtime: int64(f)})
		}
		tree.add(dir+"/link", layer.Inode{Mode: unix.S_IFLNK | 0o777, Target: "file1.name"})
	}
	var n count
	b.ReportAllocs()
	for b.Loop() {
		n = 0
		if err := Write(&n, &tree.Layer, Options{}); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(n))
	if took := b.Elapsed() / time.Duration(b.N); took > time.Second/2 {
		b.Errorf("%v for %d inodes, want at most 500ms", took, len(tree.Inodes))
	}
}

type count int64

func (c *count) Write(p []byte) (int, error) { *c += count(len(p)); return len(p), nil }

func write(t *testing.T, l *layer.Layer, opt Options) []byte {
	t.Helper()
	var img bytes.Buffer
	if err := Write(&img, l, opt); err != nil {
		t.Fatal(err)
	}
	if img.Len()%BlockSize != 0 {
		t.Fatalf("an image of %d bytes", img.Len())
	}
	return img.Bytes()
}

// readByGo reads an image by go-erofs v0.3.1, which reads whole blocks of shared extended attributes at any offset, so
// a block more than the image has, and knows no set-id and sticky bits: [compareGo].
func readByGo(t *testing.T, img, data []byte) map[string]node {
	t.Helper()
	img = append(slices.Clip(img), zeros[:]...)
	fsys, err := goerofs.Open(bytes.NewReader(img), goerofs.WithExtraDevices(bytes.NewReader(data)))
	if err != nil {
		t.Fatal(err)
	}
	seen, first := map[string]node{}, map[int64]string{}
	err = fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*goerofs.Stat)
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = p
		}
		xattrs := map[string]string{}
		for k, v := range st.Xattrs {
			xattrs[strings.TrimSuffix(k, ".")] = v // of POSIX ACLs
		}
		n := node{mode: unixMode(fi.Mode()), uid: st.UID, gid: st.GID, nlink: uint64(st.Nlink), mtime: int64(st.Mtime), nsec: st.MtimeNs, xattrs: xattrText(xattrs), link: first[st.Ino]}
		switch fi.Mode().Type() {
		case 0:
			content, err := fs.ReadFile(fsys, p)
			if err != nil {
				return err
			}
			n.size, n.digest = fi.Size(), sum(content)
		case fs.ModeSymlink:
			n.size = fi.Size()
			if n.target, err = fs.ReadLink(fsys, p); err != nil {
				return err
			}
		case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
			n.rdev = st.Rdev
		}
		seen[p] = n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

func compareGo(t *testing.T, got, want map[string]node) {
	t.Helper()
	want = maps.Clone(want)
	for p, n := range want {
		n.mode &^= unix.S_ISUID | unix.S_ISGID | unix.S_ISVTX
		want[p] = n
	}
	compare(t, "go-erofs", got, want)
}

func unixMode(m fs.FileMode) uint32 {
	return uint32(m.Perm()) | map[fs.FileMode]uint32{
		0: unix.S_IFREG, fs.ModeDir: unix.S_IFDIR, fs.ModeSymlink: unix.S_IFLNK, fs.ModeDevice: unix.S_IFBLK,
		fs.ModeDevice | fs.ModeCharDevice: unix.S_IFCHR, fs.ModeNamedPipe: unix.S_IFIFO, fs.ModeSocket: unix.S_IFSOCK,
	}[m.Type()]
}

func readByKernel(t *testing.T, root string) map[string]node {
	t.Helper()
	seen, first := map[string]node{}, map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		at, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = at
		}
		n := node{mode: st.Mode, uid: st.Uid, gid: st.Gid, nlink: uint64(st.Nlink), mtime: st.Mtim.Sec, nsec: uint32(st.Mtim.Nsec), link: first[st.Ino]}
		if n.xattrs, err = xattrsByKernel(p); err != nil {
			return fmt.Errorf("%q: xattrs: %w", p, err)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			n.size, n.digest = st.Size, sum(content)
		case unix.S_IFLNK:
			n.size = st.Size
			if n.target, err = os.Readlink(p); err != nil {
				return err
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			n.rdev = uint32(st.Rdev)
		}
		seen[at] = n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

func xattrsByKernel(p string) (string, error) {
	list := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, list)
	if err != nil {
		return "", err
	}
	xattrs := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		xattrs[name] = string(value[:n])
	}
	return xattrText(xattrs), nil
}
