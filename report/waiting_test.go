package report

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/util/progress"
	"github.com/opencontainers/go-digest"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// board is a place where lines are shown.
type board struct {
	mu  sync.Mutex
	log []string
}

func (b *board) add(what string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log = append(b.log, what)
}

func (b *board) line(since time.Time) Line {
	b.add("since " + time.Since(since).String())
	return &boardLine{b}
}

type boardLine struct{ *board }

func (l *boardLine) Set(text string) { l.add(text) }
func (l *boardLine) Close()          { l.add("over") }

func (b *board) want(t *testing.T, want ...string) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Equal(b.log, want) {
		t.Errorf("shown %q, want %q", b.log, want)
	}
}

// progressOf returns a context of a step, and what was written to its progress so far.
func progressOf(t *testing.T) (context.Context, func() []string) {
	t.Helper()
	r, ctx, end := progress.NewContext(t.Context())
	t.Cleanup(func() { end(errors.New("over")) })
	build, _, _ := progress.NewFromContext(ctx)
	vertex := progress.NewMultiWriter(progress.WithMetadata("vertex", "a step"))
	vertex.Add(build)
	ctx = progress.WithProgress(ctx, vertex)
	start := time.Now()
	return ctx, func() []string {
		ps, err := r.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, p := range ps {
			st := p.Sys.(progress.Status)
			line := fmt.Sprintf("%s since %s", p.ID, st.Started.Sub(start))
			if st.Completed != nil {
				line += " until " + st.Completed.Sub(start).String()
			}
			lines = append(lines, line)
		}
		slices.Sort(lines) // the reader has them in no order
		return lines
	}
}

// mounted has a layer mounted for a step.
func mounted(r *Reporter, s *Step, layer digest.Digest) {
	r.Mounts([]digest.Digest{layer})
	s.Mounts([]digest.Digest{layer})
}

// A read that waits is shown in the steps that have the layer, again as long as it lasts, and not in others.
func TestWaitIsShownInTheStepThatHasTheLayer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r Reporter
		build := r.Begin("s")
		defer r.End(build)
		var from board
		r.Follow([]string{"s", "other"}, "plan", base, from.line)
		ctx, shown := progressOf(t)
		step := r.BeginStep(ctx)
		mounted(&r, step, a)
		other := r.BeginStep(t.Context())
		mounted(&r, other, b)
		other.watcher.show = func(time.Time) Line { t.Error("a step is shown another's wait"); return nil }

		start := time.Now()
		time.Sleep(5 * time.Second)
		var why atomic.Value
		why.Store("no answer yet")
		over := r.Waiting(a, start, func() string { return why.Load().(string) })
		second := r.Waiting(a, start, func() string { t.Error("one is enough"); return "" })
		if got := shown(); !slices.Equal(got, []string{"no answer yet since 0s"}) {
			t.Errorf("shown %q", got)
		}
		why.Store("503, retrying")
		time.Sleep(11 * time.Second)
		if got := shown(); !slices.Equal(got, []string{"503, retrying since 0s", "no answer yet since 0s until 15s"}) {
			t.Errorf("shown %q", got)
		}
		time.Sleep(10 * time.Second)
		if got := shown(); !slices.Equal(got, []string{"503, retrying since 0s"}) {
			t.Errorf("shown %q", got)
		}
		over()
		over() // is harmless
		time.Sleep(time.Second)
		second()
		if got := shown(); !slices.Equal(got, []string{"503, retrying since 0s until 27s"}) {
			t.Errorf("shown %q", got)
		}
		time.Sleep(time.Minute)
		from.want(t)
		if len(r.watchers.waits) != 0 {
			t.Error("a wait is left")
		}

		// A step that ends takes its lines with it.
		over = r.Waiting(a, time.Now(), func() string { return "again" })
		step.End()
		other.End()
		time.Sleep(time.Minute)
		if got := shown(); len(got) != 1 || got[0] != "again since 1m27s until 1m27s" {
			t.Errorf("shown %q", got)
		}
		over()
	})
}

