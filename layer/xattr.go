package layer

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// supportedXattr reports whether containerd's applier would put an xattr on an inode. It leaves
// out "trusted." ones, which could steer overlayfs (trusted.overlay.redirect), and those that the filesystem
// refuses: unknown namespaces, and "user." on anything but files and directories.
func supportedXattr(name string, in *Inode) bool {
	namespace, rest, ok := strings.Cut(name, ".")
	if !ok || rest == "" {
		return false
	}
	switch namespace {
	case "user":
		return in.IsRegular() || in.IsDir()
	case "security":
		return true
	default:
		return isACL(name) && in.Mode&unix.S_IFMT != unix.S_IFLNK
	}
}

// cleanXattrs orders the xattrs of an entry, the last of a name winning, without those that an unpacked layer wouldn't have.
func cleanXattrs(in *Inode) ([]Xattr, error) {
	if len(in.Xattrs) == 0 {
		return nil, nil
	}
	xattrs := make([]Xattr, 0, len(in.Xattrs))
	list := 0
	for _, x := range in.Xattrs {
		switch {
		case x.Name == "" || strings.IndexByte(x.Name, 0) >= 0:
			return nil, fmt.Errorf("%w: xattr %q", ErrAttr, x.Name)
		case len(x.Name) > MaxXattrName:
			return nil, fmt.Errorf("%w: name of xattr %.40q… has %d bytes", ErrLimit, x.Name, len(x.Name))
		case len(x.Value) > MaxXattrValue:
			return nil, fmt.Errorf("%w: xattr %s has %d bytes", ErrLimit, x.Name, len(x.Value))
		}
		if list += len(x.Name) + 1; list > MaxXattrList {
			return nil, fmt.Errorf("%w: names of xattrs have over %d bytes", ErrLimit, MaxXattrList)
		}
		if supportedXattr(x.Name, in) {
			xattrs = append(xattrs, x)
		}
	}
	return mergeXattrs(nil, xattrs), nil
}

// mergeXattrs returns the xattrs of both, ordered by name; those of later win, as setxattr(2) does.
func mergeXattrs(earlier, later []Xattr) []Xattr {
	all := slices.Concat(earlier, later)
	slices.SortStableFunc(all, func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
	kept := all[:0]
	for i, x := range all {
		if i+1 < len(all) && all[i+1].Name == x.Name {
			continue
		}
		kept = append(kept, x)
	}
	return kept
}
