package snapshot

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/klauspost/compress/gzip"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// gzipTar returns the tar of an eStargz layer, and its table of contents.
func (s *served) gzipTar(ctx context.Context) (io.ReadCloser, []byte, error) {
	kept, err := s.held.TOC()
	if err != nil || len(kept) < 8 {
		return nil, nil, errors.Join(err, fs.ErrNotExist)
	}
	end, toc := int64(binary.BigEndian.Uint64(kept)), kept[8:]
	size, err := s.reader().Size(ctx)
	if err != nil {
		return nil, nil, err
	}
	if end+int64(len(toc)) > size {
		return nil, nil, fmt.Errorf("a table of contents in the blob: %w", fs.ErrNotExist)
	}
	t := &gzipTar{ctx: ctx, served: s, pieces: s.pieces(end)}
	if len(t.pieces) < 2 {
		return nil, nil, fmt.Errorf("the inside of a large file: %w", fs.ErrNotExist)
	}
	return t, toc, nil
}

// A piece is a part of a tar: a range of the blob, of whole gzip streams, or one of the data space, which is there.
type piece struct {
	off, end int64
	data     bool
}

// pieces cuts a tar into what is fetched and what is there.
func (s *served) pieces(end int64) (pieces []piece) {
	l := s.held.Model()
	at := int64(0) // what is in front of it is cut already
	for i := 0; i < len(l.Frames); i++ {
		first := i
		for i+1 < len(l.Frames) && s.insideFile(l, i) {
			i++
		}
		from, to := &l.Frames[first], &l.Frames[i]
		if to.Offset-from.Offset < near {
			continue // the one at i isn't inside
		}
		last := l.Frames[i-1]
		pieces = append(pieces, piece{at, from.Offset, false}, piece{l.Chunks[from.FirstChunk].Data, l.Chunks[last.FirstChunk+last.NumChunks-1].End(), true})
		at = to.Offset
	}
	return append(pieces, piece{at, end, false})
}

// insideFile reports whether a frame is chunks of one file that are there, from its beginning to its end, and the file goes on at the beginning of the
// next one. What else may be in it, the DiffID would say.
func (s *served) insideFile(l *layer.Layer, frame int) bool {
	f, next := &l.Frames[frame], &l.Frames[frame+1]
	pos, c := int64(0), int(f.FirstChunk)
	for ; c < int(f.FirstChunk+f.NumChunks); c++ {
		if int64(l.Chunks[c].Inner) != pos || !s.held.Have(c) {
			return false
		}
		pos += l.Chunks[c].Size
	}
	if f.End() != next.Offset || int(next.FirstChunk) != c || l.Chunks[c].Inner != 0 {
		return false
	}
	this, ok := l.FileAt(int(f.FirstChunk))
	that, goesOn := l.FileAt(c)
	return ok && goesOn && this == that
}

// A gzipTar is a tar in pieces.
type gzipTar struct {
	ctx    context.Context //nolint:containedctx // an io.Reader has no other way to be cancelled
	served *served
	pieces []piece

	at   io.Reader // the piece at hand
	body io.Closer // of that, if it is fetched
}

// Read implements io.Reader.
func (t *gzipTar) Read(p []byte) (int, error) {
	for {
		if t.at == nil {
			if len(t.pieces) == 0 {
				return 0, io.EOF
			}
			if err := t.open(t.pieces[0]); err != nil {
				return 0, err
			}
			t.pieces = t.pieces[1:]
		}
		n, err := t.at.Read(p)
		if errors.Is(err, io.EOF) {
			t.at, err = nil, t.Close()
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// open begins a piece.
func (t *gzipTar) open(p piece) error {
	if p.data {
		t.at = io.NewSectionReader(t.served.held, p.off, p.end-p.off)
		return nil
	}
	if p.off == p.end {
		t.at = new(io.LimitedReader)
		return nil
	}
	body, err := t.served.Fetch(t.ctx, p.off, p.end-p.off)
	if err != nil {
		return err
	}
	t.body = body
	if t.at, err = gzip.NewReader(body); err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	return nil
}

// Close implements io.Closer.
func (t *gzipTar) Close() error {
	if t.body == nil {
		return nil
	}
	body := t.body
	t.body = nil
	return body.Close()
}
