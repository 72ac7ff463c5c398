package worker

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/moby/buildkit/cache"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	bkworker "github.com/moby/buildkit/worker"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// fakeRef is a ref with a chain, of which each has a blob or not.
type fakeRef struct {
	cache.ImmutableRef
	blob     digest.Digest
	chain    cache.RefList
	released *int
}

func (r fakeRef) LayerChain() cache.RefList { return slices.Clone(r.chain) }
func (r fakeRef) Release(context.Context) error {
	*r.released++
	return nil
}
func (r fakeRef) GetString(key string) string {
	if key == recordBlob {
		return r.blob.String()
	}
	return ""
}

func TestLayersOfARef(t *testing.T) {
	var released int
	one, two := digest.FromString("1"), digest.FromString("2")
	ref := fakeRef{chain: cache.RefList{fakeRef{blob: one, released: &released}, fakeRef{released: &released}, fakeRef{blob: two, released: &released}}}
	if got := layersOf(ref); !slices.Equal(got, []digest.Digest{one, two}) {
		t.Errorf("layers %q", got)
	}
	if released != 3 {
		t.Errorf("%d of 3 refs were released", released)
	}
	if got := layersOf(nil); got != nil {
		t.Errorf("none has layers: %q", got)
	}
}

// reading is an op that waits for a layer while it makes a digest, and while it runs.
type reading struct {
	solver.Op
	wait func()
}

func (r reading) CacheMap(context.Context, solver.JobContext, int) (*solver.CacheMap, bool, error) {
	m := &solver.CacheMap{}
	m.Deps = slices.Grow(m.Deps, 2)[:2]
	m.Deps[1].ComputeDigestFunc = func(context.Context, solver.Result, session.Group) (digest.Digest, error) {
		r.wait()
		return "a digest", nil
	}
	return m, true, nil
}

func (r reading) Exec(context.Context, solver.JobContext, []solver.Result) ([]solver.Result, error) {
	r.wait()
	return nil, nil
}

type jobOf struct {
	solver.JobContext
	session.Group
}

func (j jobOf) Session() session.Group { return j.Group }

type nowhere struct{}

func (nowhere) Set(string) {}
func (nowhere) Close()     {}

// exportOf is an exporter, and its instance, that waits for a layer.
type exportOf struct {
	bkexporter.ExporterInstance
	wait func()
}

func (e exportOf) Resolve(context.Context, int, map[string]string) (bkexporter.ExporterInstance, error) {
	return e, nil
}

func (e exportOf) Export(context.Context, *bkexporter.Source, bkexporter.ExportBuildInfo) (
	map[string]string, bkexporter.FinalizeFunc, bkexporter.DescriptorReference, error,
) {
	e.wait()
	return nil, nil, nil, nil
}

// The build of a COPY, or of an export of files, is shown what it waits for, also while a step of another build has the layer.
func TestCopyingIsToldOf(t *testing.T) {
	var rep report.Reporter
	layer := digest.FromString("layer")
	step := rep.BeginStep(t.Context()) // of another build
	defer step.End()
	step.Uses(layer)
	build := rep.Begin("s")
	defer rep.End(build)
	shown := 0
	rep.Follow([]string{"s"}, "FROM", report.Base{Layers: []report.Descriptor{{Digest: layer}}}, func(time.Time) report.Line {
		shown++
		return nowhere{}
	})
	wait := func() { rep.Waiting(layer, time.Now(), func() string { return "waiting" })() }
	var released int
	input := bkworker.NewWorkerRefResult(fakeRef{chain: cache.RefList{fakeRef{blob: layer, released: &released}}}, nil)
	op := &copying{reading{wait: wait}, &rep}

	m, done, err := op.CacheMap(t.Context(), nil, 0)
	if err != nil || !done || len(m.Deps) != 2 || m.Deps[0].ComputeDigestFunc != nil {
		t.Fatal(m, done, err)
	}
	if dgst, err := m.Deps[1].ComputeDigestFunc(t.Context(), input, session.NewGroup("s")); dgst != "a digest" || err != nil || shown != 1 {
		t.Errorf("digest %q, %v, shown %d times", dgst, err, shown)
	}
	if _, err := op.Exec(t.Context(), jobOf{Group: session.NewGroup("s")}, []solver.Result{input}); err != nil || shown != 2 {
		t.Errorf("%v, shown %d times", err, shown)
	}
	files := &exporting{exportOf{wait: wait}, &rep}
	inst, err := files.Resolve(t.Context(), 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	ref := fakeRef{chain: cache.RefList{fakeRef{blob: layer, released: &released}}}
	src := &bkexporter.Source{Refs: map[string]cache.ImmutableRef{"linux/amd64": ref}}
	if _, _, _, err := inst.Export(t.Context(), src, bkexporter.ExportBuildInfo{SessionID: "s"}); err != nil || shown != 3 {
		t.Errorf("%v, shown %d times", err, shown)
	}
	if wait(); shown != 3 {
		t.Error("what it doesn't wait for any more is shown")
	}
}
