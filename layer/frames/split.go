package frames

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

// ErrReserved is a file of a name that means something to readers of eStargz, and that they would hide or take for what it isn't.
var ErrReserved = layer.Invalid("the name is reserved by the eStargz format: rename it, or choose zstdchunked")

const (
	// landmarkContent is what a landmark has, when it is one.
	landmarkContent = "\x0f"
	// frameSlack is room for headers behind the last payload of a frame.
	frameSlack = 64 << 10
	// usualMinChunk is up to which minimal chunk size there is room from the beginning for all that goes into a frame.
	usualMinChunk = 64 << 10

	// maxKept is how much of what isn't a payload is kept before it goes into frames.
	maxKept = 256 << 10

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
	estargz             bool
	pool                *Pool
	send                func(*Frame)

	frame *Frame // nil when the next byte begins one
	// lossy is the first name that the TOC can't have, untold the first entry that it has no place for.
	lossy, untold   string
	entries, chunks int64          // that the TOC has
	unames, gnames  map[int]string // as the entries before have said them
}

func newSplitter(ctx context.Context, r io.Reader, opt Options, send func(*Frame)) *splitter {
	src := &recorder{r: bufio.NewReaderSize(r, 64<<10)}
	s := &splitter{
		ctx: ctx, src: src, tar: tar.NewReader(src), chunkSize: opt.ChunkSize, minChunk: opt.MinChunkSize, estargz: opt.EStargz, pool: opt.Pool, send: send,
		unames: map[int]string{}, gnames: map[int]string{},
	}
	src.spill = s.headers
	return s
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
	told := true // whether the TOC has a place for the last entry
	last := "its beginning"
	for {
		s.src.record()
		h, err := s.tar.Next()
		headers := s.src.stop()
		switch {
		case errors.Is(err, io.EOF) && told && !ends(headers, padding):
			return fmt.Errorf("read the tar behind %s: it ends early: %w", last, io.ErrUnexpectedEOF)
		case errors.Is(err, io.EOF):
			if err := s.headers(headers); err != nil {
				return err
			}
			return s.rest()
		case err != nil:
			return fmt.Errorf("read the tar behind %s: %w", last, err)
		}
		if err := s.headers(headers); err != nil {
			return err
		}
		last, padding = strconv.Quote(h.Name), 0
		if told = Tellable(h) && s.room(h); !told {
			// Its content comes with the headers of the next entry.
			s.untold, s.frame.Untold = cmp.Or(s.untold, h.Name), true
			continue
		}
		if err := s.entry(h); err != nil {
			return &layer.EntryError{Name: h.Name, Err: err}
		}
		if h.Typeflag == tar.TypeReg {
			padding = int(-h.Size & 511)
		}
	}
}

// Tellable reports whether a TOC has a place for an entry. It has none for sparse files, of which the tar leaves out the holes, which a chunk would
// have to have, nor for types that nobody knows.
func Tellable(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, sparseRecord) {
			return false
		}
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeLink, tar.TypeSymlink, tar.TypeDir, tar.TypeChar, tar.TypeBlock, tar.TypeFifo, tar.TypeXGlobalHeader:
		return true
	}
	return false
}

// room reports whether the TOC of an entry more is one that readers take, and counts the entry if so.
func (s *splitter) room(h *tar.Header) bool {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return true
	}
	var chunks int64
	if h.Typeflag == tar.TypeReg && h.Size > 0 {
		chunks = (h.Size-1)/s.chunkSize + 1
	}
	if s.entries == layer.MaxEntries || chunks > layer.MaxChunks-s.chunks {
		return false
	}
	s.entries++
	s.chunks += chunks
	return true
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
		if s.frame != nil && len(s.frame.Tar) == s.frame.limit {
			s.flush()
		}
		if s.frame == nil {
			if err := s.open(0); err != nil {
				return err
			}
		}
		n := min(len(p), s.frame.limit-len(s.frame.Tar))
		s.frame.Tar = append(s.frame.Tar, p[:n]...)
		p = p[n:]
	}
	return nil
}

