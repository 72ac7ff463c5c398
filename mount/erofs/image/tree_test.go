package image

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A tree makes a layer entry by entry. Paths have no leading slash; parents come first.
type tree struct {
	layer.Layer
	byPath map[string]uint32
}

func newTree() *tree {
	return &tree{
		Layer:  layer.Layer{Inodes: []layer.Inode{{Mode: unix.S_IFDIR | 0o755, Nlink: 2}}},
		byPath: map[string]uint32{"": 0},
	}
}

// add gives in the name p, and returns the inode's index.
func (t *tree) add(p string, in layer.Inode) uint32 {
	i := uint32(len(t.Inodes))
	if in.IsRegular() {
		in.Data = t.DataSize
		t.DataSize = align(t.DataSize+in.Size, BlockSize)
	}
	if in.IsDir() {
		in.Nlink = 1 // and its name
	}
	if in.Mode&unix.S_IFMT == unix.S_IFLNK {
		in.Size = int64(len(in.Target))
	}
	slices.SortFunc(in.Xattrs, func(a, b layer.Xattr) int { return strings.Compare(a.Name, b.Name) })
	t.Inodes = append(t.Inodes, in)
	t.byPath[p] = i
	t.link(p, i)
	return i
}

// link gives inode i the name p.
func (t *tree) link(p string, i uint32) {
	dir, name := path.Split(p)
	parent := t.byPath[strings.TrimSuffix(dir, "/")]
	entries := t.Inodes[parent].Entries
	at, found := slices.BinarySearchFunc(entries, name, func(e layer.Entry, name string) int { return strings.Compare(e.Name, name) })
	if found {
		panic(p + " is there already")
	}
	t.Inodes[parent].Entries = slices.Insert(entries, at, layer.Entry{Name: name, Inode: i})
	t.Inodes[i].Nlink++
	if t.Inodes[i].IsDir() {
		t.Inodes[parent].Nlink++
	}
}

// content is what the data space holds.
func content(size int64) []byte {
	b := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(b)
	return b
}

// A node is what any reader can say of a path. Nodes of hardlinks have the same name in link.
type node struct {
	mode, uid, gid, rdev uint32
	nlink                uint64
	size                 int64
	mtime                int64
	nsec                 uint32
	target, digest       string
	xattrs               string
	link                 string
}

// nodes returns what the layer is to look like.
func nodes(l *layer.Layer, opt Options, data []byte) map[string]node {
	p := plan{l: l, opt: opt}
	seen := map[string]node{}
	first := map[uint32]string{}
	var visit func(at string, i uint32)
	visit = func(at string, i uint32) {
		in := &l.Inodes[i]
		if _, ok := first[i]; !ok {
			first[i] = at
		}
		n := node{mode: in.Mode, uid: in.UID, gid: in.GID, nlink: uint64(in.Nlink), mtime: in.Mtime, nsec: in.MtimeNsec, link: first[i]}
		xattrs := map[string]string{}
		for _, x := range p.xattrsOf(i) {
			if _, _, ok := splitXattr(x.Name); ok {
				xattrs[x.Name] = string(x.Value)
			}
		}
		n.xattrs = xattrText(xattrs)
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			n.size = in.Size
			n.digest = sum(data[in.Data : in.Data+in.Size])
		case unix.S_IFLNK:
			n.size, n.target = in.Size, in.Target
		case unix.S_IFCHR, unix.S_IFBLK:
			n.rdev = uint32(unix.Mkdev(in.Major, in.Minor))
		}
		seen[at] = n
		for _, e := range in.Entries {
			visit(path.Join(at, e.Name), e.Inode)
		}
	}
	visit(".", layer.Root)
	return seen
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:8])
}

func xattrText(m map[string]string) string {
	var s strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&s, "%q=%d:%s ", k, len(m[k]), sum([]byte(m[k])))
	}
	return s.String()
}

func compare(t *testing.T, who string, got, want map[string]node) {
	t.Helper()
	for _, p := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[p]
		if !ok {
			t.Errorf("%s: %q is missing", who, p)
		} else if g != want[p] {
			t.Errorf("%s: %q:\n got %+v\nwant %+v", who, p, g, want[p])
		}
		if t.Failed() {
			break
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Fatalf("%s: %q should not be there", who, p)
		}
	}
}

