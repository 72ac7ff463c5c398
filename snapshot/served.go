package snapshot

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"sort"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs/image"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// served is a layer that is open, or about to be.
type served struct {
	key    store.Key
	engine *engine

	cancel context.CancelCauseFunc
	gone   chan struct{} // closed when it has been closed

	// Written by open, before ready is closed.
	ready   chan struct{}
	err     error
	format  string // FormatEStargz or FormatZstdChunked
	target  string // where the door has it
	implied []string
	tail    tail
	held    *store.Layer
	full    *layer.Layer // while it is opened: what all of the tree is read from
	filler  *fill.Filler
	door    doorMount

	repos  repositories
	counts counts

	// Guarded by engine.mu.
	refs  int         // 0: it is being closed
	above []store.Key // the layers above, in the image that was mounted last
	ahead *time.Timer // ends the reference of openAhead
}

// opened reports whether the layer has been opened, without an error.
func (s *served) opened() bool {
	select {
	case <-s.ready:
		return s.err == nil
	default:
		return false
	}
}

// reader reads from the repository that is asked first.
func (s *served) reader() *blob.Reader { return s.repos.first().blob }

// Fetch implements fill.Fetcher.
func (s *served) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	body, err := s.tail.before(localFirst{&s.repos, s.key.Blob, s.engine.opt.Local}).Fetch(ctx, off, n)
	s.from(body)
	return body, err
}

// Refetch implements fill.Refetcher: what was kept may be what is corrupt.
func (s *served) Refetch(ctx context.Context, off, n int64, from string) (io.ReadCloser, error) {
	body, err := s.repos.Refetch(ctx, off, n, from)
	s.from(body)
	return body, err
}

// Fill implements what doors ask for: the n bytes at off of the data space.
func (s *served) Fill(ctx context.Context, off, n int64) error {
	start := time.Now()
	err := s.filler.Fill(ctx, off, n)
	if told := s.engine.opt.Blob.Fetched; told != nil {
		told(s.key.Blob, 0, time.Since(start))
	}
	if err == nil {
		s.answered(n)
	}
	return err
}

// imageVersion names the maker of metadata images: another one makes them anew.
const imageVersion = "2"

// open takes the layer from the store, or its table of contents from the registry, and mounts it.
func (s *served) open(ctx context.Context) (err error) {
	e := s.engine
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	turn := &turn{of: e.turns}
	defer turn.pass()
	parsed, err := s.contents(ctx, turn)
	if err != nil {
		return err
	}
	model, err := s.held.Bind(parsed.layer)
	if err != nil {
		return err
	}
	s.full, s.format = parsed.layer, parsed.format
	defer func() {
		s.full = nil
		model.Rest()
		e.tidy.parsed(model.NumInodes())
	}()
	s.implied = impliedOf(s.full)
	opt := s.watchFill(model)
	opt.Packed = model
	s.filler = e.sched.Open(s.full, s, s.held, opt)
	if e.opt.Prefetch {
		// All in one call, or the first frame would have a request of its own.
		s.filler.Prefetch(0, upTo(model, parsed.prefetch))
	}
	if s.target, err = os.MkdirTemp(e.root, s.key.Blob.Encoded()[:16]+"-"); err != nil {
		return err
	}
	if s.door, err = e.door.mount(s, s.target); err == nil {
		s.repos.use()
	}
	return err
}

// upTo returns where the data ends that is in a layer's blob before an offset.
func upTo(l *layer.Layer, offset int64) int64 {
	n := sort.Search(len(l.Frames), func(i int) bool { return l.Frames[i].Offset >= offset })
	if n == 0 {
		return 0
	}
	last := l.Frames[n-1]
	return l.Chunks[last.FirstChunk+last.NumChunks-1].End()
}

