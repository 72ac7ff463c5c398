package estargz

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

var (
	// ErrReserved is a file of a name that means something to readers of eStargz, and that they would hide or take for what it isn't.
	ErrReserved = fmt.Errorf("the name is reserved by the eStargz format: %w", fs.ErrInvalid)
	// ErrUnsupported is an entry that eStargz has no place for.
	ErrUnsupported = fmt.Errorf("not supported by the eStargz format: %w", fs.ErrInvalid)
)

const (
	// landmarkContent is what a landmark has, when it is one.
	landmarkContent = "\x0f"
	// frameSlack is room for headers behind the last payload of a frame.
	frameSlack = 64 << 10
	// usualMinChunk is up to which minimal chunk size there is room from the beginning for all that goes into a frame.
	usualMinChunk = DefaultMinChunkSize

	xattrRecord  = "SCHILY.xattr."
	sparseRecord = "GNU.sparse."
)

// A splitter makes frames of a tar. Where one ends depends on the tar and the options, never on what a frame is compressed to: that
// isn't known yet.
type splitter struct {
	ctx                 context.Context
	src                 *recorder
	tar                 *tar.Reader
	chunkSize, minChunk int64
	pool                *Pool
	send                func(*frame)

	frame *frame // nil when the next byte begins one
	// lossy is the first name that the TOC can't have.
	lossy          string
	unames, gnames map[int]string // as the entries before have said them
}

func newSplitter(ctx context.Context, r io.Reader, opt WriteOptions, send func(*frame)) *splitter {
	src := &recorder{r: bufio.NewReaderSize(r, 64<<10)}
	return &splitter{
		ctx: ctx, src: src, tar: tar.NewReader(src), chunkSize: opt.ChunkSize, minChunk: opt.MinChunkSize, pool: opt.Pool, send: send,
		unames: map[int]string{}, gnames: map[int]string{},
	}
}

// run sends all frames.
func (s *splitter) run() (err error) {
	defer func() {
		switch {
		case err == nil:
			s.flush()
		case s.frame != nil:
			s.pool.release(s.frame)
		}
	}()
	padding := 0 // behind the last payload
	last := ""
	for {
		s.src.record()
		h, err := s.tar.Next()
		headers := s.src.stop()
		switch {
		case errors.Is(err, io.EOF) && !ends(headers, padding):
			return fmt.Errorf("read the tar behind %q: %w", last, io.ErrUnexpectedEOF)
		case errors.Is(err, io.EOF):
			if err := s.headers(headers); err != nil {
				return err
			}
			return s.rest()
		case err != nil:
			return fmt.Errorf("read the tar behind %q: %w", last, err)
		}
		if err := s.headers(headers); err != nil {
			return err
		}
		if err := s.entry(h); err != nil {
			return &layer.EntryError{Name: h.Name, Err: err}
		}
		last, padding = h.Name, 0
		if h.Typeflag == tar.TypeReg {
			padding = int(-h.Size & 511)
		}
	}
}

// ends reports whether a tar may end with what is behind the last payload: its padding, and nothing or zeros. Archive/tar doesn't mind other
// ends, but whoever unpacks the layer would take the TOC for what is missing.
func ends(b []byte, padding int) bool {
	return len(b) >= padding && len(bytes.Trim(b[padding:], "\x00")) == 0
}

