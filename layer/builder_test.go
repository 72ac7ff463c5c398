package layer_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// An entry feeds a Builder with an entry of a blob. Blob is where the next frame begins.
type entry func(b *layer.Builder, blob *int64) error

// attr changes what an entry says about its inode.
type attr func(*layer.Inode)

func mode(perm uint32) attr { return func(in *layer.Inode) { in.Mode = in.Mode&unix.S_IFMT | perm } }
func owner(uid, gid uint32) attr {
	return func(in *layer.Inode) { in.UID, in.GID = uid, gid }
}
func mtime(sec int64, nsec uint32) attr {
	return func(in *layer.Inode) { in.Mtime, in.MtimeNsec = sec, nsec }
}
func xattr(name, value string) attr {
	return func(in *layer.Inode) { in.Xattrs = append(in.Xattrs, layer.Xattr{Name: name, Value: []byte(value)}) }
}

func inode(in layer.Inode, attrs []attr) layer.Inode {
	for _, a := range attrs {
		a(&in)
	}
	return in
}

func add(name string, in layer.Inode, attrs ...attr) entry {
	return func(b *layer.Builder, _ *int64) error { return b.Add(name, inode(in, attrs)) }
}

func dir(name string, attrs ...attr) entry {
	return add(name, layer.Inode{Mode: unix.S_IFDIR | 0o755}, attrs...)
}

func fifo(name string) entry { return add(name, layer.Inode{Mode: unix.S_IFIFO | 0o644}) }

func node(name string, kind, major, minor uint32) entry {
	return add(name, layer.Inode{Mode: kind | 0o600, Major: major, Minor: minor})
}

func symlink(name, target string, attrs ...attr) entry {
	return add(name, layer.Inode{Mode: unix.S_IFLNK | 0o777, Target: target}, attrs...)
}

func link(name, target string, attrs ...attr) entry {
	return func(b *layer.Builder, _ *int64) error {
		return b.Link(name, target, inode(layer.Inode{Mode: 0o644}, attrs))
	}
}

// file has its content in a frame and a chunk of its own.
func file(name, content string, attrs ...attr) entry {
	return func(b *layer.Builder, blob *int64) error {
		size := int64(len(content))
		if err := b.Add(name, inode(layer.Inode{Mode: unix.S_IFREG | 0o644, Size: size}, attrs)); err != nil || size == 0 {
			return err
		}
		err := errors.Join(b.Frame(*blob), b.Chunk(0, size, 0, sha256.Sum256([]byte(content))))
		*blob += 100
		return err
	}
}

// raw is a regular file of a size without its chunks.
func raw(name string, size int64) entry {
	return add(name, layer.Inode{Mode: unix.S_IFREG, Size: size})
}

func frame(offset int64) entry {
	return func(b *layer.Builder, _ *int64) error { return b.Frame(offset) }
}

func chunk(off, size, inner int64) entry {
	return func(b *layer.Builder, _ *int64) error { return b.Chunk(off, size, inner, [32]byte{}) }
}

func build(opt layer.BuilderOptions, entries ...entry) (*layer.Layer, error) {
	b := layer.NewBuilder(opt)
	blob := int64(100)
	for _, e := range entries {
		if err := e(b, &blob); err != nil {
			return nil, err
		}
	}
	return b.Build(max(blob, 5000), nil)
}