// A step, or a build, that begins to wait for a layer while another does is shown that as well, without what came before it.
func TestEachStepIsShownItsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r Reporter
		texts := 0
		text := func() string { texts++; return fmt.Sprint("text ", texts) }
		ctx1, shown1 := progressOf(t)
		first := r.BeginStep(ctx1)
		mounted(&r, first, a)
		start := time.Now()
		time.Sleep(5 * time.Second)
		over1 := r.Waiting(a, start, text)
		time.Sleep(time.Second)
		ctx2, shown2 := progressOf(t)
		second := r.BeginStep(ctx2)
		mounted(&r, second, a)
		time.Sleep(7 * time.Second)
		over2 := r.Waiting(a, time.Now().Add(-6*time.Second), text)
		if got := shown1(); !slices.Equal(got, []string{"text 1 since 0s"}) {
			t.Errorf("the first step is shown %q", got)
		}
		if got := shown2(); !slices.Equal(got, []string{"text 2 since 1s"}) {
			t.Errorf("the second step is shown %q", got)
		}
		// More of their reads are no news.
		r.Waiting(a, time.Now(), text)()
		if texts != 2 {
			t.Errorf("%d lines were made, want 2", texts)
		}
		// A third waits for the second's page, of which nobody is told.
		ctx3, shown3 := progressOf(t)
		third := r.BeginStep(ctx3)
		mounted(&r, third, a)
		time.Sleep(3 * time.Second)
		if got := shown3(); !slices.Equal(got, []string{"text 3 since 0s"}) {
			t.Errorf("the third step is shown %q", got)
		}
		over1()
		over2()
		for i, shown := range []func() []string{shown1, shown2, shown3} {
			if got := shown(); !strings.Contains(strings.Join(got, ";"), "text 3 since") || !strings.Contains(strings.Join(got, ";"), " until ") {
				t.Errorf("step %d is shown %q, want that it's over", i+1, got)
			}
		}
		first.End()
		second.End()
		third.End()

		// The same below FROM.
		one := r.Begin("one")
		defer r.End(one)
		var from1, from2 board
		r.Follow([]string{"one"}, "plan", base, from1.line)
		start = time.Now()
		time.Sleep(5 * time.Second)
		defer r.Waiting(b, start, func() string { return "x" })()
		two := r.Begin("two")
		defer r.End(two)
		r.Follow([]string{"two"}, "plan 2", base, from2.line)
		time.Sleep(5 * time.Second)
		defer r.Waiting(b, time.Now().Add(-5*time.Second), func() string { return "y" })()
		from1.want(t, "since 5s", "x")
		from2.want(t, "since 5s", "x")
	})
}

// Where no step has the layer it is COPY that reads, or an export: that's shown below FROM, until the build ends.
func TestWaitIsShownBelowFROMOtherwise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r Reporter
		build := r.Begin("s")
		var from, stranger board
		r.Follow([]string{"t"}, "plan", base, stranger.line)
		for range 2 {
			r.Follow([]string{"s"}, "plan", base, from.line)
		}
		r.Waiting(c, time.Now(), func() string { return "another layer" })()
		over := r.Waiting(b, time.Now(), func() string { return "x" })
		from.want(t, "since 0s", "x")
		over()
		from.want(t, "since 0s", "x", "over")
		defer r.Waiting(b, time.Now(), func() string { return "y" })()
		r.End(build)
		time.Sleep(time.Minute)
		from.want(t, "since 0s", "x", "over", "since 0s", "y", "over")
		stranger.want(t)
		if len(r.watchers.all) != 0 {
			t.Errorf("watchers left: %v", r.watchers.all)
		}
	})
}

// Of builds that share their FROM, a wait is shown there once, and as long as one of them lasts.
func TestSharedFROMIsFollowedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r Reporter
		var from board
		first := r.Begin("1")
		r.Follow([]string{"1"}, "plan", base, from.line)
		second, other := r.Begin("2"), r.Begin("3")
		r.Expect([]string{"2"}, base.Ref, base.Platform)
		r.Expect([]string{"3"}, base.Ref, "another platform")
		r.Waiting(b, time.Now(), func() string { return "x" })()
		from.want(t, "since 0s", "x", "over")
		r.End(first)
		r.Waiting(b, time.Now(), func() string { return "y" })()
		from.want(t, "since 0s", "x", "over", "since 0s", "y", "over")
		r.End(second)
		r.Waiting(b, time.Now(), func() string { return "z" })()
		from.want(t, "since 0s", "x", "over", "since 0s", "y", "over")
		r.End(other)
	})
}

