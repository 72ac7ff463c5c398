package repository

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
)

// A way is how a registry takes a blob whose digest is known when all of it is there. There are those that don't take all of them, or that have a
// proxy in front of them that doesn't. An upload that is refused for that is to be made again, the next way.
type way int32

const (
	// streaming is a PATCH with all of it, of which nothing is kept. All registries take it that docker pushes to.
	streaming way = iota
	// inChunks are PATCHes of a length that is known, and limited, of which one is in memory.
	inChunks
	// atOnce is a PUT, which has the digest: all of it is on disk before.
	atOnce
)

const (
	// chunkSize is for proxies that don't take large requests; an object store behind a registry wants 5 MiB at least.
	chunkSize = 16 << 20
	// maxChunkSize bounds what a registry has kept in memory.
	maxChunkSize = 128 << 20
)

// after returns the way to try when a registry has refused this one.
func (w way) after(status int) (next way, ok bool) {
	switch status {
	case http.StatusMethodNotAllowed, http.StatusNotImplemented, http.StatusNotFound:
		return atOnce, w < atOnce
	case http.StatusBadRequest, http.StatusLengthRequired, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusRequestedRangeNotSatisfiable:
		return inChunks, w < inChunks
	}
	return w, false
}

// refusedWay is the error of a request with bytes of a blob, and has the next upload go another way if that may help.
func (u *upload) refusedWay(resp *http.Response, w way) error {
	err := &StatusError{Ref: u.of.String(), Doing: doingUpload, Host: resp.Request.URL.Host, Code: resp.StatusCode, Status: resp.Status, Detail: explain(resp)}
	// Who doesn't know the upload says so; who doesn't know PATCH has nothing to say.
	lost := resp.StatusCode == http.StatusNotFound && err.Detail != nil
	if next, ok := w.after(resp.StatusCode); ok && !lost {
		err.otherWay = true
		if now := u.of.way.Load(); now < int32(next) {
			u.of.way.CompareAndSwap(now, int32(next))
		}
	}
	return fmt.Errorf("%w: %w", errUpload, err)
}

// A streamedUpload is a PATCH that is under way.
type streamedUpload struct {
	*upload
	pipe *io.PipeWriter
	stop context.CancelCauseFunc // of the PATCH
	done chan struct{}           // closed when the PATCH has ended, with resp or err
	resp *http.Response
	err  error
}

func (u *upload) streamed() *streamedUpload {
	pr, pw := io.Pipe()
	s := &streamedUpload{upload: u, pipe: pw, done: make(chan struct{})}
	// The request has a little time to come to its end when ctx has: a registry may still write what it got of one that was broken off
	// when it's told to forget it.
	patch, stop := outlive(u.ctx)
	s.stop = stop
	go func() {
		defer close(s.done)
		s.resp, s.err = u.of.sendStream(patch, u.host, http.MethodPatch, u.location, http.Header{"Content-Type": {octets}}, pr, -1)
		switch {
		case s.err != nil:
			s.err = fmt.Errorf("%w: %w", errUpload, s.err)
		case s.resp.StatusCode/100 != 2:
			s.err = u.refusedWay(s.resp, streaming)
		}
		pr.CloseWithError(s.err) // who writes learns why it isn't wanted any more
	}()
	return s
}

// Write implements io.Writer.
func (s *streamedUpload) Write(p []byte) (int, error) {
	if err := context.Cause(s.ctx); err != nil {
		return 0, err
	}
	n, err := s.pipe.Write(p)
	if err != nil && !s.ended {
		// A registry that answers early has closed the pipe before its answer is known.
		<-s.done
		if s.err != nil {
			err = s.err
		}
	}
	return n, err
}

// Commit implements Upload.
func (s *streamedUpload) Commit(ctx context.Context, dgst digest.Digest, size int64) error {
	defer s.Cancel()
	s.pipe.Close()
	<-s.done
	if s.err != nil {
		return s.err
	}
	drain(s.resp)
	if err := s.follow(s.resp); err != nil {
		return err
	}
	return s.complete(ctx, dgst, size, nil)
}