// rest sends what is behind the end of the tar: as a rule zeros.
func (s *splitter) rest() error {
	b := make([]byte, 32<<10)
	for {
		n, err := s.src.Read(b)
		if n > 0 {
			if err := s.headers(b[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read the tar behind its end: %w", err)
		}
	}
}

// headers puts what isn't payload into the frame at hand, or into frames of its own when there is much of it.
func (s *splitter) headers(p []byte) error {
	for len(p) > 0 {
		if s.frame != nil && len(s.frame.tar) == s.frame.limit {
			s.flush()
		}
		if s.frame == nil {
			if err := s.open(0); err != nil {
				return err
			}
		}
		n := min(len(p), s.frame.limit-len(s.frame.tar))
		s.frame.tar = append(s.frame.tar, p[:n]...)
		p = p[n:]
	}
	return nil
}

// entry takes an entry whose headers are in the frame.
func (s *splitter) entry(h *tar.Header) error {
	clean := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
	landmark := clean == prefetchLandmark || clean == noPrefetchLandmark
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader:
		return nil // no entry: it is in the tar, and unpacking ignores it
	case clean == tocName:
		return ErrReserved
	case landmark && (h.Typeflag != tar.TypeReg || h.Size != int64(len(landmarkContent))):
		return ErrReserved
	}
	r := record{toc: tocEntry{
		Name: h.Name, Mode: h.Mode, UID: h.Uid, GID: h.Gid,
		Uname: ifChanged(s.unames, h.Uid, h.Uname), Gname: ifChanged(s.gnames, h.Gid, h.Gname),
		ModTime: modTime(h.ModTime),
	}}
	for key, value := range h.PAXRecords {
		if strings.HasPrefix(key, sparseRecord) {
			return errSparse
		}
		if name, ok := strings.CutPrefix(key, xattrRecord); ok {
			if r.toc.Xattrs == nil {
				r.toc.Xattrs = map[string][]byte{}
			}
			r.toc.Xattrs[name] = []byte(value)
			s.mind(h, name)
		}
	}
	s.mind(h, h.Name)
	s.mind(h, h.Linkname)
	switch h.Typeflag {
	case tar.TypeReg:
		r.toc.Type, r.toc.Size = "reg", h.Size
		if h.Size > 0 {
			return s.file(r, landmark)
		}
		r.toc.Digest = digest.FromString("")
	case tar.TypeLink:
		r.toc.Type, r.toc.LinkName = "hardlink", h.Linkname
	case tar.TypeSymlink:
		r.toc.Type, r.toc.LinkName = "symlink", h.Linkname
	case tar.TypeDir:
		r.toc.Type = "dir"
	case tar.TypeChar:
		r.toc.Type, r.toc.DevMajor, r.toc.DevMinor = "char", h.Devmajor, h.Devminor
	case tar.TypeBlock:
		r.toc.Type, r.toc.DevMajor, r.toc.DevMinor = "block", h.Devmajor, h.Devminor
	case tar.TypeFifo:
		r.toc.Type = "fifo"
	case tar.TypeGNUSparse:
		return errSparse
	default:
		return fmt.Errorf("entry of type %q: %w", h.Typeflag, ErrUnsupported)
	}
	s.frame.records = append(s.frame.records, r)
	return nil
}

// errSparse: the tar leaves out the holes, which a chunk would have to have.
var errSparse = fmt.Errorf("sparse file: %w", ErrUnsupported)

// mind takes note of a name that the TOC can't have.
func (s *splitter) mind(h *tar.Header, name string) {
	if s.lossy == "" && !utf8.ValidString(name) {
		s.lossy = h.Name
	}
}

// file reads the content of a regular file.
func (s *splitter) file(r record, landmark bool) error {
	left := r.toc.Size
	r.part = firstPart
	if left <= s.chunkSize {
		r.part = whole
	} else {
		r.toc.Digest = unknownDigest
	}
	for left > 0 {
		n := min(left, s.chunkSize)
		if n == s.chunkSize {
			r.toc.ChunkSize = n // what has none goes up to the end of the file
		}
		if err := s.begin(n, landmark); err != nil {
			return err
		}
		f := s.frame
		r.start, r.size = len(f.tar), int(n)
		f.tar = slices.Grow(f.tar, int(n))[:r.start+int(n)]
		if _, err := io.ReadFull(s.tar, r.payload(f)); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if landmark && string(r.payload(f)) != landmarkContent {
			return ErrReserved
		}
		f.records = append(f.records, r)
		left -= n
		r = record{part: nextPart, toc: tocEntry{Name: r.toc.Name, Type: "chunk", ChunkOffset: r.toc.ChunkOffset + n}}
		if left <= s.chunkSize {
			r.part = lastPart
		}
	}
	return nil
}

// begin makes the frame one that a payload of n bytes goes into: the one at hand, if it isn't full and both together aren't large. Alone
// is what nothing may be before.
func (s *splitter) begin(n int64, alone bool) error {
	if f := s.frame; f != nil {
		size := int64(len(f.tar))
		if !alone && f.hasPayload() && size < s.minChunk && size+n <= 2*s.minChunk {
			return nil
		}
		s.flush()
	}
	return s.open(n)
}

// hasPayload reports whether a frame has more than headers.
func (f *frame) hasPayload() bool {
	return slices.ContainsFunc(f.records, func(r record) bool { return r.size > 0 })
}

// open begins a frame.
func (s *splitter) open(n int64) (err error) {
	n = max(n, 2*min(s.minChunk, usualMinChunk)) + frameSlack
	s.frame, err = s.pool.frame(s.ctx, int(n), int(max(n, 2*s.minChunk+frameSlack)))
	return err
}

// flush sends the frame at hand.
func (s *splitter) flush() {
	if s.frame != nil {
		s.send(s.frame)
		s.frame = nil
	}
}

// ifChanged returns the name of an id unless an entry before has had the same, as readers expect.
func ifChanged(names map[int]string, id int, name string) string {
	if name == "" || names[id] == name {
		return ""
	}
	names[id] = name
	return name
}

// modTime is a time as the TOC has it, in UTC: none for the beginning of 1970, nor for what RFC 3339 can't say.
func modTime(t time.Time) string {
	t = t.UTC()
	if t.IsZero() || t.UnixNano() == 0 || t.Year() < 0 || t.Year() > 9999 {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}

// A recorder remembers what is read through it, when it is told to.
type recorder struct {
	r    io.Reader
	on   bool
	kept []byte
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.on {
		r.kept = append(r.kept, p[:n]...)
	}
	return n, err
}

func (r *recorder) record() { r.on, r.kept = true, r.kept[:0] }

// stop returns what was read since record; it is good until the next time.
func (r *recorder) stop() []byte {
	r.on = false
	return r.kept
}