// While somebody who is no step has a layer mounted, as a COPY has, it is shown below FROM that reads of the layer wait, also if it's a step that
// reads: that may be what the copy waits for.
func TestMountsThatAreNoStepsAreShownAStepsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r Reporter
		ctx, shown := progressOf(t)
		step := r.BeginStep(ctx)
		defer step.End()
		mounted(&r, step, a)
		build := r.Begin("build")
		defer r.End(build)
		var from board
		r.Follow([]string{"build"}, "plan", base, from.line)

		over := r.Mounts([]digest.Digest{c, a, b})
		time.Sleep(5 * time.Second)
		read := r.Waiting(a, time.Now().Add(-6*time.Second), func() string { return "x" })
		from.want(t, "since 5s", "x")
		read()
		from.want(t, "since 5s", "x", "over")
		over()
		over() // is harmless

		// One that begins while the step waits is shown what it waits for when that's repeated, and nothing when it's over.
		from.log = nil
		read = r.Waiting(a, time.Now(), func() string { return "y" })
		from.want(t)
		time.Sleep(3 * time.Second)
		over, second := r.Mounts([]digest.Digest{a}), r.Mounts([]digest.Digest{a})
		time.Sleep(10 * time.Second)
		from.want(t, "since 7s", "y")
		over()
		from.want(t, "since 7s", "y")
		second()
		from.want(t, "since 7s", "y", "over")
		time.Sleep(time.Minute)
		from.want(t, "since 7s", "y", "over")

		// Another step's mounts are its own affair, in whichever order they begin and end.
		mount := r.Mounts([]digest.Digest{a})
		ctx2, shown2 := progressOf(t)
		other := r.BeginStep(ctx2)
		over = other.Mounts([]digest.Digest{a})
		time.Sleep(10 * time.Second)
		mount()
		over()
		other.End()
		time.Sleep(time.Minute)
		from.want(t, "since 7s", "y", "over")
		if got := shown2(); len(got) != 1 {
			t.Errorf("the other step is shown %q", got)
		}
		read()
		if got := shown(); len(got) != 2 {
			t.Errorf("the step is shown %q", got)
		}
		for _, v := range r.watchers.all {
			if len(v.lines) > 0 {
				t.Errorf("left: %v", v.lines)
			}
		}
		if m := r.watchers.mounts; len(m) != 1 || m[a].all != 1 || m[a].steps != 1 {
			t.Errorf("mounts left: %v", m)
		}
	})
}

// A step without a place in a build's progress, as a frontend's container is, is shown below FROM.
func TestWaitOfAStepWithoutVertexIsShownBelowFROM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r Reporter
		reader, ctx, end := progress.NewContext(t.Context())
		step := r.BeginStep(ctx)
		mounted(&r, step, a)
		other := r.BeginStep(t.Context()) // without any progress
		mounted(&r, other, b)
		build := r.Begin("s")
		defer r.End(build)
		var from board
		r.Follow([]string{"s"}, "plan", base, from.line)
		r.Waiting(a, time.Now(), func() string { return "x" })()
		r.Waiting(b, time.Now(), func() string { return "y" })()
		from.want(t, "since 0s", "x", "over", "since 0s", "y", "over")
		step.End()
		other.End()
		end(errors.New("over"))
		if ps, err := reader.Read(t.Context()); !errors.Is(err, io.EOF) {
			t.Errorf("written to the progress of no vertex: %v, %v", ps, err)
		}
	})
}

