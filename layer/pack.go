package layer

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A packed is what of a layer is looked at now and then, the tree and the digests, as it stands in a file that is mapped into
// memory. What is in memory of it is up to the kernel, which can take it back. Nothing of the mapping leaves a method: it is
// unmapped when the packed is garbage. Each method reads it in a call of reading, as the disk may not give back what the kernel has taken.
//
// The file has, one behind the other, digests, inodes, entries, files, the order of digests (digests.go) and strings; numbers are little endian. The format is between Pack and
// these methods.
type packed struct {
	b                                   []byte
	numInodes, numFiles                 int
	inodes, entries, files, sums, names int64 // where they begin
	acls                                bool
	unreadable                          atomic.Bool
}

// ErrUnreadable is why a packed layer is of no use any more: see [Layer.Err].
var ErrUnreadable = errors.New("the layer's tree, which is kept in a file of the state directory, can't be read any more: its disk has failed, or the file was cut short;" +
	" once the disk is sound, restart the daemon")

// Err returns ErrUnreadable when something of a packed layer's tree could not be read from the disk, since then and for ever: what methods returned that
// met with it was without meaning, though harmless as an index. Whoever passes that on, rather than guess by it, asks afterwards.
func (l *Layer) Err() error {
	if l.packed != nil && l.packed.unreadable.Load() {
		return ErrUnreadable
	}
	return nil
}

// reading calls read, which reads the mapping. What isn't read from the disk is a SIGBUS, by which the process would end. So it's a panic, and no more is read.
func (p *packed) reading(read func()) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch r := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }: // see SetPanicOnFault
			if at := r.Addr() - uintptr(unsafe.Pointer(unsafe.SliceData(p.b))); at >= uintptr(len(p.b)) {
				panic(r)
			}
			p.unreadable.Store(true)
		default:
			panic(r)
		}
	}()
	read()
	runtime.KeepAlive(p)
}

const (
	inodeSize = 64
	entrySize = 8
	fileSize  = 4

	// Above st_mode.
	flagImplied = 1 << 16
	flagOpaque  = 1 << 17
)

var le = binary.LittleEndian

// Pack returns a layer that is equal to l and takes a fraction of its memory: all but Chunks and Frames is in f, an empty file
// that nobody else writes to, and that may be removed and closed afterwards. Inodes and Digests of that layer are nil; its methods are for
// both. What is too large for the file's format is returned as it is. Where the disk doesn't give back what is in f any more, see [Layer.Err].
func (l *Layer) Pack(f *os.File) (*Layer, error) {
	p := &packed{numInodes: len(l.Inodes), inodes: int64(len(l.Digests)) * sha256.Size}
	parents, numEntries, size := make([]upward, len(l.Inodes)), 0, int64(0)
	var files []uint32 // regular files with content
	for i, in := range l.All() {
		for _, e := range in.Entries {
			parents[e.Inode] = upward{i, uint32(numEntries)}
			numEntries++
		}
		if in.IsRegular() && in.NumChunks > 0 {
			files = append(files, i)
		}
		p.acls = p.acls || in.hasACL()
		size += sizeOfStrings(in)
	}
	sort.Slice(files, func(a, b int) bool { return l.Inodes[files[a]].FirstChunk < l.Inodes[files[b]].FirstChunk })
	p.numFiles = len(files)
	p.entries = p.inodes + int64(p.numInodes)*inodeSize
	p.files = p.entries + int64(numEntries)*entrySize
	p.sums = p.files + int64(p.numFiles)*fileSize
	p.names = p.sums + int64(len(l.Digests))*sumSize
	size += p.names
	if size > math.MaxUint32 || len(l.Inodes) == 0 {
		return l, nil
	}
	w := bufio.NewWriterSize(f, 256<<10)
	for i := range l.Digests {
		_, _ = w.Write(l.Digests[i][:]) // the first error is Flush's, also below
	}
	p.writeInodes(w, l, parents)
	p.writeEntries(w, l)
	for _, i := range files {
		_, _ = w.Write(le.AppendUint32(w.AvailableBuffer(), i))
	}
	writeSums(w, l)
	for _, in := range l.All() {
		writeStrings(w, in)
	}
	if err := w.Flush(); err != nil {
		return nil, fmt.Errorf("write the tree of a layer: %w", err)
	}
	var err error
	if p.b, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the tree of a layer: %w", err)
	}
	runtime.AddCleanup(p, func(b []byte) { _ = unix.Munmap(b) }, p.b)
	return &Layer{Chunks: l.Chunks, Frames: l.Frames, DataSize: l.DataSize, Codec: l.Codec, packed: p}, nil
}