// randomTree makes a layer of up to n inodes, of all kinds.
func randomTree(rng *rand.Rand, n int) *tree {
	t := newTree()
	dirs := []string{""}
	var files []uint32
	shared := make([][]byte, 3)
	for i := range shared {
		shared[i] = randomBytes(rng, rng.IntN(60))
	}
	epoch := rng.Int64N(2e9)
	for range n {
		dir := dirs[rng.IntN(len(dirs))]
		if rng.IntN(2) == 0 {
			dir = dirs[len(dirs)-1] // deep ones
		}
		name := randomName(rng)
		p := path.Join(dir, name)
		if _, ok := t.byPath[p]; ok || len(p) > 3000 { // the kernel takes paths of 4095 bytes
			continue
		}
		in := layer.Inode{Mode: rng.Uint32N(0o10000), UID: rng.Uint32N(3) * 40000, GID: rng.Uint32N(100), Mtime: epoch}
		if rng.IntN(2) == 0 {
			in.Mtime, in.MtimeNsec = rng.Int64N(1e10)-1e9, rng.Uint32N(1e9)
		}
		plain := true // may have user. attributes
		switch rng.IntN(12) {
		case 0, 1, 2:
			in.Mode |= unix.S_IFDIR
			in.Opaque = rng.IntN(5) == 0
			dirs = append(dirs, p)
		case 3:
			in.Mode |= unix.S_IFLNK | 0o777
			in.Target = strings.Repeat("../x", 1+rng.IntN(20))
			if rng.IntN(5) == 0 {
				in.Target = strings.Repeat("y", 1+rng.IntN(maxTarget))
			}
			plain = false
		case 4:
			in.Mode |= []uint32{unix.S_IFCHR, unix.S_IFBLK}[rng.IntN(2)]
			in.Major, in.Minor = rng.Uint32N(1<<12), rng.Uint32N(1<<20)
			plain = false
		case 5:
			in.Mode |= []uint32{unix.S_IFIFO, unix.S_IFSOCK}[rng.IntN(2)]
			plain = false
		case 6:
			in.Mode |= unix.S_IFCHR // a whiteout
			plain = false
		case 7:
			if len(files) > 0 {
				i := files[rng.IntN(len(files))]
				t.byPath[p] = i
				t.link(p, i)
				continue
			}
			fallthrough
		default:
			in.Mode |= unix.S_IFREG
			if rng.IntN(4) > 0 {
				in.Size = rng.Int64N(5 * BlockSize)
			}
			files = append(files, uint32(len(t.Inodes)))
		}
		if rng.IntN(4) == 0 {
			in.Xattrs = append(in.Xattrs, layer.Xattr{Name: "trusted.shared", Value: shared[rng.IntN(3)]})
		}
		if rng.IntN(10) == 0 {
			in.Xattrs = append(in.Xattrs, layer.Xattr{Name: "security.capability", Value: capability})
		}
		if rng.IntN(10) == 0 {
			in.Xattrs = append(in.Xattrs, layer.Xattr{Name: "com.example.unknown", Value: capability})
		}
		if plain && rng.IntN(10) == 0 {
			for i := range rng.IntN(6) {
				in.Xattrs = append(in.Xattrs, layer.Xattr{Name: fmt.Sprintf("user.%d%s", i, strings.Repeat("n", rng.IntN(249))), Value: randomBytes(rng, rng.IntN(9000))})
			}
		}
		t.add(p, in)
	}
	return t
}

// capability is a VFS_CAP_REVISION_2 with CAP_NET_RAW: the kernel refuses to hand out what is none.
var capability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// randomName returns anything that may be a name: of 255 bytes, before "." in the order, not UTF-8.
func randomName(rng *rand.Rand) string {
	n := 1 + rng.IntN(20)
	if rng.IntN(10) == 0 {
		n = maxName - rng.IntN(3)
	}
	b := randomBytes(rng, n)
	for i := range b {
		switch {
		case rng.IntN(3) > 0:
			b[i] = "abc.-+~ \n\\\"ABC"[int(b[i])%14]
		case b[i] == 0 || b[i] == '/':
			b[i] = '!'
		}
	}
	if s := string(b); s != "." && s != ".." {
		return s
	}
	return "..."
}