// A build is shown waits for what it uses beside an image's layers, where that is.
func TestFollowWith(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r Reporter
		build, other := r.Begin("s"), r.Begin("other")
		defer r.End(other)
		var from, cache, stranger board
		r.Follow([]string{"s"}, "plan", base, from.line)
		r.Follow([]string{"other"}, "another plan", base, stranger.line)
		for range 2 {
			r.FollowWith("plan", "cache", []Descriptor{{c, 1}}, cache.line)
		}
		r.FollowWith("no plan", "another cache", []Descriptor{{c, 1}}, stranger.line)
		r.Waiting(c, time.Now(), func() string { return "x" })()
		cache.want(t, "since 0s", "x", "over")
		from.want(t)
		r.End(build)
		r.Waiting(c, time.Now(), func() string { return "x" })()
		cache.want(t, "since 0s", "x", "over")
		stranger.want(t)
	})
}

func TestWaitLine(t *testing.T) {
	if got := WaitLine("registry.example/x", "sha256:ab", "connection refused, retrying"); got != "waiting for registry.example/x layer sha256:ab (connection refused, retrying)" {
		t.Error(got)
	}
}

// Reads are spans of the step that has the layer; of several, each has one that says so.
func TestReadsAreSpansOfTheStep(t *testing.T) {
	rec := tracetest.NewSpanRecorder()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(rec)).Tracer("")
	var r Reporter
	r.Missed(a, 0, 1, time.Now(), time.Second, nil) // nobody's
	ctx1, span1 := tracer.Start(t.Context(), "step 1")
	one := r.BeginStep(ctx1)
	mounted(&r, one, a)
	untraced := r.BeginStep(t.Context())
	mounted(&r, untraced, b)
	start := time.Now().Add(-time.Minute)
	r.Missed(a, 4096, 8192, start, 2*time.Second, errors.New("503"))
	r.Missed(b, 0, 1, start, time.Second, nil)
	untraced.End()

	ended := rec.Ended()
	if len(ended) != 1 || ended[0].Parent().SpanID() != span1.SpanContext().SpanID() || ended[0].Name() != "fill lazy layer" ||
		!ended[0].StartTime().Equal(start) || !ended[0].EndTime().Equal(start.Add(2*time.Second)) || ended[0].Status().Description != "503" {
		t.Fatalf("spans %v", ended)
	}
	attrs := func(s sdktrace.ReadOnlySpan) map[string]string {
		m := map[string]string{}
		for _, kv := range s.Attributes() {
			m[string(kv.Key)] = kv.Value.String()
		}
		return m
	}
	want := map[string]string{"lazy.layer": a.String(), "lazy.cause": "read", "lazy.offset": "4096", "lazy.bytes": "8192", "lazy.steps": "1"}
	if got := attrs(ended[0]); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("attributes %v, want %v", got, want)
	}

	ctx2, span2 := tracer.Start(t.Context(), "step 2")
	two := r.BeginStep(ctx2)
	mounted(&r, two, a)
	r.Missed(a, 0, 1, start, time.Second, nil)
	two.End()
	span2.End()
	ended = rec.Ended()
	if len(ended) != 4 || attrs(ended[1])["lazy.steps"] != "2" || ended[2].Parent().SpanID() != span2.SpanContext().SpanID() {
		t.Fatalf("spans %v", ended)
	}
	if got := attrs(ended[3]); got["lazy.misses"] != "1" || got["lazy.wait_seconds"] != "1" {
		t.Errorf("attributes of a step %v", got)
	}

	for range 2 * keepSpans {
		r.Missed(a, 0, 1, start, time.Millisecond, nil)
	}
	one.End()
	if n := len(rec.Ended()) - 4; n != keepSpans-2 {
		t.Errorf("%d spans more, want %d", n, keepSpans-2)
	}
	span1.End()
	last := rec.Ended()[len(rec.Ended())-1]
	if got := attrs(last)["lazy.misses"]; got != fmt.Sprint(2*keepSpans+2) {
		t.Errorf("%s misses of a step", got)
	}
}

func TestRunning(t *testing.T) {
	var r Reporter
	if r.Running() {
		t.Error("a step runs before there is one")
	}
	one, other := r.BeginStep(t.Context()), r.BeginStep(t.Context())
	one.End()
	if !r.Running() {
		t.Error("no step runs, but one of two does")
	}
	other.End()
	if r.Running() {
		t.Error("a step runs after they have ended")
	}
}
