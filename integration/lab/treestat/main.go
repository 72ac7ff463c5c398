// Command treestat prints what can be seen of every file below the directories it is given,
// one JSON object per line, sorted by path: the test of a filesystem runs it inside build
// steps and compares. It is one static binary without dependencies.
//
// Left out is what differs between filesystems that hold the same layer: inode
// and device numbers (hardlinks are told by the path of their first name), sizes and link counts of directories,
// times of access and change. /proc, /sys, /dev and arguments that start with "-", less the dash, are
// skipped.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

type entry struct {
	Path   string            `json:"path"`
	Mode   string            `json:"mode"`
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Size   int64             `json:"size"`
	MTime  string            `json:"mtime"`
	Links  uint64            `json:"links,omitempty"`
	Same   string            `json:"same,omitempty"` // first path of the same inode
	Rdev   uint64            `json:"rdev,omitempty"`
	Target string            `json:"target,omitempty"`
	Xattrs map[string]string `json:"xattrs,omitempty"`
	Sum    string            `json:"sum,omitempty"`
}

func main() {
	skip := []string{"/proc", "/sys", "/dev"}
	var roots []string
	for _, a := range os.Args[1:] {
		if s, ok := strings.CutPrefix(a, "-"); ok {
			skip = append(skip, s)
		} else {
			roots = append(roots, a)
		}
	}
	enc := json.NewEncoder(os.Stdout)
	enc.SetEscapeHTML(false)
	inodes := map[[2]uint64]string{}
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if slices.Contains(skip, path) {
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			e, err := look(path, inodes)
			if err != nil {
				return err
			}
			return enc.Encode(e)
		})
		if err != nil {
			fmt.Fprintln(os.Stderr, "treestat:", err)
			os.Exit(1)
		}
	}
}

func look(path string, inodes map[[2]uint64]string) (entry, error) {
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		return entry{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	e := entry{
		Path:  path,
		Mode:  fmt.Sprintf("%o", st.Mode),
		UID:   st.Uid,
		GID:   st.Gid,
		MTime: fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec),
	}
	kind := st.Mode & syscall.S_IFMT
	if kind != syscall.S_IFDIR {
		e.Size, e.Links = st.Size, uint64(st.Nlink)
		key := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := inodes[key]; ok {
			e.Same = first
		} else {
			inodes[key] = path
		}
	}
	var err error
	switch kind {
	case syscall.S_IFCHR, syscall.S_IFBLK:
		e.Rdev = uint64(st.Rdev)
	case syscall.S_IFLNK:
		e.Target, err = os.Readlink(path)
	case syscall.S_IFREG:
		e.Sum, err = sum(path)
	}
	if err != nil {
		return entry{}, err
	}
	if kind != syscall.S_IFLNK {
		e.Xattrs, err = xattrs(path)
	}
	return e, err
}

func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := syscall.Listxattr(path, buf)
	if errors.Is(err, syscall.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	out := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		// overlayfs hides its own, and SELinux' are the machine's.
		if name == "" || name == "security.selinux" {
			continue
		}
		val := make([]byte, 64<<10)
		m, err := syscall.Getxattr(path, name, val)
		if err != nil {
			return nil, &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		out[name] = hex.EncodeToString(val[:m])
	}
	return out, nil
}
