package order

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

// landmarkContent is what landmarks have, files in the root.
// https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md
const landmarkContent = "\x0f"

// A Tar is one that is in order. Whoever reads it must close it.
type Tar struct {
	// First is how many files are in front of the landmark: those that the list names, and what they can't do without. Directories don't count.
	First int

	io.Reader
	kept *os.File
}

// Close frees what the Tar takes on disk.
func (t *Tar) Close() error { return t.kept.Close() }

// Tar reads a tar up to its end, keeps it in a directory, and returns it in order. It fails when the tar can't be read, the disk is full, or
// ctx ends and a Read of the tar returns. What is wrong with a tar that stays as it is, is found out by who reads that.
func (l *List) Tar(ctx context.Context, r io.Reader, dir string) (_ *Tar, err error) {
	kept, err := keep(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			kept.Close()
		}
	}()
	s := &spool{r: r, w: bufio.NewWriterSize(kept, 256<<10)}
	found, err := s.contents(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.w.Flush(); err != nil {
		return nil, s.full(err)
	}
	if found.eager {
		return &Tar{Reader: part{end: s.n}.reader(kept), kept: kept}, nil
	}
	p := newPlan(found.said.restore(found.entries))
	p.move(l)
	parts, err := p.parts(part{off: found.end, end: s.n})
	if err != nil {
		return nil, err
	}
	readers := make([]io.Reader, len(parts))
	for i, part := range parts {
		readers[i] = part.reader(kept)
	}
	return &Tar{First: p.first(), Reader: io.MultiReader(readers...), kept: kept}, nil
}

// keep makes a file that nobody else sees, and that nobody has to remove.
func keep(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "order-")
	if err != nil {
		return nil, fmt.Errorf("keep a layer's tar while its files are put in order: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("keep a layer's tar while its files are put in order: %w", err)
	}
	return f, nil
}

// A spool writes down what is read through it.
type spool struct {
	r   io.Reader
	w   *bufio.Writer
	n   int64
	err error // of w
}

func (s *spool) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if _, werr := s.w.Write(p[:n]); werr != nil {
		s.err = s.full(werr)
		return 0, s.err
	}
	s.n += int64(n)
	return n, err
}

func (s *spool) full(err error) error {
	return fmt.Errorf("keep a layer's tar while its files are put in order, at %d bytes: %w", s.n, err)
}

// An entry is one of a tar, from its headers up to the padding behind its content.
type entry struct {
	name       string
	link       string // of a hardlink
	directory  bool
	hardlink   bool
	global     bool // a header that holds for all that follow
	start, end int64
}

// contents is what a tar has.
type contents struct {
	entries []entry // but for landmarks
	said    record  // what the last landmark says
	end     int64   // of the last entry
	eager   bool    // nobody mounts the layer lazily, and entries haven't been looked at up to the end
}

// contents reads all of the tar.
func (s *spool) contents(ctx context.Context) (c contents, err error) {
	// The tar's reader asks for what it needs and no more, so s.n is where it has got to; what the source gives is buffered before.
	s.r = bufio.NewReaderSize(s.r, 256<<10)
	tr := tar.NewReader(s)
	last := "its beginning"
	for {
		if err := context.Cause(ctx); err != nil {
			return c, err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return c, s.unread(last, err)
		}
		last = strconv.Quote(h.Name)
		e := entry{
			name: clean(h.Name), start: c.end,
			directory: h.Typeflag == tar.TypeDir, hardlink: h.Typeflag == tar.TypeLink, global: h.Typeflag == tar.TypeXGlobalHeader,
		}
		if e.hardlink {
			e.link = clean(h.Linkname)
		}
		if !mountable(h, &e) || len(c.entries) == layer.MaxEntries {
			c.eager = true
			break
		}
		landmark, err := content(h, e.name, tr)
		if err != nil {
			return c, s.unread(last, err)
		}
		c.end = s.n + -s.n&511
		if landmark {
			c.said = record{text: h.PAXRecords[orderRecord], at: len(c.entries)}
			continue
		}
		e.end = c.end
		c.entries = append(c.entries, e)
	}
	if _, err := io.Copy(io.Discard, s); err != nil {
		return c, s.unread(last, err)
	}
	if s.n < c.end {
		return c, s.unread(last, io.ErrUnexpectedEOF)
	}
	return c, nil
}

// mountable reports whether readers may take a layer with an entry. Of a sparse file, the tar's reader would make all of its holes; names could be
// a megabyte, and so take more memory than there is.
func mountable(h *tar.Header, e *entry) bool {
	return frames.Tellable(h) && len(e.name) <= layer.MaxPath && len(e.link) <= layer.MaxPath
}

// content reads that of an entry, and reports whether it is a landmark. A file that is only called so is none.
func content(h *tar.Header, name string, r io.Reader) (landmark bool, err error) {
	if h.Typeflag == tar.TypeReg && h.Size == int64(len(landmarkContent)) && (name == toc.PrefetchLandmark || name == toc.NoPrefetchLandmark) {
		b, err := io.ReadAll(r)
		return string(b) == landmarkContent, err
	}
	_, err = io.Copy(io.Discard, r)
	return false, err
}

// unread is the error of a tar that can't be read behind, or in, an entry.
func (s *spool) unread(last string, err error) error {
	if s.err != nil {
		return s.err
	}
	return fmt.Errorf("read the tar behind %s: %w", last, err)
}

// A part is a piece of the result: of the tar that is kept, or some bytes.
type part struct {
	bytes    []byte
	off, end int64
}

func (p part) reader(kept io.ReaderAt) io.Reader {
	if p.bytes != nil {
		return bytes.NewReader(p.bytes)
	}
	return io.NewSectionReader(kept, p.off, p.end-p.off)
}

// landmark is the entry of one, with a record of the order if there is one.
func landmark(name, said string) ([]byte, error) {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(landmarkContent))}
	if said != "" {
		h.PAXRecords = map[string]string{orderRecord: said}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(h); err != nil {
		return nil, fmt.Errorf("write a landmark: %w", err)
	}
	if _, err := io.WriteString(w, landmarkContent); err != nil {
		return nil, fmt.Errorf("write a landmark: %w", err)
	}
	if err := w.Flush(); err != nil { // pads it, but doesn't end the tar
		return nil, fmt.Errorf("write a landmark: %w", err)
	}
	return b.Bytes(), nil
}