// Cancel implements Upload.
func (s *streamedUpload) Cancel() {
	if s.ended {
		return
	}
	s.pipe.Close()
	hurry := time.AfterFunc(endIn, func() { s.stop(errUpload) })
	<-s.done
	hurry.Stop()
	if s.resp != nil {
		drain(s.resp)
		_ = s.follow(s.resp)
	}
	s.cancel()
}

// A chunkedUpload has the chunk at hand in memory.
type chunkedUpload struct {
	*upload
	chunk []byte
	sent  int64
}

func (u *upload) inChunks() *chunkedUpload {
	return &chunkedUpload{upload: u, chunk: make([]byte, 0, min(max(u.least, chunkSize), maxChunkSize))}
}

// Write implements io.Writer.
func (c *chunkedUpload) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		if len(c.chunk) == cap(c.chunk) {
			if err := c.flush(c.ctx); err != nil {
				return n, err
			}
		}
		m := min(len(p), cap(c.chunk)-len(c.chunk))
		c.chunk, p, n = append(c.chunk, p[:m]...), p[m:], n+m
	}
	return n, nil
}

// flush sends the chunk at hand.
func (c *chunkedUpload) flush(ctx context.Context) error {
	if len(c.chunk) == 0 {
		return nil
	}
	header := http.Header{"Content-Type": {octets}, "Content-Range": {fmt.Sprintf("%d-%d", c.sent, c.sent+int64(len(c.chunk))-1)}}
	resp, err := c.of.authorized(ctx, c.host, http.MethodPatch, c.location, header, bytes.NewReader(c.chunk))
	if err != nil {
		return fmt.Errorf("%w: %w", errUpload, err)
	}
	defer drain(resp)
	if resp.StatusCode/100 != 2 {
		return c.refusedWay(resp, inChunks)
	}
	c.sent += int64(len(c.chunk))
	c.chunk = c.chunk[:0]
	return c.follow(resp)
}

// Commit implements Upload.
func (c *chunkedUpload) Commit(ctx context.Context, dgst digest.Digest, size int64) error {
	defer c.Cancel()
	if err := c.flush(ctx); err != nil {
		return err
	}
	return c.complete(ctx, dgst, size, nil)
}

// Cancel implements Upload.
func (c *chunkedUpload) Cancel() { c.cancel() }

// A wholeUpload is in a file without a name until it's sent.
type wholeUpload struct {
	*upload
	file *os.File // nil once it has ended
}

func (u *upload) atOnce() (*wholeUpload, error) {
	f, err := os.CreateTemp("", "upload-")
	if err == nil {
		if err = os.Remove(f.Name()); err != nil {
			f.Close()
		}
	}
	if err != nil {
		u.cancel()
		return nil, fmt.Errorf("%s takes blobs in one piece only, which are kept in a file until then: %w", u.of, err)
	}
	return &wholeUpload{u, f}, nil
}

// Write implements io.Writer.
func (w *wholeUpload) Write(p []byte) (int, error) {
	if err := context.Cause(w.ctx); err != nil {
		return 0, err
	}
	n, err := w.file.Write(p)
	if err != nil {
		err = fmt.Errorf("%s takes blobs in one piece only, which are kept in a file until then: %w", w.of, err)
	}
	return n, err
}

// Commit implements Upload.
func (w *wholeUpload) Commit(ctx context.Context, dgst digest.Digest, size int64) error {
	defer w.Cancel()
	return w.complete(ctx, dgst, size, io.NewSectionReader(w.file, 0, size))
}

// Cancel implements Upload.
func (w *wholeUpload) Cancel() {
	if w.file != nil {
		w.file.Close()
		w.file = nil
	}
	w.cancel()
}
