package layer

import (
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A Builder makes a [Layer] of the entries of a blob, in the order of the blob, as containerd's
// applier would unpack them for overlayfs:
//
//   - a later entry of a name replaces an earlier one, with all that is below it; a
//     directory over a directory keeps what is below and takes the new attributes;
//   - parents that have no entry are made, and are [Inode.Implied];
//   - a hardlink leads to what its target is when it comes, and gives it its attributes; other than the applier, a Builder also
//     takes targets that come later, as stargz does;
//   - ".wh.NAME" becomes a whiteout of NAME, unless the layer has another entry of that name, and ".wh..wh..opq" makes its
//     directory [Inode.Opaque];
//   - an entry of the root changes nothing: steps would have it as the owner of theirs;
//   - xattrs that the applier leaves out are left out, and an ACL grants no more than the mode.
//
// Three habits of the applier are not copied: a file that replaces a directory gets the directory's time; a layer in which a directory
// with directories in it is replaced is refused; and an implied directory gets the group of a parent that has the set-group-ID bit. Nor does
// a Builder follow symlinks above an entry: see [ErrParent].
//
// What follows a regular file with content are its frames and chunks: [Builder.Frame], [Builder.Chunk]. Whatever can't be a layer
// is an [EntryError], after which the Builder is of no use. A Builder is not safe for concurrent use.
type Builder struct {
	opt BuilderOptions

	inodes list[Inode]
	// names are the entries of all directories in the order in which they came; whiteouts are kept
	// apart, since they give way to other entries of their names, whichever came first.
	names     list[dirent]
	whiteouts []dirent
	byName    map[direntKey]uint32 // index in names
	links     []link
	entries   int

	chunks list[ownedChunk]
	frames list[int64] // where they begin

	// file is the regular file whose chunks come, when it has content, and filled how much
	// of it they cover. Inner is where the last chunk of the last frame ends.
	file     uint32
	fileName string
	filled   int64
	inner    int64

	// lastPath is the directory of the last entry: neighbours in a blob mostly have the same.
	lastPath string
	lastDir  uint32

	strings    arena
	xattrNames map[string]string
}

// BuilderOptions are what a format knows about its blobs.
type BuilderOptions struct {
	// MaxRatio is how many bytes the codec can at most make of one. Frames that promise more are
	// [ErrContent]. 0 is no bound.
	MaxRatio int64
}

type direntKey struct {
	dir  uint32
	name string
}

type dirent struct {
	direntKey
	// inode is an index in Builder.inodes or, with the bit pending, in Builder.links.
	inode uint32
}

// An ownedChunk is a chunk of an inode of the Builder.
type ownedChunk struct {
	Chunk
	digest [sha256.Size]byte
	owner  uint32
}

// pending marks the name of a hardlink whose target hasn't come yet.
const pending = 1 << 31

type link struct {
	name, target string // target is clean
	inode        uint32 // once resolved
	state        linkState
}

// NewBuilder returns a Builder of a layer that holds an implied root.
func NewBuilder(opt BuilderOptions) *Builder {
	b := &Builder{opt: opt, byName: map[direntKey]uint32{}, xattrNames: map[string]string{}}
	b.newInode(impliedDir())
	return b
}

func impliedDir() Inode { return Inode{Mode: unix.S_IFDIR | 0o755, Implied: true} }

// Add adds an entry that isn't a hardlink. Of in, Nlink, Implied, Opaque, Entries, Data and the chunks are the Builder's to say.
// A regular file of a Size over 0 must be followed by its chunks.
func (b *Builder) Add(name string, in Inode) error {
	if err := b.endFile(); err != nil {
		return err
	}
	if err := b.add(name, in); err != nil {
		return &EntryError{name, err}
	}
	return nil
}

func (b *Builder) add(name string, in Inode) error {
	if err := b.count(); err != nil {
		return err
	}
	clean, err := cleanName(name)
	if err != nil {
		return err
	}
	if in, err = b.cleanInode(in); err != nil {
		return err
	}
	if clean == "" {
		if !in.IsDir() {
			return fmt.Errorf("%w: the root must be a directory", ErrAttr)
		}
		return nil
	}
	at, whiteout, err := b.locate(clean, &in)
	if err != nil || whiteout {
		return err
	}
	if i, ok := b.byName[at]; ok {
		old := b.names.at(i).inode
		if in.IsDir() && old&pending == 0 && b.inodes.at(old).IsDir() {
			return b.mergeDir(old, &in)
		}
	}
	n := b.newInode(in)
	b.setName(at, n)
	if in.Size > 0 && in.IsRegular() {
		b.file, b.fileName, b.filled = n, name, 0
	}
	return nil
}

// Link adds a hardlink to the entry named target. The mode, owner, time and xattrs of attr become those of the file, as
// they would if the link were unpacked; those of a link whose target comes later don't.
func (b *Builder) Link(name, target string, attr Inode) error {
	if err := b.endFile(); err != nil {
		return err
	}
	if err := b.link(name, target, attr); err != nil {
		return &EntryError{name, err}
	}
	return nil
}

func (b *Builder) link(name, target string, attr Inode) error {
	if err := b.count(); err != nil {
		return err
	}
	clean, err := cleanName(name)
	if err != nil {
		return err
	}
	cleanTarget, err := cleanName(target)
	if err != nil {
		return fmt.Errorf("%w: to %q: %w", ErrLink, target, err)
	}
	if clean == "" || cleanTarget == "" {
		return fmt.Errorf("%w: to %q: the root is a directory", ErrLink, target)
	}
	at, whiteout, err := b.locate(clean, &attr)
	if err != nil || whiteout {
		return err
	}
	// What had the name is gone before its target is looked for: it may have been below.
	b.setName(at, pending|uint32(len(b.links)))
	n, ok := b.lookup(cleanTarget)
	if !ok || n&pending != 0 {
		b.links = append(b.links, link{name: name, target: cleanTarget})
		return nil
	}
	in := b.inodes.at(n)
	if in.IsDir() {
		return fmt.Errorf("%w: %q is a directory", ErrLink, target)
	}
	attr.Mode = in.Mode&unix.S_IFMT | attr.Mode&^uint32(unix.S_IFMT)
	attr.Size, attr.Target, attr.Major, attr.Minor = in.Size, in.Target, in.Major, in.Minor
	if attr, err = b.cleanInode(attr); err != nil {
		return err
	}
	// The applier chowns the file, which takes its capabilities.
	kept := slices.DeleteFunc(in.Xattrs, func(x Xattr) bool { return x.Name == "security.capability" })
	attr.Xattrs = mergeXattrs(kept, attr.Xattrs)
	if err := settleACLs(&attr); err != nil {
		return err
	}
	*in = attr
	b.setName(at, n)
	return nil
}

// Frame says that the chunks that follow are in the frame that begins at an offset of the blob, and that the frame before ends there at
// the latest. Frames come in the order of the blob; one that no chunk follows only ends the one before.
func (b *Builder) Frame(offset int64) error {
	last := int64(-1)
	if n := b.frames.len(); n > 0 {
		last = *b.frames.at(uint32(n - 1))
	}
	if offset == last {
		return nil
	}
	if offset < 0 || offset < last {
		return b.contentError("frame at %d after one at %d", offset, last)
	}
	if b.frames.len() >= MaxChunks {
		return &EntryError{b.fileName, fmt.Errorf("%w: more than %d frames", ErrLimit, MaxChunks)}
	}
	b.frames.add(offset)
	b.inner = 0
	return nil
}

// Chunk adds the next chunk of the last regular file: size bytes at off of the file, which stand at
// inner of what the last frame decompresses to.
func (b *Builder) Chunk(off, size, inner int64, digest [sha256.Size]byte) error {
	switch {
	case b.file == Root:
		return b.contentError("chunk of %d bytes, where no file has content", size)
	case b.frames.len() == 0:
		return b.contentError("chunk in no frame")
	case off != b.filled:
		return b.contentError("chunk at %d where %d was next", off, b.filled)
	case size <= 0 || size > b.inodes.at(b.file).Size-off:
		return b.contentError("chunk of %d bytes at %d of %d", size, off, b.inodes.at(b.file).Size)
	case size > MaxChunkSize:
		return &EntryError{b.fileName, fmt.Errorf("%w: chunk of %d bytes", ErrLimit, size)}
	case inner < b.inner || inner > MaxDataSize:
		return b.contentError("chunk at %d of a frame whose last one ends at %d", inner, b.inner)
	case inner > math.MaxUint32:
		return &EntryError{b.fileName, fmt.Errorf("%w: chunk at %d of a frame", ErrLimit, inner)}
	case b.chunks.len() >= MaxChunks:
		return &EntryError{b.fileName, fmt.Errorf("%w: more than %d chunks", ErrLimit, MaxChunks)}
	}
	b.chunks.add(ownedChunk{Chunk{Size: size, Frame: uint32(b.frames.len() - 1), Inner: uint32(inner)}, digest, b.file})
	b.inner = inner + size
	if b.filled += size; b.filled == b.inodes.at(b.file).Size {
		b.file = Root
	}
	return nil
}

// endFile is called before whatever can't come in the midst of a file.
func (b *Builder) endFile() error {
	if b.file != Root {
		return b.contentError("chunks cover %d of %d bytes", b.filled, b.inodes.at(b.file).Size)
	}
	return nil
}

func (b *Builder) contentError(format string, args ...any) error {
	return &EntryError{b.fileName, fmt.Errorf("%w: "+format, append([]any{ErrContent}, args...)...)}
}

// count counts an entry, or a directory that one implies.
func (b *Builder) count() error {
	if b.entries++; b.entries > MaxEntries {
		return fmt.Errorf("%w: more than %d entries", ErrLimit, MaxEntries)
	}
	return nil
}

// locate returns where the entry of a clean name goes, after it has made the directories above; whiteouts and
// opaque markers it puts there itself.
func (b *Builder) locate(clean string, in *Inode) (at direntKey, whiteout bool, err error) {
	parent, base := splitName(clean)
	dir, err := b.makeDirs(parent)
	if err != nil {
		return direntKey{}, false, err
	}
	if !strings.HasPrefix(base, whiteoutPrefix) {
		return direntKey{dir, base}, false, nil
	}
	if in.IsRegular() && in.Size > 0 {
		return direntKey{}, true, fmt.Errorf("%w: whiteout of %d bytes", ErrContent, in.Size)
	}
	if base == opaqueMarker {
		b.inodes.at(dir).Opaque = true
		return direntKey{}, true, nil
	}
	hidden, err := hiddenBy(base)
	if err != nil {
		return direntKey{}, true, err
	}
	n := b.newInode(Inode{Mode: unix.S_IFCHR, UID: in.UID, GID: in.GID, Mtime: in.Mtime, MtimeNsec: in.MtimeNsec})
	b.whiteouts = append(b.whiteouts, dirent{direntKey{dir, b.strings.keep(hidden)}, n})
	return direntKey{}, true, nil
}

// makeDirs returns the directory of a clean path, and makes what lacks of it.
func (b *Builder) makeDirs(path string) (uint32, error) {
	if path == b.lastPath {
		return b.lastDir, nil
	}
	dir := uint32(Root)
	if path != "" {
		for name := range strings.SplitSeq(path, "/") {
			at := direntKey{dir, name}
			i, ok := b.byName[at]
			if !ok {
				if err := b.count(); err != nil {
					return 0, err
				}
				dir = b.newInode(impliedDir())
				b.setName(at, dir)
				continue
			}
			dir = b.names.at(i).inode
			if dir&pending != 0 || !b.inodes.at(dir).IsDir() {
				return 0, fmt.Errorf("%w: %s", ErrParent, name)
			}
		}
	}
	b.lastPath, b.lastDir = path, dir
	return dir, nil
}

// lookup returns what a name of the layer leads to, as dirent.inode has it.
func (b *Builder) lookup(clean string) (inode uint32, ok bool) {
	for name := range strings.SplitSeq(clean, "/") {
		// Nothing is ever below what isn't a directory.
		i, ok := b.byName[direntKey{inode, name}]
		if !ok {
			return 0, false
		}
		inode = b.names.at(i).inode
	}
	return inode, true
}

// setName makes a name lead to an inode. A directory that had it is out of reach, with all that is below.
func (b *Builder) setName(at direntKey, inode uint32) {
	if i, ok := b.byName[at]; ok {
		b.names.at(i).inode = inode
		b.lastPath, b.lastDir = "", Root
		return
	}
	at.name = b.strings.keep(at.name)
	b.byName[at] = b.names.add(dirent{at, inode})
}

func (b *Builder) newInode(in Inode) uint32 {
	return b.inodes.add(in)
}

// mergeDir lets a directory take the attributes of a later entry of its name.
func (b *Builder) mergeDir(dir uint32, in *Inode) error {
	old := b.inodes.at(dir)
	in.Xattrs = mergeXattrs(old.Xattrs, in.Xattrs)
	in.Opaque = old.Opaque
	*old = *in
	return settleACLs(old)
}

// cleanInode returns what an entry says about its inode, without what it has no say in.
func (b *Builder) cleanInode(in Inode) (Inode, error) {
	clean := Inode{
		Mode: in.Mode & (unix.S_IFMT | 0o7777), UID: in.UID, GID: in.GID,
		Mtime: in.Mtime, MtimeNsec: in.MtimeNsec,
	}
	if in.MtimeNsec >= 1e9 {
		return clean, fmt.Errorf("%w: %d nanoseconds", ErrAttr, in.MtimeNsec)
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if in.Size < 0 {
			return clean, fmt.Errorf("%w: size %d", ErrAttr, in.Size)
		}
		if in.Size > MaxDataSize {
			return clean, fmt.Errorf("%w: size %d", ErrLimit, in.Size)
		}
		clean.Size = in.Size
	case unix.S_IFLNK:
		switch {
		case in.Target == "" || strings.IndexByte(in.Target, 0) >= 0:
			return clean, fmt.Errorf("%w: symlink to %q", ErrAttr, in.Target)
		case len(in.Target) > MaxPath:
			return clean, fmt.Errorf("%w: symlink to %d bytes", ErrLimit, len(in.Target))
		}
		clean.Mode = unix.S_IFLNK | 0o777 // there is no lchmod(2)
		clean.Target = b.strings.keep(in.Target)
		clean.Size = int64(len(in.Target))
	case unix.S_IFCHR, unix.S_IFBLK:
		if in.Major > MaxMajor || in.Minor > MaxMinor {
			return clean, fmt.Errorf("%w: device %d:%d", ErrAttr, in.Major, in.Minor)
		}
		clean.Major, clean.Minor = in.Major, in.Minor
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return clean, fmt.Errorf("%w: mode %#o", ErrAttr, in.Mode)
	}
	xattrs, err := cleanXattrs(&in)
	if err != nil {
		return clean, err
	}
	for i, x := range xattrs {
		name, ok := b.xattrNames[x.Name]
		if !ok {
			name = b.strings.keep(x.Name)
			b.xattrNames[name] = name
		}
		xattrs[i].Name = name
	}
	clean.Xattrs = xattrs
	err = settleACLs(&clean)
	return clean, err
}
