package image

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// xattrPrefixes are the namespaces that EROFS has numbers for, and those numbers: EROFS_XATTR_INDEX_*.
var xattrPrefixes = []struct {
	prefix string
	whole  bool // the prefix is the whole name
	index  byte
}{
	{"user.", false, 1},
	{"system.posix_acl_access", true, 2},
	{"system.posix_acl_default", true, 3},
	{"trusted.", false, 4},
	{"security.", false, 6},
}

// splitXattr returns the number of a name's namespace and the rest of the name.
func splitXattr(name string) (index byte, rest string, ok bool) {
	for _, x := range xattrPrefixes {
		rest, found := strings.CutPrefix(name, x.prefix)
		if found && x.whole == (rest == "") {
			return x.index, rest, true
		}
	}
	return 0, "", false
}

// sharedXattrs are those that several inodes have, such as SELinux labels. They are stored once.
type sharedXattrs struct {
	ids  map[xattrKey]uint32 // in units of 4 bytes
	list []layer.Xattr
	size int64 // bytes
}

type xattrKey struct{ name, value string }

// opaqueXattr is how overlayfs knows a directory that hides the one below it.
func (p *plan) opaqueXattr() layer.Xattr {
	if p.opt.UserXattr {
		return layer.Xattr{Name: "user.overlay.opaque", Value: []byte("y")}
	}
	return layer.Xattr{Name: "trusted.overlay.opaque", Value: []byte("y")}
}

// xattrsOf returns what the inode has in the image.
func (p *plan) xattrsOf(i uint32) []layer.Xattr {
	in := &p.l.Inodes[i]
	if !in.Opaque {
		return in.Xattrs
	}
	opaque := p.opaqueXattr()
	list := slices.DeleteFunc(slices.Clone(in.Xattrs), func(x layer.Xattr) bool { return x.Name == opaque.Name })
	return append(list, opaque)
}

// shareXattrs finds those that more than one inode has.
func (p *plan) shareXattrs() {
	var seen map[xattrKey]bool
	for i, in := range p.l.All() {
		if len(in.Xattrs) == 0 && !in.Opaque {
			continue
		}
		for _, x := range p.xattrsOf(i) {
			if _, rest, ok := splitXattr(x.Name); !ok || len(rest) > maxName || len(x.Value) > math.MaxUint16 {
				continue
			}
			if seen == nil {
				seen = make(map[xattrKey]bool)
				p.shared.ids = make(map[xattrKey]uint32)
			}
			key := xattrKey{x.Name, string(x.Value)}
			if !seen[key] {
				seen[key] = true
				continue
			}
			if _, ok := p.shared.ids[key]; !ok {
				p.shared.ids[key] = uint32(p.shared.size / xattrEntry)
				p.shared.list = append(p.shared.list, x)
				p.shared.size += int64(xattrEntrySize(x))
			}
		}
	}
}

func xattrEntrySize(x layer.Xattr) int {
	_, rest, _ := splitXattr(x.Name)
	return int(align(int64(xattrEntry+len(rest)+len(x.Value)), xattrEntry))
}

// xattrSize returns how many bytes an inode's extended attributes take behind it.
func (p *plan) xattrSize(i uint32) (int, error) {
	if in := &p.l.Inodes[i]; len(in.Xattrs) == 0 && !in.Opaque {
		return 0, nil
	}
	size, shared := 0, 0
	for _, x := range p.xattrsOf(i) {
		_, rest, ok := splitXattr(x.Name)
		if !ok {
			continue
		}
		if len(rest) > maxName || len(x.Value) > math.MaxUint16 {
			return 0, fmt.Errorf("%w: inode %d: extended attribute %.300q of %d bytes", ErrLayer, i, x.Name, len(x.Value))
		}
		if _, ok := p.sharedID(x); ok && shared < maxXattrsShared {
			shared++
			size += xattrEntry
		} else {
			size += xattrEntrySize(x)
		}
	}
	if size == 0 {
		return 0, nil
	}
	size += xattrHeader
	if (size-xattrHeader)/xattrEntry+1 > maxXattrCount {
		return 0, fmt.Errorf("%w: inode %d: %d bytes of extended attributes", ErrLayer, i, size)
	}
	return size, nil
}

// xattrCount returns what i_xattr_icount says of size bytes.
func xattrCount(size int) uint16 {
	if size == 0 {
		return 0
	}
	return uint16((size-xattrHeader)/xattrEntry + 1)
}

func (p *plan) sharedID(x layer.Xattr) (id uint32, ok bool) {
	if len(p.shared.ids) == 0 {
		return 0, false
	}
	id, ok = p.shared.ids[xattrKey{x.Name, string(x.Value)}]
	return id, ok
}

// appendXattrs appends the numbers of an inode's shared extended attributes, then the others.
func (p *plan) appendXattrs(b []byte, i uint32) []byte {
	if size, _ := p.xattrSize(i); size == 0 {
		return b
	}
	head := len(b)
	b = append(b, zeros[:xattrHeader]...)
	var own []layer.Xattr
	for _, x := range p.xattrsOf(i) {
		if _, _, ok := splitXattr(x.Name); !ok {
			continue
		}
		if id, ok := p.sharedID(x); ok && b[head+4] < maxXattrsShared {
			b = le.AppendUint32(b, id)
			b[head+4]++
		} else {
			own = append(own, x)
		}
	}
	for _, x := range own {
		b = appendXattr(b, x)
	}
	return b
}

func appendXattr(b []byte, x layer.Xattr) []byte {
	index, rest, _ := splitXattr(x.Name)
	b = append(b, byte(len(rest)), index)
	b = le.AppendUint16(b, uint16(len(x.Value)))
	b = append(b, rest...)
	b = append(b, x.Value...)
	return append(b, zeros[:xattrEntrySize(x)-xattrEntry-len(rest)-len(x.Value)]...)
}

// sharedXattrs writes those that several inodes have.
func (p *plan) sharedXattrs(w *writer) {
	w.padTo(p.xattrBlock * BlockSize)
	for _, x := range p.shared.list {
		w.buf = appendXattr(w.buf, x)
		w.mayFlush()
	}
	w.padTo(p.blocks * BlockSize)
}