func TestTree(t *testing.T) {
	long := strings.Repeat("n", 255)
	for name, tc := range map[string]struct {
		in   []entry
		want []string
	}{
		"nothing": {},
		"names are cleaned": {
			in:   []entry{dir("./"), dir("./a/"), file("/a//b", "x"), file("a/./c", ""), file("d\\\n\xff e", ""), fifo(long)},
			want: []string{"d 755 a/", "- 644 a/b 1", "- 644 a/c 0", "- 644 d\\\n\xff e 0", "p 644 " + long},
		},
		"bytewise order": {
			in:   []entry{file("b", ""), file("a.b", ""), file("a/c", ""), file("B", ""), file("é", "")},
			want: []string{"- 644 B 0", "d 755 a/ implied", "- 644 a/c 0", "- 644 a.b 0", "- 644 b 0", "- 644 é 0"},
		},
		"types": {
			in: []entry{
				node("c", unix.S_IFCHR, 1, 3), node("b", unix.S_IFBLK, 4095, 1<<20-1), fifo("f"), symlink("l", "../../etc"),
				add("s", layer.Inode{Mode: unix.S_IFIFO | 0o7755}),
			},
			want: []string{"b 600 b 4095:1048575", "c 600 c 1:3", "p 644 f", "l l -> ../../etc", "p 7755 s"},
		},
		"attributes": {
			in:   []entry{file("f", "x", mode(0o4755), owner(1, 4294967295), mtime(-5, 999999999), xattr("user.b", "2"), xattr("user.a", "1"))},
			want: []string{"- 4755 f 1 1:4294967295 mtime:-5.999999999 user.a=1 user.b=2"},
		},
		"implied until there is an entry": {
			in:   []entry{file("a/b/c", ""), dir("a/b", mode(0o700))},
			want: []string{"d 755 a/ implied", "d 700 a/b/", "- 644 a/b/c 0"},
		},
		"a directory over a directory": {
			in: []entry{
				dir("a", owner(1, 1), xattr("user.a", "1"), xattr("user.b", "1")), file("a/.wh..wh..opq", ""), file("a/b", ""),
				dir("a", mode(0o711), xattr("user.b", "2")),
			},
			want: []string{"d 711 a/ opaque user.a=1 user.b=2", "- 644 a/b 0"},
		},
		"a file over a directory, and back": {
			in: []entry{
				dir("a"), file("a/b/c", "xyz"), file("a/.wh.x", ""), file("a/.wh..wh..opq", ""), file("a", "x"),
				dir("a"), file("a/d", ""),
			},
			want: []string{"d 755 a/", "- 644 a/d 0"},
		},
		"a file over a file": {
			in:   []entry{file("a", "x", owner(1, 1), xattr("user.a", "1")), file("a", "xyz")},
			want: []string{"- 644 a 3"},
		},
		"a directory over a symlink": {
			in:   []entry{symlink("a", "b"), dir("a"), file("a/c", "")},
			want: []string{"d 755 a/", "- 644 a/c 0"},
		},
		"hardlinks": {
			in:   []entry{file("b", "x"), link("a", "./b"), link("d/c", "/b"), symlink("s", "t"), link("s2", "s")},
			want: []string{"- 644 a 1", "- 644 b 1 =a", "d 755 d/ implied", "- 644 d/c 1 =a", "l s -> t", "l s2 -> t =s"},
		},
		"a hardlink's attributes": {
			in:   []entry{file("a", "x", owner(1, 1), xattr("user.a", "1")), link("b", "a", mode(0o600), mtime(7, 0), xattr("user.b", "2"))},
			want: []string{"- 600 a 1 mtime:7 user.a=1 user.b=2", "- 600 b 1 =a mtime:7 user.a=1 user.b=2"},
		},
		"a hardlink takes capabilities that it doesn't have": {
			in: []entry{
				file("a", "", xattr("security.capability", "a"), xattr("user.a", "1")), link("b", "a"),
				file("c", "", xattr("security.capability", "c")), link("d", "c", xattr("security.capability", "d")),
			},
			want: []string{"- 644 a 0 user.a=1", "- 644 b 0 =a user.a=1", "- 644 c 0 security.capability=d", "- 644 d 0 =c security.capability=d"},
		},
		"a hardlink before its target": {
			in:   []entry{link("a", "b", mode(0o600)), link("b", "d/c"), file("d/c", "x")},
			want: []string{"- 644 a 1", "- 644 b 1 =a", "d 755 d/ implied", "- 644 d/c 1 =a"},
		},
		"a hardlink keeps what its target replaces": {
			in:   []entry{file("a", "x"), link("b", "a"), file("a", "xyz")},
			want: []string{"- 644 a 3", "- 644 b 1"},
		},
		"a hardlink is replaced": {
			in:   []entry{link("a", "nowhere"), file("a", "x"), file("b", "xyz"), link("c", "b"), file("c", "")},
			want: []string{"- 644 a 1", "- 644 b 3", "- 644 c 0"},
		},
		"whiteouts": {
			in:   []entry{file("a/.wh.b", "", owner(3, 4), mtime(7, 0)), file("a/.wh..wh.aufs", ""), file("a/.wh...x", "")},
			want: []string{"d 755 a/ implied", "whiteout a/..x", "whiteout a/.wh.aufs", "whiteout a/b 3:4 mtime:7"},
		},
		"whiteouts give way": {
			in: []entry{
				file(".wh.a", ""), file("a", ""), file("b", ""), file(".wh.b", ""), file("c/d", ""), file(".wh.c", ""),
				file(".wh.x", ""), link(".wh.x", "a"),
			},
			want: []string{"- 644 a 0", "- 644 b 0", "d 755 c/ implied", "- 644 c/d 0", "whiteout x"},
		},
		"opaque directories": {
			in:   []entry{file("a/.wh..wh..opq", ""), file("b/.wh..wh..opq", ""), dir("b"), file(".wh..wh..opq", "")},
			want: []string{"d 755 a/ implied opaque", "d 755 b/ opaque"},
		},
		"xattrs that the applier leaves out": {
			in: []entry{
				file("f", "", xattr("trusted.overlay.redirect", "/etc"), xattr("security.capability", "c"), xattr("nonsense", ""),
					xattr("system.nfs4_acl", "n"), xattr("user.", ""), xattr("user.a", "1"), xattr("user.a", "2")),
				symlink("l", "t", xattr("user.a", "1"), xattr("security.selinux", "s"), xattr("system.posix_acl_access", acl())),
			},
			want: []string{"- 644 f 0 security.capability=c user.a=2", "l l -> t security.selinux=s"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := build(layer.BuilderOptions{}, tc.in...)
			if err != nil {
				t.Fatal(err)
			}
			layertest.Check(t, l)
			if got := layertest.Tree(l); !slices.Equal(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}

func TestRoot(t *testing.T) {
	l, err := build(layer.BuilderOptions{}, file("a", ""))
	if err != nil {
		t.Fatal(err)
	}
	if root := l.Inodes[layer.Root]; !root.Implied || root.Mode != unix.S_IFDIR|0o755 || root.Nlink != 2 {
		t.Errorf("without an entry: %+v", root)
	}
	l, err = build(layer.BuilderOptions{}, dir("a"), dir("./", mode(0o1700), owner(1, 2), xattr("user.a", "1")), file(".wh..wh..opq", ""))
	if err != nil {
		t.Fatal(err)
	}
	if root := l.Inodes[layer.Root]; !root.Implied || root.Mode != unix.S_IFDIR|0o755 || root.Nlink != 3 || root.UID != 0 || len(root.Xattrs) > 0 || !root.Opaque {
		t.Errorf("with an entry, which containerd leaves out: %+v", root)
	}
}

// The same entries always give the same layer: its inode numbers are in snapshots.
func TestDeterministic(t *testing.T) {
	in := []entry{file("b/c/d", "x"), file("b/.wh.a", ""), link("x", "y"), link("y", "b/c/d"), dir("a"), file("a/b", "y"), fifo("a/c")}
	first, err := build(layer.BuilderOptions{}, in...)
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		again, err := build(layer.BuilderOptions{}, in...)
		if err != nil {
			t.Fatal(err)
		}
		if a, b := fmt.Sprintf("%+v", first), fmt.Sprintf("%+v", again); a != b {
			t.Fatalf("%s\nthen\n%s", a, b)
		}
	}
}

func TestContent(t *testing.T) {
	type data struct{ at, size int64 }
	for name, tc := range map[string]struct {
		in     []entry
		files  map[string]data
		frames []layer.Frame
		chunks []layer.Chunk
		size   int64
	}{
		"block-aligned, in the order of the blob": {
			in:     []entry{file("b", "xyz"), file("e", ""), file("a", strings.Repeat("x", 4097)), file("c", "x")},
			files:  map[string]data{"b": {0, 3}, "e": {0, 0}, "a": {4096, 4097}, "c": {12288, 1}},
			frames: []layer.Frame{{Offset: 100, Size: 100, NumChunks: 1}, {Offset: 200, Size: 100, FirstChunk: 1, NumChunks: 1}, {Offset: 300, Size: 4700, FirstChunk: 2, NumChunks: 1}},
			chunks: []layer.Chunk{{Data: 0, Size: 3}, {Data: 4096, Size: 4097, Frame: 1}, {Data: 12288, Size: 1, Frame: 2}},
			size:   16384,
		},
		"a replaced file takes no space, and ends the frame before": {
			in:     []entry{file("a", "x"), file("b", "y"), file("c", "z"), file("b", "")},
			files:  map[string]data{"a": {0, 1}, "b": {0, 0}, "c": {4096, 1}},
			frames: []layer.Frame{{Offset: 100, Size: 100, NumChunks: 1}, {Offset: 300, Size: 4700, FirstChunk: 1, NumChunks: 1}},
			chunks: []layer.Chunk{{Data: 0, Size: 1}, {Data: 4096, Size: 1, Frame: 1}},
			size:   8192,
		},
		"a replaced file that a hardlink keeps": {
			in:     []entry{file("a", "x"), link("b", "a"), dir("a")},
			files:  map[string]data{"b": {0, 1}},
			frames: []layer.Frame{{Offset: 100, Size: 4900, NumChunks: 1}},
			chunks: []layer.Chunk{{Data: 0, Size: 1}},
			size:   4096,
		},
		"chunks of several files in a frame, of a file in several frames": {
			in: []entry{
				raw("a", 10), frame(100), chunk(0, 10, 5), raw("b", 30), chunk(0, 10, 512), frame(200), frame(300), chunk(10, 20, 0),
				raw("c", 5), frame(300), chunk(0, 5, 20),
			},
			files:  map[string]data{"a": {0, 10}, "b": {4096, 30}, "c": {8192, 5}},
			frames: []layer.Frame{{Offset: 100, Size: 100, NumChunks: 2}, {Offset: 300, Size: 4700, FirstChunk: 2, NumChunks: 2}},
			chunks: []layer.Chunk{
				{Data: 0, Size: 10, Inner: 5}, {Data: 4096, Size: 10, Inner: 512},
				{Data: 4106, Size: 20, Frame: 1}, {Data: 8192, Size: 5, Frame: 1, Inner: 20},
			},
			size: 12288,
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := build(layer.BuilderOptions{}, tc.in...)
			if err != nil {
				t.Fatal(err)
			}
			layertest.Check(t, l)
			for path, want := range tc.files {
				i, err := l.Lookup(path)
				if err != nil {
					t.Error(err)
					continue
				}
				in := l.Inodes[i]
				if (data{in.Data, in.Size}) != want {
					t.Errorf("%s: %d bytes at %d, want %+v", path, in.Size, in.Data, want)
				}
				if back, _ := l.Path(i); back != path {
					t.Errorf("path of %s: %s", path, back)
				}
				if of, ok := l.FileAt(int(in.FirstChunk)); in.NumChunks > 0 && (!ok || of != i) {
					t.Errorf("%s: its chunk belongs to inode %d", path, of)
				}
			}
			for i := range l.Chunks {
				l.Digests[i] = [32]byte{}
			}
			if !slices.Equal(l.Frames, tc.frames) {
				t.Errorf("frames %+v\nwant %+v", l.Frames, tc.frames)
			}
			if !slices.Equal(l.Chunks, tc.chunks) {
				t.Errorf("chunks %+v\nwant %+v", l.Chunks, tc.chunks)
			}
			if l.DataSize != tc.size {
				t.Errorf("data space of %d, want %d", l.DataSize, tc.size)
			}
		})
	}
}

func TestInvalid(t *testing.T) {
	long := strings.Repeat("n", 256)
	manyXattrs := func(in *layer.Inode) {
		for i := range 300 {
			xattr(fmt.Sprintf("user.%0240d", i), "")(in)
		}
	}
	for name, tc := range map[string]struct {
		opt   layer.BuilderOptions
		in    []entry
		want  error
		entry string
	}{
		"upwards":                     {in: []entry{file("../a", "")}, want: layer.ErrName, entry: "../a"},
		"upwards and down":            {in: []entry{file("a/../b", "")}, want: layer.ErrName, entry: "a/../b"},
		"nothing but upwards":         {in: []entry{dir("/..")}, want: layer.ErrName, entry: "/.."},
		"NUL":                         {in: []entry{file("a\x00b", "")}, want: layer.ErrName, entry: "a\x00b"},
		"long name":                   {in: []entry{file("a/"+long, "")}, want: layer.ErrName, entry: "a/" + long},
		"long path":                   {in: []entry{file(strings.Repeat("a/", 2049), "")}, want: layer.ErrName},
		"root isn't a directory":      {in: []entry{file(".", "x")}, want: layer.ErrAttr, entry: "."},
		"below a file":                {in: []entry{file("a", "x"), file("a/b", "x")}, want: layer.ErrParent, entry: "a/b"},
		"below a symlink":             {in: []entry{symlink("a", "/"), file("a/b", "x")}, want: layer.ErrParent, entry: "a/b"},
		"below a hardlink":            {in: []entry{link("a", "c"), file("a/b", "x")}, want: layer.ErrParent, entry: "a/b"},
		"whiteout of nothing":         {in: []entry{file("a/.wh.", "")}, want: layer.ErrName, entry: "a/.wh."},
		"whiteout of the directory":   {in: []entry{file("a/.wh..", "")}, want: layer.ErrName, entry: "a/.wh.."},
		"whiteout of the parent":      {in: []entry{file("a/.wh...", "")}, want: layer.ErrName, entry: "a/.wh..."},
		"whiteout with content":       {in: []entry{raw(".wh.a", 1)}, want: layer.ErrContent, entry: ".wh.a"},
		"no type":                     {in: []entry{add("a", layer.Inode{Mode: 0o644})}, want: layer.ErrAttr, entry: "a"},
		"nanoseconds":                 {in: []entry{dir("a", mtime(0, 1e9))}, want: layer.ErrAttr, entry: "a"},
		"negative size":               {in: []entry{raw("a", -1)}, want: layer.ErrAttr, entry: "a"},
		"size over the limit":         {in: []entry{raw("a", math.MaxInt64)}, want: layer.ErrLimit, entry: "a"},
		"device number":               {in: []entry{node("a", unix.S_IFCHR, 1<<12, 0)}, want: layer.ErrAttr, entry: "a"},
		"symlink to nothing":          {in: []entry{symlink("a", "")}, want: layer.ErrAttr, entry: "a"},
		"symlink to NUL":              {in: []entry{symlink("a", "b\x00")}, want: layer.ErrAttr, entry: "a"},
		"symlink to much":             {in: []entry{symlink("a", strings.Repeat("x", 4096))}, want: layer.ErrLimit, entry: "a"},
		"xattr without a name":        {in: []entry{dir("a", xattr("", "x"))}, want: layer.ErrAttr, entry: "a"},
		"xattr's name":                {in: []entry{dir("a", xattr("user."+long, "x"))}, want: layer.ErrLimit, entry: "a"},
		"xattr's value":               {in: []entry{dir("a", xattr("user.a", strings.Repeat("x", 65537)))}, want: layer.ErrLimit, entry: "a"},
		"many xattrs":                 {in: []entry{dir("a", manyXattrs)}, want: layer.ErrLimit, entry: "a"},
		"hardlink to nothing":         {in: []entry{link("a", "b")}, want: layer.ErrLink, entry: "a"},
		"hardlink upwards":            {in: []entry{link("a", "../b")}, want: layer.ErrLink, entry: "a"},
		"hardlink to itself":          {in: []entry{file("a", "x"), link("a", "a")}, want: layer.ErrLink, entry: "a"},
		"hardlinks in a circle":       {in: []entry{link("a", "b"), link("b", "c"), link("c", "a")}, want: layer.ErrLink, entry: "a"},
		"hardlink to a directory":     {in: []entry{dir("d"), link("a", "d")}, want: layer.ErrLink, entry: "a"},
		"hardlink to a directory yet": {in: []entry{link("a", "d"), dir("d")}, want: layer.ErrLink, entry: "a"},
		"hardlink to the root":        {in: []entry{link("a", "/")}, want: layer.ErrLink, entry: "a"},
		"hardlink as the root":        {in: []entry{file("a", ""), link("/", "a")}, want: layer.ErrLink, entry: "/"},
		"hardlink to what it removes": {in: []entry{file("a/b", "x"), link("a", "a/b")}, want: layer.ErrLink, entry: "a"},
		"hardlink to a whiteout":      {in: []entry{file(".wh.b", ""), link("a", "b")}, want: layer.ErrLink, entry: "a"},
		"no chunks":                   {in: []entry{raw("a", 1)}, want: layer.ErrContent, entry: "a"},
		"no chunks, and an entry":     {in: []entry{raw("a", 1), dir("b")}, want: layer.ErrContent, entry: "a"},
		"no chunks, and a hardlink":   {in: []entry{raw("a", 1), link("b", "a")}, want: layer.ErrContent, entry: "a"},
		"chunks end early":            {in: []entry{raw("a", 9), frame(1), chunk(0, 8, 0)}, want: layer.ErrContent, entry: "a"},
		"chunks end late":             {in: []entry{raw("a", 9), frame(1), chunk(0, 10, 0)}, want: layer.ErrContent, entry: "a"},
		"gap":                         {in: []entry{raw("a", 9), frame(1), chunk(0, 4, 0), chunk(5, 4, 0)}, want: layer.ErrContent, entry: "a"},
		"overlap":                     {in: []entry{raw("a", 9), frame(1), chunk(0, 5, 0), chunk(4, 5, 5)}, want: layer.ErrContent, entry: "a"},
		"empty chunk":                 {in: []entry{raw("a", 9), frame(1), chunk(0, 0, 0)}, want: layer.ErrContent, entry: "a"},
		"negative chunk":              {in: []entry{raw("a", 9), frame(1), chunk(0, -1, 0)}, want: layer.ErrContent, entry: "a"},
		"chunk that overflows":        {in: []entry{raw("a", 9), frame(1), chunk(0, 5, 0), chunk(5, math.MaxInt64, 5)}, want: layer.ErrContent, entry: "a"},
		"chunk of no file":            {in: []entry{file("a", "x"), chunk(0, 1, 0)}, want: layer.ErrContent},
		"chunk in no frame":           {in: []entry{raw("a", 9), chunk(0, 9, 0)}, want: layer.ErrContent, entry: "a"},
		"chunk of a gigabyte":         {in: []entry{raw("a", 1<<30), frame(1), chunk(0, 1<<30, 0)}, want: layer.ErrLimit, entry: "a"},
		"negative inner offset":       {in: []entry{raw("a", 9), frame(1), chunk(0, 9, -1)}, want: layer.ErrContent, entry: "a"},
		"inner offset that overflows": {in: []entry{raw("a", 9), frame(1), chunk(0, 9, math.MaxInt64)}, want: layer.ErrContent, entry: "a"},
		"chunks overlap in a frame":   {in: []entry{raw("a", 9), frame(1), chunk(0, 5, 0), chunk(5, 4, 4)}, want: layer.ErrContent, entry: "a"},
		"frames out of order":         {in: []entry{raw("a", 9), frame(9), chunk(0, 5, 0), frame(8), chunk(5, 4, 0)}, want: layer.ErrContent, entry: "a"},
		"frame before the blob":       {in: []entry{raw("a", 9), frame(-1)}, want: layer.ErrContent, entry: "a"},
		"frame behind the blob":       {in: []entry{raw("a", 9), frame(5000), chunk(0, 9, 0)}, want: layer.ErrContent, entry: "a"},
		"bomb": {
			opt: layer.BuilderOptions{MaxRatio: 10}, want: layer.ErrContent, entry: "d/a",
			in: []entry{raw("d/a", 101), frame(1), chunk(0, 101, 0), frame(11)},
		},
		"too much content": {in: []entry{sparse("a", 3<<40), sparse("b", 1<<40)}, want: layer.ErrLimit, entry: "b"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := build(tc.opt, tc.in...)
			if !errors.Is(err, tc.want) || !errors.Is(err, fs.ErrInvalid) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			bad, ok := errors.AsType[*layer.EntryError](err)
			if !ok {
				t.Fatalf("%v names no entry", err)
			}
			if tc.entry != "" && bad.Name != tc.entry {
				t.Errorf("%v, want entry %q", err, tc.entry)
			}
		})
	}
}

// sparse is a file of a size in the largest chunks that there are, each in a frame of a byte.
func sparse(name string, size int64) entry {
	return func(b *layer.Builder, blob *int64) error {
		if err := b.Add(name, layer.Inode{Mode: unix.S_IFREG, Size: size}); err != nil {
			return err
		}
		for off := int64(0); off < size; off += layer.MaxChunkSize {
			if err := errors.Join(b.Frame(*blob), b.Chunk(off, min(layer.MaxChunkSize, size-off), 0, [32]byte{})); err != nil {
				return err
			}
			*blob++
		}
		return nil
	}
}

func TestLimits(t *testing.T) {
	t.Run("a million entries", func(t *testing.T) {
		b := layer.NewBuilder(layer.BuilderOptions{})
		var err error
		n := 0
		for ; n < 1_000_000 && err == nil; n++ {
			err = b.Add("a", layer.Inode{Mode: unix.S_IFDIR})
		}
		if !errors.Is(err, layer.ErrLimit) || n != layer.MaxEntries+1 {
			t.Errorf("after %d entries: %v", n, err)
		}
	})
	t.Run("a million implied directories", func(t *testing.T) {
		b := layer.NewBuilder(layer.BuilderOptions{})
		var err error
		for i := 0; i < 1000 && err == nil; i++ {
			err = b.Add(fmt.Sprint(i, strings.Repeat("/a", 1000)), layer.Inode{Mode: unix.S_IFDIR})
		}
		if !errors.Is(err, layer.ErrLimit) {
			t.Error(err)
		}
	})
	t.Run("chunks", func(t *testing.T) {
		size := int64(layer.MaxChunks + 1)
		in := []entry{raw("a", size), frame(1)}
		for i := range size {
			in = append(in, chunk(i, 1, i))
		}
		if _, err := build(layer.BuilderOptions{}, in...); !errors.Is(err, layer.ErrLimit) {
			t.Error(err)
		}
	})
	t.Run("long circle of hardlinks", func(t *testing.T) {
		var in []entry
		const n = 100_000
		for i := range n {
			in = append(in, link(fmt.Sprint(i), fmt.Sprint((i+1)%n)))
		}
		if _, err := build(layer.BuilderOptions{}, in...); !errors.Is(err, layer.ErrLink) {
			t.Error(err)
		}
	})
	t.Run("deep", func(t *testing.T) {
		l, err := build(layer.BuilderOptions{}, file(strings.Repeat("a/", 2000)+"b", "x"))
		if err != nil {
			t.Fatal(err)
		}
		layertest.Check(t, l)
	})
}
