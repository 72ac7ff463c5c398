// Package layer is the model of a lazy layer that the format packages below it
// make and every other package speaks.
//
// A layer is two things. Its metadata is a tree of inodes, known completely when the
// layer is opened. Its content is in frames: ranges of the blob that can be
// decompressed on their own, each holding chunks of files whose digests are known. In
// between stands the data space: the regular files of a layer, one after the other in
// the order of the blob, each starting at a multiple of [BlockSize]. It's where a chunk is written when it
// has arrived, so that a file is one contiguous, block-aligned range of it.
//
// A format feeds a [Builder] with the entries of a blob, whatever they are, and gets a [Layer] that keeps what this page promises, or an
// [EntryError]. What is built for a hostile blob is bounded by [MaxEntries] and the other limits; it is
// consistent, and no more: whether the blob's content is what the layer says shows when a frame has been
// decompressed and the digests of its chunks have been compared, which [Layer.ReadChunk] does, in this one place for all packages:
// what it returns, a [Verified], is what they hand on.
//
// A Layer is immutable once made, and so safe for concurrent use. A daemon that has 600,000 files mounted can't have all of that in
// memory: [Layer.Pack] moves what is needed seldom, the tree and the digests, into a file. Chunks and Frames, which every read needs,
// take 48 bytes for a small file.
package layer

