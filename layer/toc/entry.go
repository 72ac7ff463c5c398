package toc

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// An entry is one of the TOC. Its byte slices are parts of the buffer that it was read from. What the fields mean
// is said at estargz.TOCEntry in stargz-snapshotter, and of chunkType at minimal.FileMetadata in Podman's storage library; those that
// aren't here change nothing in a layer.
type entry struct {
	kind                   kind
	name, linkName         []byte
	size                   int64
	mtime                  int64
	mtimeNsec              uint32
	mode, uid, gid         int64
	devMajor, devMinor     int64
	xattrs                 []layer.Xattr
	offset, innerOffset    int64
	chunkOffset, chunkSize int64
	digest, chunkDigest    hash
	zeros                  bool
}

type kind uint32

// The types of entries are those of inodes, and two more.
const (
	hardlink kind = iota + 1
	chunk
	dir     kind = unix.S_IFDIR
	reg     kind = unix.S_IFREG
	symlink kind = unix.S_IFLNK
	char    kind = unix.S_IFCHR
	block   kind = unix.S_IFBLK
	fifo    kind = unix.S_IFIFO
)

func parseKind(s []byte) (kind, error) {
	switch string(s) {
	case "dir":
		return dir, nil
	case "reg":
		return reg, nil
	case "symlink":
		return symlink, nil
	case "hardlink":
		return hardlink, nil
	case "char":
		return char, nil
	case "block":
		return block, nil
	case "fifo":
		return fifo, nil
	case "chunk":
		return chunk, nil
	}
	return 0, fmt.Errorf("type %.20q", s)
}

// parseChunkType reports whether a chunk is one of zeros.
func parseChunkType(s []byte) (zeros bool, err error) {
	switch string(s) {
	case "":
		return false, nil
	case "zeros":
		return true, nil
	}
	return false, fmt.Errorf("chunk type %.20q", s)
}

// A hash is a SHA-256, if the TOC has one.
type hash struct {
	sum [sha256.Size]byte
	ok  bool
}

// parseHash reads a digest. Whatever isn't SHA-256 is as good as none.
func parseHash(s []byte) (h hash) {
	const prefix = "sha256:"
	if len(s) == len(prefix)+hex.EncodedLen(sha256.Size) && string(s[:len(prefix)]) == prefix {
		_, err := hex.Decode(h.sum[:], s[len(prefix):])
		h.ok = err == nil
	}
	return h
}

// parse reads an entry. Of a key that comes twice the last counts.
func (e *entry) parse(c *cursor) error {
	*e = entry{}
	if err := c.expect('{'); err != nil {
		return err
	}
	for first := true; ; first = false {
		key, ok, err := c.key(first)
		if !ok || err != nil {
			return err
		}
		if err := e.field(c, key); err != nil {
			return err
		}
	}
}

func (e *entry) field(c *cursor, key []byte) (err error) {
	switch string(key) {
	case "name":
		e.name, err = c.string()
	case "type":
		var s []byte
		if s, err = c.string(); err == nil {
			e.kind, err = parseKind(s)
		}
	case "size":
		e.size, err = c.int()
	case "modtime":
		err = e.modTime(c)
	case "linkName":
		e.linkName, err = c.string()
	case "mode":
		e.mode, err = c.int()
	case "uid":
		e.uid, err = c.int()
	case "gid":
		e.gid, err = c.int()
	case "offset":
		e.offset, err = c.int()
	case "innerOffset":
		e.innerOffset, err = c.int()
	case "devMajor":
		e.devMajor, err = c.int()
	case "devMinor":
		e.devMinor, err = c.int()
	case "xattrs":
		e.xattrs, err = xattrs(c)
	case "digest":
		e.digest, err = digestOf(c)
	case "chunkOffset":
		e.chunkOffset, err = c.int()
	case "chunkSize":
		e.chunkSize, err = c.int()
	case "chunkDigest":
		e.chunkDigest, err = digestOf(c)
	case "chunkType":
		var s []byte
		if s, err = c.string(); err == nil {
			e.zeros, err = parseChunkType(s)
		}
	default:
		err = c.skip(0)
	}
	return err
}

func digestOf(c *cursor) (hash, error) {
	s, err := c.string()
	return parseHash(s), err
}

// modTime reads a time. Writers leave out the beginning of 1970, and what containerd can't set when it unpacks a layer is that for it: what is
// earlier, or doesn't fit 63 bits of nanoseconds.
func (e *entry) modTime(c *cursor) error {
	s, err := c.string()
	if err != nil || len(s) == 0 {
		return err
	}
	var t time.Time
	if err := t.UnmarshalText(s); err != nil {
		return fmt.Errorf("modtime %.40q", s)
	}
	// Old versions of Podman's writer put the zero time for it.
	if !t.Before(time.Unix(0, 0)) && !t.After(time.Unix(0, math.MaxInt64)) {
		e.mtime, e.mtimeNsec = t.Unix(), uint32(t.Nanosecond())
	}
	return nil
}

// xattrs reads an object of names and values in base64.
func xattrs(c *cursor) (xs []layer.Xattr, err error) {
	if null, err := c.null(); null || err != nil {
		return nil, err
	}
	if err := c.expect('{'); err != nil {
		return nil, err
	}
	for first := true; ; first = false {
		key, ok, err := c.key(first)
		if !ok || err != nil {
			return xs, err
		}
		name := string(key)
		if lossy(key) {
			return nil, fmt.Errorf("xattr %.40q: %w", name, ErrLossy)
		}
		s, err := c.string()
		if err != nil {
			return nil, err
		}
		value := make([]byte, base64.StdEncoding.DecodedLen(len(s)))
		n, err := base64.StdEncoding.Decode(value, s)
		if err != nil {
			return nil, fmt.Errorf("xattr %.40q: %w", name, err)
		}
		xs = append(xs, layer.Xattr{Name: name, Value: value[:n]})
	}
}