// contents returns the layer's metadata, and holds the layer in the store.
func (s *served) contents(ctx context.Context, turn *turn) (table, error) {
	e := s.engine
	held, err := e.store.Acquire(s.key)
	if err == nil {
		s.held = held
		kept, err := held.TOC()
		if err == nil && len(kept) > 8 {
			turn.take(ctx)
			t, perr := formatOf(kept[8:]).parse(kept[8:], int64(binary.BigEndian.Uint64(kept)), s.key.TOC)
			if perr == nil {
				return t, nil
			}
			err = perr
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrInvalid) {
			return table{}, err
		}
		held.Release() // its table of contents is fetched again
		s.held = nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return table{}, err
	}
	f, err := parseFormat(s.repos.first().src.formats[s.key.Blob.String()])
	if err != nil {
		return table{}, err
	}
	over := s.asking()
	size, err := s.reader().Size(ctx)
	over()
	if err != nil {
		return table{}, err
	}
	turn.pass()
	end := s.takeEnd()
	from := &readerAt{ctx: ctx, from: end.before(s), turn: turn, asking: s.asking}
	t, err := f.open(from, size, s.key.TOC, end.p, func() ([]byte, error) {
		turn.pass()
		defer turn.take(ctx)
		defer s.asking()()
		return s.externalTOC(ctx)
	})
	if err != nil {
		return table{}, err
	}
	if s.tail = from.first.until(t.end); len(s.tail.p) == 0 {
		s.tail = end.until(t.end)
	}
	keep := append(binary.BigEndian.AppendUint64(nil, uint64(t.end)), t.packed...)
	if s.held, err = e.store.Create(s.key, bytes.NewReader(keep)); err != nil {
		return table{}, err
	}
	return t, nil
}

// image returns the path of the layer's metadata image.
func (s *served) image(userXattr bool) (string, error) {
	version := imageVersion
	if userXattr {
		version += "-userxattr"
	}
	path, err := s.held.Image(version)
	if !errors.Is(err, fs.ErrNotExist) {
		return path, err
	}
	opt := image.Options{UserXattr: userXattr}
	if id, err := hex.DecodeString(s.key.TOC.Encoded()); err == nil {
		copy(opt.UUID[:], id)
	}
	return s.held.WriteImage(version, func(f *os.File) error {
		w := bufio.NewWriterSize(f, 1<<20)
		if err := image.Write(w, s.full, opt); err != nil {
			return err
		}
		return w.Flush()
	})
}

// close undoes open, as far as it came.
func (s *served) close() error {
	var errs []error
	if s.door != nil {
		errs = append(errs, s.door.Unmount())
	}
	if s.filler != nil {
		errs = append(errs, s.filler.Close())
	}
	if s.target != "" {
		errs = append(errs, os.Remove(s.target))
	}
	if s.held != nil {
		s.held.Release()
	}
	return errors.Join(errs...)
}

// readerAt reads a blob as the format packages do.
type readerAt struct {
	ctx    context.Context //nolint:containedctx // an io.ReaderAt has no other way to get one
	from   fill.Fetcher
	turn   *turn
	asking func() (over func()) // called around each request
	first  tail                 // what the first read has got
}

// ReadAt implements io.ReaderAt.
func (r *readerAt) ReadAt(p []byte, off int64) (int, error) {
	if at := off - r.first.off; at >= 0 && at+int64(len(p)) <= int64(len(r.first.p)) {
		return copy(p, r.first.p[at:]), nil // the footer, once more
	}
	r.turn.pass()
	defer r.turn.take(r.ctx) // what has been read is parsed next
	defer r.asking()()
	body, err := r.from.Fetch(r.ctx, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer body.Close()
	n, err := io.ReadFull(body, p)
	if err == nil && r.first.p == nil {
		r.first = tail{off, p}
	}
	return n, err
}

// impliedOf returns the directories, other than the root, which the layer needs
// and has no entry for.
func impliedOf(l *layer.Layer) (implied []string) {
	// One walk: of a layer that isn't packed, Path is one too, and some tars have no directories at all.
	type dir struct {
		inode uint32
		path  string
	}
	for dirs := []dir{{layer.Root, ""}}; len(dirs) > 0; {
		d := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		for _, e := range l.Inodes[d.inode].Entries {
			in := &l.Inodes[e.Inode]
			if !in.IsDir() {
				continue
			}
			path := d.path + "/" + e.Name
			if in.Implied {
				implied = append(implied, path)
			}
			dirs = append(dirs, dir{e.Inode, path})
		}
	}
	return implied
}

// explainOpening turns the error of an opening into one for users.
func explainOpening(dgst digest.Digest, err error) error {
	if mismatch, ok := errors.AsType[*toc.DigestError](err); ok {
		return &MismatchError{Layer: dgst, Got: mismatch.Got, Want: mismatch.Want}
	}
	return err
}