// Rest lets the kernel have the memory that a packed layer's tree has taken since it was last used. It does nothing for others.
func (l *Layer) Rest() {
	if l.packed != nil {
		_ = unix.Madvise(l.packed.b, unix.MADV_DONTNEED) // advice
		runtime.KeepAlive(l.packed)
	}
}

// An upward leads from an inode to a directory that it's in, and to the name it has there.
type upward struct{ dir, entry uint32 }

// sizeOfStrings returns the size of the strings of an inode, which writeStrings writes: names of entries, the target, xattrs.
func sizeOfStrings(in *Inode) (n int64) {
	for i := range in.Entries {
		n += 1 + int64(len(in.Entries[i].Name))
	}
	n += int64(len(in.Target))
	if len(in.Xattrs) > 0 {
		n += 4
	}
	for _, x := range in.Xattrs {
		n += 8 + int64(len(x.Name)) + int64(len(x.Value))
	}
	return n
}

func writeStrings(w *bufio.Writer, in *Inode) {
	for i := range in.Entries {
		_ = w.WriteByte(byte(len(in.Entries[i].Name)))
		_, _ = w.WriteString(in.Entries[i].Name)
	}
	_, _ = w.WriteString(in.Target)
	if len(in.Xattrs) > 0 {
		_, _ = w.Write(le.AppendUint32(w.AvailableBuffer(), uint32(len(in.Xattrs))))
	}
	for _, x := range in.Xattrs {
		_, _ = w.Write(le.AppendUint32(le.AppendUint32(w.AvailableBuffer(), uint32(len(x.Name))), uint32(len(x.Value))))
		_, _ = w.WriteString(x.Name)
		_, _ = w.Write(x.Value)
	}
}

func (p *packed) writeInodes(w *bufio.Writer, l *Layer, parents []upward) {
	entry, at := 0, p.names
	for i, in := range l.All() {
		mode := in.Mode
		if in.Implied {
			mode |= flagImplied
		}
		if in.Opaque {
			mode |= flagOpaque
		}
		a, b, c := uint64(in.Data), in.FirstChunk, in.NumChunks
		xattrs := at
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			a, b = uint64(entry), uint32(len(in.Entries))
			entry += len(in.Entries)
			for j := range in.Entries {
				xattrs += 1 + int64(len(in.Entries[j].Name))
			}
		case unix.S_IFLNK:
			a, b = uint64(at), uint32(len(in.Target))
			xattrs += int64(len(in.Target))
		case unix.S_IFCHR, unix.S_IFBLK:
			a, b = 0, in.Major
			c = in.Minor
		}
		if len(in.Xattrs) == 0 {
			xattrs = 0
		}
		r := w.AvailableBuffer() // made with append, it's copied nowhere
		for _, v := range []uint32{mode, in.UID, in.GID, in.Nlink} {
			r = le.AppendUint32(r, v)
		}
		r = le.AppendUint64(le.AppendUint64(r, uint64(in.Size)), uint64(in.Mtime))
		r = le.AppendUint32(le.AppendUint32(r, in.MtimeNsec), uint32(xattrs))
		r = le.AppendUint64(r, a)
		for _, v := range []uint32{b, c, parents[i].dir, parents[i].entry} {
			r = le.AppendUint32(r, v)
		}
		_, _ = w.Write(r)
		at += sizeOfStrings(in)
	}
}

func (p *packed) writeEntries(w *bufio.Writer, l *Layer) {
	at := p.names
	for _, in := range l.All() {
		name := at
		for j := range in.Entries {
			b := le.AppendUint32(w.AvailableBuffer(), in.Entries[j].Inode)
			_, _ = w.Write(le.AppendUint32(b, uint32(name)))
			name += 1 + int64(len(in.Entries[j].Name))
		}
		at += sizeOfStrings(in)
	}
}

func (p *packed) digest(chunk int) (sum [sha256.Size]byte) {
	p.reading(func() { copy(sum[:], p.b[chunk*sha256.Size:]) })
	return sum
}

func (p *packed) record(i uint32) []byte { return p.b[p.inodes+int64(i)*inodeSize:][:inodeSize] }

