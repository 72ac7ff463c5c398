package snapshot

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

// Watch says who is told of reads. What is nil isn't called; the rest is, concurrently, and must not block.
type Watch struct {
	// Missed is told of a read that had to wait for bytes, when the wait is over.
	Missed func(layer digest.Digest, m fill.Miss)
	// Denied is told why a read gets EIO, before it does. The layer is empty if nobody can tell which it is of.
	Denied func(layer digest.Digest, err error)
	// Slow is told of a read that has waited for fill.SchedulerOptions.SlowAfter and still does, also of one of a table of contents. What it returns, if
	// that isn't nil, is called when the wait is over.
	Slow func(SlowRead) (over func())
	// NoRoom is told why what nobody has asked for isn't fetched: once, and again when there was room in between.
	NoRoom func(why error)
}

// SlowRead is a read that waits.
type SlowRead struct {
	Layer digest.Digest
	// Repository is where the blob is read from, e.g. "registry.example/team/image".
	Repository string
	// File is a path of the file that is waited for, in the layer; empty if it's the table of contents.
	File  string
	Since time.Time
	// Why says why the wait lasts, as far as that is known when it is called.
	Why func() string
}

// LayerAt returns the digest of the lazy layer that is mounted at dir. One that is relative is in the directory of the
// snapshots: so they are called in the options of an overlay of many.
func (s *Snapshotter) LayerAt(dir string) (digest.Digest, bool) {
	if l := s.door.at(dir); l != nil {
		return l.key.Blob, true
	}
	return "", false
}

// Expect fetches files that are about to be run, with what they need, out of the lazy layers of images that have the one that is
// mounted at dir, as LayerAt has it. It doesn't wait.
func (s *Snapshotter) Expect(dir string, files []fill.Expected) {
	if l := s.door.at(dir); l != nil {
		l.filler.Expect(files)
	}
}

// ExpectIn is Expect for images that have a layer which is open.
func (s *Snapshotter) ExpectIn(layer digest.Digest, files []fill.Expected) {
	if l := s.door.opened(layer); l != nil {
		l.filler.Expect(files)
	}
}

// opened returns an open layer by the digest of its blob, or nil.
func (e *engine) opened(blob digest.Digest) *served {
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, s := range e.layers {
		if key.Blob == blob && s.opened() {
			return s
		}
	}
	return nil
}

// at returns the layer that is mounted at dir, or nil.
func (e *engine) at(dir string) *served {
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(filepath.Dir(e.root), "snapshotter", "snapshots", dir)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mounts[dir]
}

// watchBlob returns opt with what the layer has to know of its requests.
func (s *served) watchBlob(opt blob.Options) blob.Options {
	e, fetched, retrying, retried, failed := s.engine, opt.Fetched, opt.Retrying, opt.Retried, opt.Failed
	opt.Fetched = func(dgst digest.Digest, n int64, _ time.Duration) {
		s.counts.fetched.Add(n)
		e.totals.fetched.Add(n)
		if fetched != nil {
			fetched(dgst, n, 0) // who waits for how long isn't the request's to say: see Fill
		}
	}
	opt.Retried = func(dgst digest.Digest) {
		s.counts.retries.Add(1)
		e.totals.retries.Add(1)
		if retried != nil {
			retried(dgst)
		}
	}
	opt.Retrying = func(dgst digest.Digest, why error) {
		s.counts.trouble.Store(&trouble{time.Now(), why})
		if retrying != nil {
			retrying(dgst, why)
		}
	}
	opt.Failed = func(dgst digest.Digest, err error) {
		s.counts.trouble.Store(&trouble{time.Now(), err})
		if failed != nil {
			failed(dgst, err)
		}
	}
	return opt
}

// watchFill returns what the layer's Filler is told.
func (s *served) watchFill(model *layer.Layer) fill.LayerOptions {
	for i := range model.Chunks {
		s.counts.total += model.Chunks[i].Size
	}
	e := s.engine
	return fill.LayerOptions{
		Name: s.key.Blob.String(),
		Slow: func(file string, waited time.Duration) func() { return s.slow(file, time.Now().Add(-waited)) },
		Missed: func(m fill.Miss) {
			e.totals.misses.Add(1)
			if m.Err != nil && !errors.Is(m.Err, errUnmounted) {
				e.totals.errors.Add(1)
				s.counts.trouble.Store(&trouble{time.Now(), m.Err})
			}
			if e.opt.Watch.Missed != nil {
				e.opt.Watch.Missed(s.key.Blob, m)
			}
		},
		Copied:  func(n int64) { e.totals.copied.Add(n) },
		Corrupt: func() { e.totals.corrupt.Add(1) },
	}
}

// slow tells of a read that waits.
func (s *served) slow(file string, since time.Time) (over func()) {
	if s.engine.opt.Watch.Slow == nil {
		return nil
	}
	return s.engine.opt.Watch.Slow(SlowRead{
		Layer: s.key.Blob, Repository: s.reader().Repository(), File: file, Since: since,
		Why: func() string { return s.why(since) },
	})
}

// asking tells of a request for the table of contents that lasts, until over is called.
func (s *served) asking() (over func()) {
	start := time.Now()
	var mu sync.Mutex
	ended, end := false, func() {}
	timer := time.AfterFunc(s.engine.sched.SlowAfter(), func() {
		mu.Lock()
		defer mu.Unlock()
		if ended {
			return
		}
		if over := s.slow("", start); over != nil {
			end = over
		}
	})
	return func() {
		timer.Stop()
		mu.Lock()
		defer mu.Unlock()
		ended = true
		end()
	}
}

// why says why a read waits.
func (s *served) why(since time.Time) string {
	if t := s.counts.trouble.Load(); t != nil && t.at.After(since) {
		return t.err.Error() + ", retrying"
	}
	return "no answer yet"
}

// answered takes note of a read that got its n bytes.
func (s *served) answered(n int64) {
	s.counts.served.Add(n)
	s.engine.totals.served.Add(n)
}

// from takes note of who sends a body, which is nil if nobody does.
func (s *served) from(body io.ReadCloser) {
	if name := fill.SourceOf(body); name != "" {
		s.counts.source.Store(&name)
	}
}

// spanOpen starts the span of an opening, below the one of the mount that asked for it first. Without one there is none.
func (s *served) spanOpen(ctx context.Context) (_ context.Context, end func(error)) {
	parent := trace.SpanFromContext(ctx)
	if !parent.SpanContext().IsValid() {
		return ctx, s.opening
	}
	ctx, span := parent.TracerProvider().Tracer("").Start(ctx, "open lazy layer", trace.WithAttributes(
		attribute.String("lazy.layer", s.key.Blob.String()),
		attribute.String("lazy.repository", s.reader().Repository()),
		attribute.String("lazy.door", s.engine.opt.Door),
	))
	return ctx, func(err error) {
		span.SetAttributes(attribute.Int64("lazy.bytes", s.counts.fetched.Load()))
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
		s.opening(err)
	}
}

// opening takes note of how an opening ended.
func (s *served) opening(err error) {
	if _, ok := errors.AsType[*toc.DigestError](err); ok {
		s.engine.totals.corrupt.Add(1)
	}
}
