package source

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/progress"
	"github.com/moby/buildkit/util/progress/controller"
	"github.com/opencontainers/go-digest"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// A read of COPY that waits is shown below FROM, which goes on for as long.
func TestWaitBelowFROM(t *testing.T) {
	r, ctx, end := progress.NewContext(t.Context())
	defer end(nil)
	p := planOf(lazy("a"), eager("b"))
	var rep report.Reporter
	build := rep.Begin("s")
	defer rep.End(build)
	p.follow(&rep, []string{"s"}) // nobody watches
	p.progress = &controller.Controller{WriterFactory: progress.FromContext(ctx), Digest: digest.FromString("FROM"), Name: "FROM x"}
	p.follow(&rep, []string{"s"})
	read := func() (log []string) {
		t.Helper()
		ps, err := r.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range ps {
			switch v := p.Sys.(type) {
			case client.Vertex:
				log = append(log, v.Name)
				if v.Completed != nil {
					log[len(log)-1] += " done"
				}
			case progress.Status:
				log = append(log, p.ID)
				if v.Completed != nil {
					log[len(log)-1] += " done"
				}
			}
		}
		return log
	}
	over := rep.Waiting(p.layers[0].desc.Digest, time.Now(), func() string { return "waiting" })
	if got := read(); !slices.Equal(got, []string{"FROM x", "waiting"}) {
		t.Errorf("shown %q", got)
	}
	over()
	if got := read(); !slices.Equal(got, []string{"waiting done", "FROM x done"}) {
		t.Errorf("shown %q", got)
	}
}

func TestResolvingIsASpan(t *testing.T) {
	rec := tracetest.NewSpanRecorder()
	ctx, build := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(rec)).Tracer("").Start(t.Context(), "build")
	i := &instance{ref: "registry.test/image:v1"}
	_, finish := i.spanResolve(ctx)
	finish(planOf(lazy("a"), eager("b"), lazy("c")), nil)
	_, finish = i.spanResolve(ctx)
	finish(nil, context.Canceled)
	_, finish = i.spanResolve(t.Context()) // in no trace
	finish(nil, nil)
	ended := rec.Ended()
	if len(ended) != 2 || ended[0].Name() != "resolve lazy image" || ended[0].Parent().SpanID() != build.SpanContext().SpanID() || ended[1].Status().Description != context.Canceled.Error() {
		t.Fatalf("spans %v", ended)
	}
	got := map[string]string{}
	for _, kv := range ended[0].Attributes() {
		got[string(kv.Key)] = kv.Value.String()
	}
	if got["lazy.ref"] != "registry.test/image:v1" || got["lazy.layers"] != "2" || got["layers"] != "3" {
		t.Errorf("attributes %v", got)
	}
}
