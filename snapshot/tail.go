package snapshot

import (
	"bytes"
	"context"
	"io"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// tail is the end of a layer's frames, which came with its table of contents: a guess has to be large enough, and
// is often too large. A small layer is all in it. The zero value is none.
type tail struct {
	off int64
	p   []byte
}

// until returns what there is of the tail in front of end.
func (t tail) until(end int64) tail {
	if n := end - t.off; n > 0 {
		// Without the table, which is kept elsewhere.
		return tail{t.off, bytes.Clone(t.p[:min(n, int64(len(t.p)))])}
	}
	return tail{}
}

// before returns a Fetcher that takes from the tail what is there.
func (t tail) before(next fill.Fetcher) fill.Fetcher {
	if len(t.p) == 0 {
		return next
	}
	return tailFirst{t, next}
}

type tailFirst struct {
	tail
	next fill.Fetcher
}

// Fetch implements fill.Fetcher.
func (t tailFirst) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	end := off + n
	if end > t.off+int64(len(t.p)) || end <= t.off {
		return t.next.Fetch(ctx, off, n)
	}
	if off >= t.off {
		return localBody{bytes.NewReader(t.p[off-t.off : end-t.off]), io.NopCloser(nil)}, nil
	}
	head, err := t.next.Fetch(ctx, off, t.off-off)
	if err != nil {
		return nil, err
	}
	return headed{head, io.MultiReader(head, bytes.NewReader(t.p[:end-t.off]))}, nil
}

// headed is a body that ends with what the tail has.
type headed struct {
	io.ReadCloser // in front of the tail
	all           io.Reader
}

// Read implements io.Reader.
func (h headed) Read(p []byte) (int, error) { return h.all.Read(p) }

// Source tells package fill.
func (h headed) Source() string { return fill.SourceOf(h.ReadCloser) }

// Whole tells package fill.
func (h headed) Whole() bool { return fill.IsWhole(h.ReadCloser) }
