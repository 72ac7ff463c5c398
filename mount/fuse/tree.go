package fuse

import (
	"sync"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// forever is how long the kernel may keep what it was told. Nothing changes.
const forever = 24 * time.Hour

// A tree answers what the kernel asks of a layer.
type tree struct {
	gofuse.RawFileSystem // refuses what isn't here
	m                    *Mount
	l                    *layer.Layer
	opaque               string // the xattr of opaque directories
	acls                 bool   // there are some
	unsound              sync.Once

	// The kernel can do without these requests.
	noOpen, noOpendir bool
}

var _ gofuse.RawFileSystem = (*tree)(nil)

func newTree(m *Mount) *tree {
	t := &tree{RawFileSystem: gofuse.NewDefaultRawFileSystem(), m: m, l: m.opt.Layer, acls: m.opt.Layer.HasACLs(), opaque: "trusted.overlay.opaque"}
	if m.opt.UserXattr {
		t.opaque = "user.overlay.opaque"
	}
	return t
}

func node(inode uint32) uint64 { return uint64(inode) + 1 }

func (t *tree) inode(node uint64) layer.Inode { return t.l.Inode(uint32(node - 1)) }

// String is the name that the filesystem has in go-fuse's messages.
func (t *tree) String() string { return fsName }

// Init is told what the kernel can.
func (t *tree) Init(server *gofuse.Server) {
	flags := server.KernelSettings().Flags64()
	t.noOpen = flags&gofuse.CAP_NO_OPEN_SUPPORT != 0
	t.noOpendir = flags&gofuse.CAP_NO_OPENDIR_SUPPORT != 0
}

func (t *tree) attr(inode uint32, out *gofuse.Attr) {
	in := t.l.Inode(inode)
	*out = gofuse.Attr{
		Ino:       node(inode),
		Size:      uint64(in.Size),
		Blocks:    uint64(in.Size+layer.BlockSize-1) / layer.BlockSize * (layer.BlockSize / 512), // holes aren't for those who copy
		Atime:     uint64(in.Mtime),
		Mtime:     uint64(in.Mtime),
		Ctime:     uint64(in.Mtime),
		Atimensec: in.MtimeNsec,
		Mtimensec: in.MtimeNsec,
		Ctimensec: in.MtimeNsec,
		Mode:      in.Mode,
		Nlink:     in.Nlink,
		Owner:     gofuse.Owner{Uid: in.UID, Gid: in.GID},
		Rdev:      uint32(unix.Mkdev(in.Major, in.Minor)),
		Blksize:   layer.BlockSize,
	}
}

func (t *tree) entry(inode uint32, out *gofuse.EntryOut) {
	out.NodeId = node(inode)
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	t.attr(inode, &out.Attr)
}

// sound returns the status of an answer, EIO if the tree could not be read that it's made of.
func (t *tree) sound(s gofuse.Status) gofuse.Status {
	if err := t.l.Err(); err != nil {
		t.unsound.Do(func() { t.m.d.denied(t.m.opt.Target, 0, 0, err) })
		return gofuse.EIO
	}
	return s
}

// Lookup finds a name, or has the kernel remember that there is none.
func (t *tree) Lookup(_ <-chan struct{}, header *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	if child, ok := t.l.Child(uint32(header.NodeId-1), name); ok {
		t.entry(child, out)
	} else {
		out.SetEntryTimeout(forever)
	}
	return t.sound(gofuse.OK)
}

// Forget has nothing to forget.
func (t *tree) Forget(uint64, uint64) {}

// GetAttr is stat(2).
func (t *tree) GetAttr(_ <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	out.SetTimeout(forever)
	t.attr(uint32(in.NodeId-1), &out.Attr)
	return t.sound(gofuse.OK)
}

// Readlink returns where a symlink leads.
func (t *tree) Readlink(_ <-chan struct{}, header *gofuse.InHeader) ([]byte, gofuse.Status) {
	target := t.inode(header.NodeId).Target
	return []byte(target), t.sound(gofuse.OK)
}

// OpenDir needs nothing: the kernel takes ENOSYS for success, forever.
func (t *tree) OpenDir(_ <-chan struct{}, _ *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	if t.noOpendir {
		return gofuse.ENOSYS
	}
	out.OpenFlags = gofuse.FOPEN_KEEP_CACHE | gofuse.FOPEN_CACHE_DIR
	return gofuse.OK
}

// dirent returns the entry at a place in a directory: ".", "..", and what the layer has.
func (t *tree) dirent(dir uint32, at uint64) (name string, inode uint32, ok bool) {
	switch at {
	case 0:
		return ".", dir, true
	case 1:
		return "..", t.l.Parent(dir), true
	}
	e, ok := t.l.Entry(dir, int(at-2))
	return e.Name, e.Inode, ok
}

// ReadDir lists a directory.
func (t *tree) ReadDir(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	dir := uint32(in.NodeId - 1)
	for at := in.Offset; ; at++ {
		name, inode, ok := t.dirent(dir, at)
		if !ok || !out.AddDirEntry(gofuse.DirEntry{Name: name, Ino: node(inode), Mode: t.l.Inode(inode).Mode, Off: at + 1}) {
			return t.sound(gofuse.OK)
		}
	}
}

// ReadDirPlus lists a directory, with what Lookup says of each.
func (t *tree) ReadDirPlus(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	dir := uint32(in.NodeId - 1)
	for at := in.Offset; ; at++ {
		name, inode, ok := t.dirent(dir, at)
		if !ok {
			return t.sound(gofuse.OK)
		}
		e := out.AddDirLookupEntry(gofuse.DirEntry{Name: name, Ino: node(inode), Mode: t.l.Inode(inode).Mode, Off: at + 1})
		if e == nil {
			return t.sound(gofuse.OK)
		}
		if at >= 2 {
			t.entry(inode, e)
		}
	}
}

// GetXAttr returns an extended attribute. It's asked for each time: were it refused once and for all, which is
// EOPNOTSUPP, BuildKit's differ would take that for a failure.
func (t *tree) GetXAttr(_ <-chan struct{}, header *gofuse.InHeader, name string, dest []byte) (uint32, gofuse.Status) {
	in := t.inode(header.NodeId)
	if in.Opaque && name == t.opaque {
		n, status := give(dest, "y")
		return n, t.sound(status)
	}
	for i := range in.Xattrs {
		if in.Xattrs[i].Name == name {
			n, status := give(dest, in.Xattrs[i].Value)
			return n, t.sound(status)
		}
	}
	return 0, t.sound(gofuse.ENODATA)
}

func give[T string | []byte](dest []byte, value T) (uint32, gofuse.Status) {
	if len(dest) < len(value) {
		return uint32(len(value)), gofuse.ERANGE
	}
	return uint32(copy(dest, value)), gofuse.OK
}

// ListXAttr lists the names of extended attributes, each followed by a zero byte.
func (t *tree) ListXAttr(_ <-chan struct{}, header *gofuse.InHeader, dest []byte) (uint32, gofuse.Status) {
	in := t.inode(header.NodeId)
	var list []byte
	if in.Opaque {
		list = append(append(list, t.opaque...), 0)
	}
	for i := range in.Xattrs {
		if name := in.Xattrs[i].Name; !in.Opaque || name != t.opaque {
			list = append(append(list, name...), 0)
		}
	}
	n, status := give(dest, list)
	return n, t.sound(status)
}

// StatFs describes a filesystem that is full.
func (t *tree) StatFs(_ <-chan struct{}, _ *gofuse.InHeader, out *gofuse.StatfsOut) gofuse.Status {
	*out = gofuse.StatfsOut{
		Blocks:  uint64(t.l.DataSize / layer.BlockSize),
		Bsize:   layer.BlockSize,
		Frsize:  layer.BlockSize,
		Files:   uint64(t.l.NumInodes()),
		NameLen: layer.MaxName,
	}
	return gofuse.OK
}
