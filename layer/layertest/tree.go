package layertest

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Tree writes a layer down, a line for every name but the root's, ordered by path: ls -l, as it
// were, of what differs from the usual.
//
//	d 755 a/ implied opaque
//	- 644 a/f 5 =a/b mtime:1700000000 user.x=y
//	l a/l -> f
//	whiteout a/w
//
// "=" names the first of the names that share an inode.
func Tree(l *layer.Layer) []string {
	var lines []string
	first := map[uint32]string{}
	var walk func(dir uint32, at string)
	walk = func(dir uint32, at string) {
		for _, e := range l.Inodes[dir].Entries {
			path := at + e.Name
			if _, ok := first[e.Inode]; !ok {
				first[e.Inode] = path
			}
			lines = append(lines, line(&l.Inodes[e.Inode], path, first[e.Inode]))
			if l.Inodes[e.Inode].IsDir() {
				walk(e.Inode, path+"/")
			}
		}
	}
	walk(layer.Root, "")
	return lines
}

func line(in *layer.Inode, path, first string) string {
	var b strings.Builder
	perm := in.Mode & 0o7777
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		fmt.Fprintf(&b, "d %o %s/", perm, path)
	case unix.S_IFREG:
		fmt.Fprintf(&b, "- %o %s %d", perm, path, in.Size)
	case unix.S_IFLNK:
		fmt.Fprintf(&b, "l %s -> %s", path, in.Target)
	case unix.S_IFIFO:
		fmt.Fprintf(&b, "p %o %s", perm, path)
	case unix.S_IFCHR:
		if in.IsWhiteout() {
			fmt.Fprintf(&b, "whiteout %s", path)
			break
		}
		fmt.Fprintf(&b, "c %o %s %d:%d", perm, path, in.Major, in.Minor)
	case unix.S_IFBLK:
		fmt.Fprintf(&b, "b %o %s %d:%d", perm, path, in.Major, in.Minor)
	}
	if in.Implied {
		b.WriteString(" implied")
	}
	if in.Opaque {
		b.WriteString(" opaque")
	}
	if first != path {
		fmt.Fprintf(&b, " =%s", first)
	}
	if in.UID != 0 || in.GID != 0 {
		fmt.Fprintf(&b, " %d:%d", in.UID, in.GID)
	}
	if in.Mtime != 0 || in.MtimeNsec != 0 {
		fmt.Fprintf(&b, " mtime:%d", in.Mtime)
		if in.MtimeNsec != 0 {
			fmt.Fprintf(&b, ".%09d", in.MtimeNsec)
		}
	}
	for _, x := range in.Xattrs {
		fmt.Fprintf(&b, " %s=%s", x.Name, x.Value)
	}
	return b.String()
}
