package snapshot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/metadata"
	"github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/opencontainers/go-digest"
)

// openTOC is the file system's metadata store: stargz-snapshotter's, with checks
// that it lacks.
func (d *door) openTOC(sr *io.SectionReader, opts ...metadata.Option) (_ metadata.Reader, err error) {
	// estargz v0.19 slices by offsets out of the footer before it looks at them.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("malformed: %v", p)
		}
	}()
	r, err := memory.NewReader(sr, opts...)
	if err != nil {
		return nil, err
	}
	dirs, err := impliedDirs(r, sr)
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	d.mu.Lock()
	d.implied[r.TOCDigest()] = dirs
	d.mu.Unlock()
	return &toc{Reader: r, door: d}, nil
}

// impliedDirs returns the directories, other than the root, which the layer needs
// and has no entry for. Unpacked, such a directory is the one of the layer below,
// with its mode and owner; the file system makes one up, which hides that.
func impliedDirs(r metadata.Reader, sr *io.SectionReader) ([]string, error) {
	suspect, err := madeUp(r, r.RootID())
	if err != nil || !suspect {
		return nil, err
	}
	// Such an entry may also be a real one: only the table itself tells.
	off, footer, err := estargz.OpenFooter(sr)
	if err != nil {
		return nil, nil // another format, whose writers leave none out
	}
	table, _, err := new(estargz.GzipDecompressor).ParseTOC(io.NewSectionReader(sr, off, sr.Size()-footer-off))
	if err != nil {
		return nil, fmt.Errorf("parse table of contents: %w", err)
	}
	clean := func(name string) string { return path.Clean("/" + name) }
	have := map[string]bool{"/": true}
	for _, e := range table.Entries {
		if e.Type == "dir" {
			have[clean(e.Name)] = true
		}
	}
	var implied []string
	for _, e := range table.Entries {
		for dir := path.Dir(clean(e.Name)); !have[dir]; dir = path.Dir(dir) {
			have[dir] = true
			implied = append(implied, dir)
		}
	}
	return implied, nil
}

// madeUp reports whether a directory below id looks as estargz makes up those that
// have no entry.
func madeUp(r metadata.Reader, id uint32) (found bool, err error) {
	werr := r.ForeachChild(id, func(_ string, child uint32, mode os.FileMode) bool {
		if !mode.IsDir() {
			return true
		}
		var attr metadata.Attr
		if attr, err = r.GetAttr(child); err != nil {
			return false
		}
		if attr.ModTime.IsZero() && attr.Mode.Perm() == 0o755 && attr.UID == 0 && attr.GID == 0 && len(attr.Xattrs) == 0 {
			found = true
			return false
		}
		found, err = madeUp(r, child)
		return err == nil && !found
	})
	return found, errors.Join(err, werr)
}

// toc gives a second chance to chunks that arrived corrupt, and says which they
// were when they are so again.
type toc struct {
	metadata.Reader
	door *door
}

// Clone implements metadata.Reader.
func (t *toc) Clone(sr *io.SectionReader) (_ metadata.Reader, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("malformed: %v", p)
		}
	}()
	r, err := t.Reader.Clone(sr)
	if err != nil {
		return nil, err
	}
	return &toc{Reader: r, door: t.door}, nil
}

// OpenFile implements metadata.Reader.
func (t *toc) OpenFile(id uint32) (metadata.File, error) {
	f, err := t.Reader.OpenFile(id)
	if err != nil {
		return nil, err
	}
	return &file{File: f, toc: t, id: id}, nil
}

// OpenFileWithPreReader implements metadata.Reader.
func (t *toc) OpenFileWithPreReader(id uint32, preRead func(id uint32, chunkOffset, chunkSize int64, chunkDigest string, r io.Reader) error) (metadata.File, error) {
	f, err := t.Reader.OpenFileWithPreReader(id, preRead)
	if err != nil {
		return nil, err
	}
	return &file{File: f, toc: t, id: id}, nil
}

// name finds the path of an entry, for errors.
func (t *toc) name(dir, id uint32, at string) string {
	found := ""
	_ = t.ForeachChild(dir, func(base string, child uint32, mode os.FileMode) bool {
		switch p := path.Join(at, base); {
		case child == id:
			found = p
		case mode.IsDir():
			found = t.name(child, id, p)
		}
		return found == ""
	})
	return found
}

// file is an open file of a layer.
type file struct {
	metadata.File
	toc *toc
	id  uint32
}

// ReadAt implements metadata.File. The file system reads whole chunks and verifies
// them; what it does not do is to fetch a corrupt one again, whose compressed bytes
// it keeps.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.read(p, off)
	if _, corrupt := errors.AsType[*corruptError](err); !corrupt {
		return n, err
	}
	f.toc.door.refetch()
	n, err = f.read(p, off)
	if corrupt, ok := errors.AsType[*corruptError](err); ok {
		err = fmt.Errorf("read %s: %w", f.toc.name(f.toc.RootID(), f.id, "/"), corrupt)
		f.toc.door.corrupt(f.toc.TOCDigest(), err)
	}
	return n, err
}

// corruptError is a chunk whose bytes aren't those that the table promises.
type corruptError struct {
	off int64
	err error
}

func (e *corruptError) Error() string { return fmt.Sprintf("chunk at %d: %v", e.off, e.err) }
func (e *corruptError) Unwrap() error { return e.err }

func (f *file) read(p []byte, off int64) (int, error) {
	start, size, want, ok := f.ChunkEntryForOffset(off)
	whole := ok && start == off && size == int64(len(p))
	failed := f.toc.door.failures.Load()
	n, err := f.File.ReadAt(p, off)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		if f.toc.door.failures.Load() != failed {
			return n, err // the registry, which has been asked again already
		}
		return n, &corruptError{off, err}
	case whole && want != "":
		dgst, perr := digest.Parse(want)
		if perr != nil {
			return n, &corruptError{off, perr}
		}
		if got := dgst.Algorithm().FromBytes(p[:n]); got != dgst {
			return n, &corruptError{off, fmt.Errorf("digest mismatch: want %s, got %s", dgst, got)}
		}
	}
	return n, err
}