// inode returns an inode, without entries.
func (p *packed) inode(i uint32) (in Inode) {
	p.reading(func() {
		r := p.record(i)
		mode := le.Uint32(r)
		in = Inode{
			Mode: mode & math.MaxUint16, UID: le.Uint32(r[4:]), GID: le.Uint32(r[8:]), Nlink: le.Uint32(r[12:]),
			Size: int64(le.Uint64(r[16:])), Mtime: int64(le.Uint64(r[24:])), MtimeNsec: le.Uint32(r[32:]),
			Implied: mode&flagImplied != 0, Opaque: mode&flagOpaque != 0,
		}
		a, b, c := le.Uint64(r[40:]), le.Uint32(r[48:]), le.Uint32(r[52:])
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			in.Data, in.FirstChunk, in.NumChunks = int64(a), b, c
		case unix.S_IFLNK:
			in.Target = string(p.b[a:][:b])
		case unix.S_IFCHR, unix.S_IFBLK:
			in.Major, in.Minor = b, c
		}
		if at := le.Uint32(r[36:]); at != 0 {
			in.Xattrs = p.xattrs(p.b[at:])
		}
	})
	return in
}

func (p *packed) xattrs(b []byte) []Xattr {
	xs := make([]Xattr, le.Uint32(b))
	b = b[4:]
	for i := range xs {
		name, value := le.Uint32(b), le.Uint32(b[4:])
		b = b[8:]
		xs[i] = Xattr{string(b[:name]), bytes.Clone(b[name:][:value])}
		b = b[name+value:]
	}
	return xs
}

// count returns how many entries a directory has, 0 for what is none.
func (p *packed) count(dir uint32) (n int) {
	p.reading(func() { _, n = p.span(dir) })
	return n
}

// span returns the entries of a directory, from first on; n is 0 for what is none.
func (p *packed) span(dir uint32) (first, n int) {
	r := p.record(dir)
	if le.Uint32(r)&unix.S_IFMT != unix.S_IFDIR {
		return 0, 0
	}
	return int(le.Uint64(r[40:])), int(le.Uint32(r[48:]))
}

// entry returns the inode of an entry and its name, which is part of the mapping.
func (p *packed) entry(i int) (inode uint32, name []byte) {
	r := p.b[p.entries+int64(i)*entrySize:]
	at := le.Uint32(r[4:])
	return le.Uint32(r), p.b[at+1:][:p.b[at]]
}

func (p *packed) entryOf(dir uint32, n int) (e Entry, ok bool) {
	p.reading(func() {
		first, count := p.span(dir)
		if n < 0 || n >= count {
			return
		}
		inode, name := p.entry(first + n)
		e, ok = Entry{string(name), inode}, true
	})
	return e, ok
}

func (p *packed) child(dir uint32, name string) (inode uint32, ok bool) {
	p.reading(func() {
		first, n := p.span(dir)
		k := sort.Search(n, func(k int) bool {
			_, at := p.entry(first + k)
			return string(at) >= name
		})
		if k < n {
			var at []byte
			if inode, at = p.entry(first + k); string(at) == name {
				ok = true
			}
		}
	})
	return inode, ok
}

// up returns a directory that an inode is in, and the name that it has there. The root is in itself.
func (p *packed) up(i uint32) (dir uint32, name string) {
	p.reading(func() {
		r := p.record(i)
		if i != Root {
			_, b := p.entry(int(le.Uint32(r[60:])))
			name = string(b)
		}
		dir = le.Uint32(r[56:])
	})
	return dir, name
}

func (p *packed) path(inode uint32) string {
	var names []string
	for inode != Root {
		var name string
		inode, name = p.up(inode)
		names = append(names, name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// fileAt returns the regular file that a chunk belongs to.
func (p *packed) fileAt(chunk int) (inode uint32, ok bool) {
	file := func(k int) (inode, first, n uint32) {
		inode = le.Uint32(p.b[p.files+int64(k)*fileSize:])
		r := p.record(inode)
		return inode, le.Uint32(r[48:]), le.Uint32(r[52:])
	}
	p.reading(func() {
		k := sort.Search(p.numFiles, func(k int) bool {
			_, first, _ := file(k)
			return int(first) > chunk
		}) - 1
		if k >= 0 {
			var first, n uint32
			inode, first, n = file(k)
			ok = uint32(chunk)-first < n
		}
	})
	return inode, ok
}
