package baseimage

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// An Entry is one entry of a hand-made layer.
type Entry struct {
	Header  tar.Header
	Content string
}

// Dir is a directory, mode 0755.
func Dir(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: 0o755}}
}

// File is a regular file, mode 0644.
func File(name, content string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, Content: content}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Hardlink is another name of a file that came before it.
func Hardlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

// Node is a character ('c') or block ('b') device, or a fifo ('p').
func Node(name string, kind byte, major, minor int64) Entry {
	flag := map[byte]byte{'c': tar.TypeChar, 'b': tar.TypeBlock, 'p': tar.TypeFifo}[kind]
	return Entry{Header: tar.Header{Typeflag: flag, Name: name, Devmajor: major, Devminor: minor, Mode: 0o600}}
}

// Whiteout deletes name of a lower layer.
func Whiteout(name string) Entry {
	return File(filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), "")
}

// Opaque hides what lower layers have in a directory.
func Opaque(dir string) Entry { return File(filepath.Join(dir, ".wh..wh..opq"), "") }

// Mode sets permission bits, set-id and sticky included.
func (e Entry) Mode(mode int64) Entry { e.Header.Mode = mode; return e }

// Owner sets the numeric owner.
func (e Entry) Owner(uid, gid int) Entry { e.Header.Uid, e.Header.Gid = uid, gid; return e }

// Xattr adds an extended attribute.
func (e Entry) Xattr(key, value string) Entry {
	records := map[string]string{"SCHILY.xattr." + key: value}
	maps.Copy(records, e.Header.PAXRecords)
	e.Header.PAXRecords = records
	return e
}

// TarOf writes a layer of the entries into dir. The file is named name.tar.
func TarOf(dir, name string, entries ...Entry) (_ Layer, err error) {
	path := filepath.Join(dir, name+".tar")
	f, err := os.Create(path)
	if err != nil {
		return Layer{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	tw := tar.NewWriter(f)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.Content))
		h.Format = tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_700_000_000, 0)
		}
		if err := tw.WriteHeader(&h); err != nil {
			return Layer{}, fmt.Errorf("write %s to layer %s: %w", h.Name, name, err)
		}
		if _, err := io.WriteString(tw, e.Content); err != nil {
			return Layer{}, fmt.Errorf("write %s to layer %s: %w", h.Name, name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return Layer{}, err
	}
	return Layer{Name: name, Tar: path}, nil
}

// tarTree packs the files below root with GNU tar: hardlinks, extended attributes
// and devices kept, owners numeric, times of access and change left out, names sorted.
// More arguments go before the last, ".".
func tarTree(ctx context.Context, out, root string, args ...string) error {
	tmp := out + ".tmp"
	args = append([]string{
		"--create", "--file", tmp, "--directory", root,
		"--format=pax", "--pax-option=delete=atime,delete=ctime", "--sort=name", "--numeric-owner",
		"--xattrs", "--xattrs-include=*", "--xattrs-exclude=trusted.overlay.*",
	}, append(args, ".")...)
	if err := run(ctx, "tar", args...); err != nil {
		return err
	}
	return os.Rename(tmp, out)
}

func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, tail(out))
	}
	return nil
}

// tail returns the last lines of a command's output.
func tail(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(lines[max(0, len(lines)-8):], "\n")
}

// Measure reads the layers' tar files and returns the image's figures.
func (im Image) Measure() (Facts, error) {
	facts := Facts{Layers: len(im.Layers)}
	for _, l := range im.Layers {
		f, err := os.Open(l.Tar)
		if err != nil {
			return Facts{}, err
		}
		tr := tar.NewReader(f)
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return Facts{}, errors.Join(fmt.Errorf("read %s: %w", l.Tar, err), f.Close())
			}
			facts.Files++
			facts.Unpacked += h.Size
		}
		if err := f.Close(); err != nil {
			return Facts{}, err
		}
	}
	return facts, nil
}