// entry takes an entry whose headers are in the frame.
func (s *splitter) entry(h *tar.Header) error {
	clean := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
	landmark := s.estargz && (clean == toc.PrefetchLandmark || clean == toc.NoPrefetchLandmark)
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader:
		if !s.estargz {
			s.lossy = cmp.Or(s.lossy, h.Name) // Podman takes it for an entry of an unknown type
		}
		return nil // no entry: it is in the tar, and unpacking ignores it
	case s.estargz && clean == toc.Name:
		return ErrReserved
	case landmark && (h.Typeflag != tar.TypeReg || h.Size != int64(len(landmarkContent))):
		return ErrReserved
	}
	r := Record{TOC: Entry{
		Name: h.Name, Mode: h.Mode, UID: h.Uid, GID: h.Gid,
		Uname: ifChanged(s.unames, h.Uid, h.Uname), Gname: ifChanged(s.gnames, h.Gid, h.Gname),
		ModTime: timeOf(h.ModTime),
	}, AccessTime: timeOf(h.AccessTime), ChangeTime: timeOf(h.ChangeTime)}
	if !s.estargz {
		r.TOC.LinkName, r.TOC.DevMajor, r.TOC.DevMinor = h.Linkname, h.Devmajor, h.Devminor
		for _, t := range []time.Time{h.ModTime, h.AccessTime, h.ChangeTime} {
			if !sayable(t) {
				s.lossy = cmp.Or(s.lossy, h.Name)
			}
		}
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, xattrRecord); ok {
			if r.TOC.Xattrs == nil {
				r.TOC.Xattrs = map[string][]byte{}
			}
			r.TOC.Xattrs[name] = []byte(value)
			s.mind(h, name)
		}
	}
	s.mind(h, h.Name)
	s.mind(h, h.Linkname)
	switch h.Typeflag {
	case tar.TypeReg:
		r.TOC.Type, r.TOC.Size = "reg", h.Size
		if h.Size > 0 {
			return s.file(r, landmark)
		}
		r.TOC.Digest = digest.FromString("")
	case tar.TypeLink:
		r.TOC.Type, r.TOC.LinkName = "hardlink", h.Linkname
	case tar.TypeSymlink:
		r.TOC.Type, r.TOC.LinkName = "symlink", h.Linkname
	case tar.TypeDir:
		r.TOC.Type = "dir"
	case tar.TypeChar:
		r.TOC.Type, r.TOC.DevMajor, r.TOC.DevMinor = "char", h.Devmajor, h.Devminor
	case tar.TypeBlock:
		r.TOC.Type, r.TOC.DevMajor, r.TOC.DevMinor = "block", h.Devmajor, h.Devminor
	case tar.TypeFifo:
		r.TOC.Type = "fifo"
	}
	r.Start = len(s.frame.Tar)
	s.frame.Records = append(s.frame.Records, r)
	return nil
}

// mind takes note of a name that the TOC can't have.
func (s *splitter) mind(h *tar.Header, name string) {
	if s.lossy == "" && !utf8.ValidString(name) {
		s.lossy = h.Name
	}
}

// file reads the content of a regular file.
func (s *splitter) file(r Record, landmark bool) error {
	left := r.TOC.Size
	r.Part = FirstPart
	if left <= s.chunkSize {
		r.Part = Whole
	} else {
		r.TOC.Digest = UnknownDigest
	}
	for left > 0 {
		n := min(left, s.chunkSize)
		if n == s.chunkSize {
			r.TOC.ChunkSize = n // what has none goes up to the end of the file
		}
		if err := s.begin(n, landmark); err != nil {
			return err
		}
		f := s.frame
		r.Start, r.Size = len(f.Tar), int(n)
		f.Tar = slices.Grow(f.Tar, int(n))[:r.Start+int(n)]
		if _, err := io.ReadFull(s.tar, r.Payload(f)); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("the tar ends in the middle of it: %w", io.ErrUnexpectedEOF)
			}
			return err
		}
		if landmark && string(r.Payload(f)) != landmarkContent {
			return ErrReserved
		}
		f.Records = append(f.Records, r)
		left -= n
		r = Record{Part: NextPart, TOC: Entry{Name: r.TOC.Name, Type: "chunk", ChunkOffset: r.TOC.ChunkOffset + n}}
		if left <= s.chunkSize {
			r.Part = LastPart
		}
	}
	return nil
}

// begin makes the frame one that a payload of n bytes goes into: the one at hand, if it isn't full and both together aren't large. Alone
// is what nothing may be before.
func (s *splitter) begin(n int64, alone bool) error {
	if f := s.frame; f != nil {
		size := int64(len(f.Tar))
		if !alone && f.hasPayload() && size < s.minChunk && size+n <= 2*s.minChunk {
			return nil
		}
		s.flush()
	}
	return s.open(n)
}

// hasPayload reports whether a frame has more than headers.
func (f *Frame) hasPayload() bool {
	return slices.ContainsFunc(f.Records, func(r Record) bool { return r.Size > 0 })
}

// open begins a frame.
func (s *splitter) open(n int64) (err error) {
	n = max(n, 2*min(s.minChunk, usualMinChunk)) + frameSlack
	if s.frame, err = s.pool.frame(s.ctx, int(n), int(max(n, 2*s.minChunk+frameSlack))); err != nil {
		return err
	}
	s.frame.Untold = s.untold != ""
	return nil
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

// timeOf is a time as the TOC has it, in UTC: none for the beginning of 1970, nor for what RFC 3339 can't say.
func timeOf(t time.Time) string {
	t = t.UTC()
	if t.IsZero() || t.UnixNano() == 0 || !sayable(t) {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}

// sayable reports whether RFC 3339 has a time.
func sayable(t time.Time) bool { return t.UTC().Year() >= 0 && t.UTC().Year() <= 9999 }

// A recorder remembers what is read through it, when it is told to.
type recorder struct {
	r     io.Reader
	spill func([]byte) error // takes what is too much to be remembered
	on    bool
	kept  []byte
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if !r.on {
		return n, err
	}
	if r.kept = append(r.kept, p[:n]...); len(r.kept) > maxKept {
		if serr := r.spill(r.kept); serr != nil {
			return n, serr
		}
		r.kept = r.kept[:0]
	}
	return n, err
}

func (r *recorder) record() { r.on, r.kept = true, r.kept[:0] }

// stop returns what was read since record, or else since it was spilled; it is good until the next time.
func (r *recorder) stop() []byte {
	r.on = false
	return r.kept
}