import (
	"crypto/sha256"
	"io"
	"io/fs"
	"iter"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// BlockSize is the alignment of files in the data space, in bytes: EROFS's usual block, and the page size of the
// machines that mount it.
const BlockSize = 4096

// A Layer is the metadata of a layer, and where its content is in the blob.
type Layer struct {
	// Inodes holds every inode once, whatever the number of its names. Inodes[Root] is the root
	// directory. It is nil when the layer is packed: see [Layer.Pack].
	Inodes []Inode
	// Chunks are ordered by Data; those of a file are neighbours and cover it without a gap.
	Chunks []Chunk
	// Digests are the SHA-256 of the chunks' bytes. It is nil when the layer is packed.
	Digests [][sha256.Size]byte
	// Frames are ordered by Offset and don't overlap.
	Frames []Frame
	// DataSize is the size of the data space in bytes, a multiple of BlockSize.
	DataSize int64
	// Codec decompresses frames.
	Codec Codec

	packed *packed // what Inodes and Digests hold otherwise
}

// Root is the index of the root directory.
const Root = 0

// An Inode is a file of any type, as stat(2) has it.
type Inode struct {
	// Mode is st_mode: type, permissions, set-id and sticky bits.
	Mode     uint32
	UID, GID uint32
	// Nlink is the number of the inode's names; of a directory, 2 and its subdirectories.
	Nlink uint32
	// Size is the length in bytes of a regular file or of a symlink's target, else 0.
	Size int64
	// Mtime and MtimeNsec are the modification time in seconds since 1970 and nanoseconds.
	Mtime     int64
	MtimeNsec uint32
	// Major and Minor are the device numbers of a character or block device.
	Major, Minor uint32
	// Implied says that no entry of the layer made this directory: it is a parent that the
	// layer leaves out. What it is depends on the layers below.
	Implied bool
	// Opaque says that the directory hides the one of the layers below.
	Opaque bool
	// Target is where a symlink leads.
	Target string
	// Xattrs are ordered by name.
	Xattrs []Xattr
	// Entries of a directory are ordered by name, bytewise, and leave out "." and "..".
	Entries []Entry
	// Data is where a regular file with content starts in the data space, in bytes.
	Data int64
	// FirstChunk and NumChunks are its chunks in Layer.Chunks.
	FirstChunk, NumChunks uint32
}

// An Entry is a name in a directory.
type Entry struct {
	Name  string
	Inode uint32 // index in Layer.Inodes
}

// An Xattr is an extended attribute.
type Xattr struct {
	Name  string // with its namespace, as in "security.capability"
	Value []byte
}

// A Chunk is the unit of verification.
type Chunk struct {
	// Data is where the chunk starts in the data space, in bytes.
	Data int64
	// Size in bytes, at least 1.
	Size int64
	// Frame is the index in Layer.Frames of the frame that holds the chunk, at Inner bytes of what it
	// decompresses to.
	Frame, Inner uint32
}

// End returns the end of the chunk in the data space.
func (c *Chunk) End() int64 { return c.Data + c.Size }

// A Frame is a range of the blob that can be decompressed on its own.
type Frame struct {
	// Offset and Size are the range, in bytes. It may end behind the compressed stream, whose end the decompressor finds.
	Offset, Size int64
	// FirstChunk and NumChunks are what it holds: the chunks of a frame are neighbours in
	// Layer.Chunks, ordered by Inner.
	FirstChunk, NumChunks uint32
}

// End returns the end of the frame in the blob.
func (f *Frame) End() int64 { return f.Offset + f.Size }

// A Codec decompresses frames. It is safe for concurrent use.
type Codec interface {
	// Decompress reads the stream at the beginning of r, which may hold more than that.
	Decompress(r io.Reader) (io.ReadCloser, error)
}

// IsWhiteout reports whether the inode hides an entry of the layers below: a character device of the number 0:0, as
// overlayfs has it.
func (i *Inode) IsWhiteout() bool {
	return i.Mode&unix.S_IFMT == unix.S_IFCHR && i.Major == 0 && i.Minor == 0
}

// IsDir reports whether the inode is a directory.
func (i *Inode) IsDir() bool { return i.Mode&unix.S_IFMT == unix.S_IFDIR }

// IsRegular reports whether the inode is a regular file.
func (i *Inode) IsRegular() bool { return i.Mode&unix.S_IFMT == unix.S_IFREG }

// NumInodes returns the number of inodes.
func (l *Layer) NumInodes() int {
	if l.packed != nil {
		return l.packed.numInodes
	}
	return len(l.Inodes)
}

// Inode returns an inode. What is in a directory is for [Layer.Entry] and [Layer.Child] to say.
func (l *Layer) Inode(i uint32) Inode {
	if l.packed != nil {
		return l.packed.inode(i)
	}
	in := l.Inodes[i]
	in.Entries = nil
	return in
}

// Entry returns the n-th entry of a directory, in the order of names.
func (l *Layer) Entry(dir uint32, n int) (e Entry, ok bool) {
	if l.packed != nil {
		return l.packed.entryOf(dir, n)
	}
	if n < 0 || n >= len(l.Inodes[dir].Entries) {
		return Entry{}, false
	}
	return l.Inodes[dir].Entries[n], true
}

// Digest returns the SHA-256 of a chunk's bytes.
func (l *Layer) Digest(chunk int) [sha256.Size]byte {
	if l.packed != nil {
		return l.packed.digest(chunk)
	}
	return l.Digests[chunk]
}

// HasACLs reports whether an inode has a POSIX ACL.
func (l *Layer) HasACLs() bool {
	if l.packed != nil {
		return l.packed.acls
	}
	return slices.ContainsFunc(l.Inodes, func(in Inode) bool { return in.hasACL() })
}

func (i *Inode) hasACL() bool {
	return slices.ContainsFunc(i.Xattrs, func(x Xattr) bool { return isACL(x.Name) })
}

// Parent returns a directory that an inode is in; the root is in itself. Of a layer that isn't packed, it looks through the whole tree.
func (l *Layer) Parent(inode uint32) uint32 {
	if l.packed != nil {
		dir, _ := l.packed.up(inode)
		return dir
	}
	for dir, in := range l.All() {
		for _, e := range in.Entries {
			if e.Inode == inode {
				return dir
			}
		}
	}
	return Root
}

// NameIn returns the name of an inode in a directory, the first if there are several, "" if there is none.
func (l *Layer) NameIn(dir, inode uint32) string {
	if l.packed != nil {
		if up, name := l.packed.up(inode); up == dir {
			return name // without a look at the others
		}
	}
	for n := 0; ; n++ {
		if e, ok := l.Entry(dir, n); !ok || e.Inode == inode {
			return e.Name
		}
	}
}

// Child returns the inode of a name in the directory dir.
func (l *Layer) Child(dir uint32, name string) (inode uint32, ok bool) {
	if l.packed != nil {
		return l.packed.child(dir, name)
	}
	entries := l.Inodes[dir].Entries
	i, ok := slices.BinarySearchFunc(entries, name, func(e Entry, name string) int { return strings.Compare(e.Name, name) })
	if !ok {
		return 0, false
	}
	return entries[i].Inode, true
}

// Lookup returns the inode of a path below the root, without following symlinks. The path is as [fs.ValidPath] has it.
func (l *Layer) Lookup(path string) (inode uint32, err error) {
	if !fs.ValidPath(path) {
		return 0, &fs.PathError{Op: "lookup", Path: path, Err: fs.ErrInvalid}
	}
	if path == "." {
		return Root, nil
	}
	for name := range strings.SplitSeq(path, "/") {
		child, ok := l.Child(inode, name)
		if !ok {
			return 0, &fs.PathError{Op: "lookup", Path: path, Err: fs.ErrNotExist}
		}
		inode = child
	}
	return inode, nil
}

// ChunksOf returns the indices in Layer.Chunks, from first up to end, of the chunks that overlap
// n bytes of the data space at off. Padding between files belongs to no chunk.
func (l *Layer) ChunksOf(off, n int64) (first, end int) {
	first = sort.Search(len(l.Chunks), func(i int) bool { return l.Chunks[i].End() > off })
	end = first + sort.Search(len(l.Chunks)-first, func(i int) bool { return l.Chunks[first+i].Data >= off+n })
	return first, end
}

// FileAt returns the inode of the regular file that a chunk belongs to. Of a layer that isn't packed, it looks through all inodes.
func (l *Layer) FileAt(chunk int) (inode uint32, ok bool) {
	if l.packed != nil {
		return l.packed.fileAt(chunk)
	}
	for i, in := range l.All() {
		if in.IsRegular() && in.NumChunks > 0 && uint32(chunk)-in.FirstChunk < in.NumChunks {
			return i, true
		}
	}
	return 0, false
}

// Path returns a path below the root that leads to an inode, "." for the root. Of a layer that isn't packed, it looks through the whole
// tree: errors want it.
func (l *Layer) Path(inode uint32) (path string, ok bool) {
	if inode == Root {
		return ".", true
	}
	if l.packed != nil {
		return l.packed.path(inode), true
	}
	type dir struct {
		inode uint32
		path  string
	}
	for dirs := []dir{{Root, ""}}; len(dirs) > 0; {
		d := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		for _, e := range l.Inodes[d.inode].Entries {
			if e.Inode == inode {
				return d.path + e.Name, true
			}
			if l.Inodes[e.Inode].IsDir() {
				dirs = append(dirs, dir{e.Inode, d.path + e.Name + "/"})
			}
		}
	}
	return "", false
}

// All iterates over the inodes and their indices.
func (l *Layer) All() iter.Seq2[uint32, *Inode] {
	return func(yield func(uint32, *Inode) bool) {
		for i := range uint32(l.NumInodes()) {
			in := new(Inode)
			if l.packed == nil {
				in = &l.Inodes[i]
			} else {
				*in = l.packed.inode(i)
				for k := range l.packed.count(i) {
					e, _ := l.packed.entryOf(i, k)
					in.Entries = append(in.Entries, e)
				}
			}
			if !yield(i, in) {
				return
			}
		}
	}
}
