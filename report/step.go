package report

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// keepSpans bounds the spans of a step's reads: the first ones say where the time goes, and a step may have tens of
// thousands.
const keepSpans = 256

// Step is a build step while it runs. It shows waits in its progress, and gives the spans of reads a place: an event of
// the kernel says nothing about the build that it's for, but a step has the layer mounted.
type Step struct {
	r       *Reporter
	ctx     context.Context //nolint:containedctx // of the step's span, for those of its reads
	watcher *watcher
	misses  atomic.Int64
	waited  atomic.Int64

	mu     sync.Mutex
	denied []denial // the last one of each layer, oldest first
}

// denial is why a read got EIO.
type denial struct {
	at    time.Time
	layer digest.Digest
	err   error
}

// BeginStep says that a step runs, whose progress and span ctx carries. The caller ends it. A frontend's container, or one that
// a client has started, is a step whose progress is that of no vertex: clients aren't shown that.
func (r *Reporter) BeginStep(ctx context.Context) *Step {
	s := &Step{r: r, ctx: ctx, watcher: &watcher{layers: map[digest.Digest]bool{}}}
	if hasVertex(ctx) {
		s.watcher.show = func(since time.Time) Line { return NewLine(ctx, since) }
	}
	r.watchers.add(s.watcher)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.steps = append(r.steps, s)
	return s
}

// Running reports whether a step runs.
func (r *Reporter) Running() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.steps) > 0
}

// Mounts says that the step has layers, which it keeps until it ends, and that one of the mounts of each which [Reporter.Mounts] was told is
// the step's, until over is called.
func (s *Step) Mounts(layers []digest.Digest) (over func()) {
	w := &s.r.watchers
	w.mu.Lock()
	for _, d := range layers {
		s.watcher.layers[d] = true
	}
	w.mu.Unlock()
	if s.watcher.show == nil {
		return func() {}
	}
	w.mounted(layers, func(m *mounts) { m.steps++ })
	return sync.OnceFunc(func() { w.mounted(layers, func(m *mounts) { m.steps-- }) })
}

// End says that the step has ended. Nothing is shown in its progress any more.
func (s *Step) End() {
	s.r.mu.Lock()
	s.r.steps = slices.DeleteFunc(s.r.steps, func(o *Step) bool { return o == s })
	s.r.mu.Unlock()
	s.r.watchers.remove(s.watcher)
	if n := s.misses.Load(); n > 0 {
		trace.SpanFromContext(s.ctx).SetAttributes(
			attribute.Int64("lazy.misses", n),
			attribute.Float64("lazy.wait_seconds", time.Duration(s.waited.Load()).Seconds()),
		)
	}
}

// Denied notes why a read of a layer gets EIO, for the steps that run and have the layer, each of which may be who reads: for all, if the
// layer is empty, as nobody can tell which it is.
func (r *Reporter) Denied(layer digest.Digest, err error) {
	r.mu.Lock()
	steps := slices.Clone(r.steps)
	r.mu.Unlock()
	if layer != "" {
		steps = r.watchers.having(layer, steps)
	}
	for _, s := range steps {
		s.mu.Lock()
		s.denied = slices.DeleteFunc(s.denied, func(d denial) bool { return d.layer == layer })
		s.denied = append(s.denied, denial{time.Now(), layer, err})
		s.mu.Unlock()
	}
}

// Denied returns why reads of the step's layers have got EIO since then, also those that somebody else has made meanwhile: the last one of each layer,
// newest first.
func (s *Step) Denied(since time.Time) (errs []error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range slices.Backward(s.denied) {
		if d.at.Before(since) {
			break
		}
		errs = append(errs, d.err)
	}
	return errs
}

// Missed notes that a read of n bytes at off of a layer's data had to wait, and how that ended. It becomes a span below
// the step that has the layer. If several steps that run do, nobody knows which of them has read: each gets the span,
// with their number as lazy.steps. Where none does, there is no span.
func (r *Reporter) Missed(layer digest.Digest, off, n int64, start time.Time, waited time.Duration, err error) {
	r.mu.Lock()
	steps := slices.Clone(r.steps)
	r.mu.Unlock()
	steps = r.watchers.having(layer, steps)
	for _, s := range steps {
		s.waited.Add(int64(waited))
		parent := trace.SpanFromContext(s.ctx)
		if s.misses.Add(1) > keepSpans || !parent.IsRecording() {
			continue
		}
		_, span := parent.TracerProvider().Tracer("").Start(s.ctx, "fill lazy layer", trace.WithTimestamp(start),
			trace.WithAttributes(
				attribute.String("lazy.layer", layer.String()),
				attribute.String("lazy.cause", "read"),
				attribute.Int64("lazy.offset", off),
				attribute.Int64("lazy.bytes", n),
				attribute.Int("lazy.steps", len(steps)),
			))
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		}
		span.End(trace.WithTimestamp(start.Add(waited)))
	}
}
