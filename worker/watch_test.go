package worker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	bkexecutor "github.com/moby/buildkit/executor"
	bksnapshot "github.com/moby/buildkit/snapshot"
	"github.com/moby/buildkit/util/progress"
	"github.com/moby/sys/user"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// mounted is something to mount.
type mounted []mount.Mount

func (m mounted) Mount(context.Context, bool) (bkexecutor.MountableRef, error) {
	return mountedRef(m), nil
}

type mountedRef []mount.Mount

func (m mountedRef) Mount() ([]mount.Mount, func() error, error) { return m, nil, nil }
func (mountedRef) IdentityMapping() *user.IdentityMapping        { return nil }

// A step has the layers that are in its mounts, also below an overlay.
func TestWatchMounts(t *testing.T) {
	layers := map[string]digest.Digest{}
	for _, name := range []string{"1", "2", "3", "4"} {
		layers["/snapshots/"+name+"/fs"] = digest.FromString(name)
	}
	at := func(dir string) (digest.Digest, bool) { d, ok := layers[dir]; return d, ok }
	rec := tracetest.NewSpanRecorder()
	var rep report.Reporter
	ctx, _ := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(rec)).Tracer("").Start(t.Context(), "step")
	step := rep.BeginStep(ctx)
	var first []string // of the root
	root, mounts := watchMounts(step, at, func(dir string) { first = append(first, dir) },
		bkexecutor.Mount{Src: mounted{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=/snapshots/9/fs", "lowerdir=/snapshots/2/fs:/snapshots/1/fs"}}}},
		[]bkexecutor.Mount{{Dest: "/tmp"}, {Dest: "/src", Src: mounted{{Type: "bind", Source: "/snapshots/3/fs", Options: []string{"ro"}}}}})
	if mounts[0].Src != nil || mounts[0].Dest != "/tmp" || mounts[1].Dest != "/src" {
		t.Errorf("mounts %+v", mounts)
	}
	for _, m := range []bkexecutor.Mount{root, mounts[1]} {
		ref, err := m.Src.Mount(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		if got, _, err := ref.Mount(); err != nil || len(got) != 1 {
			t.Errorf("mounts %v, %v", got, err)
		}
	}
	for _, name := range []string{"1", "2", "3", "4"} {
		rep.Missed(digest.FromString(name), 0, 1, time.Now(), time.Second, nil)
	}
	step.End()
	var got []string
	for _, s := range rec.Ended() {
		for _, kv := range s.Attributes() {
			for dir, d := range layers {
				if kv.Value.String() == d.String() {
					got = append(got, dir)
				}
			}
		}
	}
	if len(first) != 1 || layers[first[0]] == "" || first[0] == "/snapshots/3/fs" {
		t.Errorf("layers that the root is known by: %q, want one of its own", first)
	}
	if !slices.Equal(got, []string{"/snapshots/1/fs", "/snapshots/2/fs", "/snapshots/3/fs"}) {
		t.Errorf("layers of the step: %q", got)
	}
}

// views is a snapshotter whose views are overlays of layers.
type views struct {
	bksnapshot.Snapshotter
	released int
}

func (v *views) View(context.Context, string, string, ...snapshots.Opt) (bksnapshot.Mountable, error) {
	return view{mountedRef{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/snapshots/2/fs:/snapshots/1/fs"}}}, v}, nil
}

func (v *views) Mounts(_ context.Context, key string) (bksnapshot.Mountable, error) {
	if key == "none" {
		return nil, errors.New("there is none")
	}
	return view{mountedRef{{Type: "bind", Source: "/snapshots/1/fs"}}, v}, nil
}

type view struct {
	mountedRef
	of *views
}

func (v view) Mount() ([]mount.Mount, func() error, error) {
	return v.mountedRef, func() error { v.of.released++; return nil }, nil
}

type line struct{ shown *int }

func (l line) Set(string) { *l.shown++ }
func (line) Close()       {}

// What BuildKit mounts for itself is known while it's mounted: the builds that are FROM the layer are shown that reads of it wait, also
// if a step of another build has it.
func TestMountsThatAreNoStepsAreKnown(t *testing.T) {
	var rep report.Reporter
	one := digest.FromString("1")
	layers := layerAt(func(dir string) (digest.Digest, bool) { return one, dir == "/snapshots/1/fs" })
	inner := &views{}
	s := &mountingSnapshotter{inner, layers.told(&rep)}
	if _, err := s.Mounts(t.Context(), "none"); err == nil {
		t.Error("no error of what there is none of")
	}

	vertex := progress.WithProgress(t.Context(), progress.NewMultiWriter())
	step := rep.BeginStep(vertex)
	defer step.End()
	build := rep.Begin("s")
	defer rep.End(build)
	shown := 0
	rep.Follow([]string{"s"}, "FROM", report.Base{Layers: []report.Descriptor{{Digest: one}}}, func(time.Time) report.Line { return line{&shown} })
	wait := func() { rep.Waiting(one, time.Now(), func() string { return "waiting" })() }

	src, err := s.View(t.Context(), "view", "parent")
	if err != nil {
		t.Fatal(err)
	}
	root, _ := watchMounts(step, layers, func(string) {}, bkexecutor.Mount{Src: mountable{src}}, nil)
	ref, err := root.Src.Mount(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	_, end, err := ref.Mount()
	if err != nil {
		t.Fatal(err)
	}
	if wait(); shown != 0 {
		t.Error("a step's wait is shown below FROM")
	}
	for _, open := range []func() (bksnapshot.Mountable, error){
		func() (bksnapshot.Mountable, error) { return src, nil },
		func() (bksnapshot.Mountable, error) { return s.Mounts(t.Context(), "layer") },
	} {
		m, err := open()
		if err != nil {
			t.Fatal(err)
		}
		_, release, err := m.Mount()
		if err != nil {
			t.Fatal(err)
		}
		before := shown
		if wait(); shown != before+1 {
			t.Errorf("shown %d times, want once more than %d", shown, before)
		}
		if err := release(); err != nil {
			t.Error(err)
		}
		if wait(); shown != before+1 {
			t.Error("what nobody but the step has mounted is shown below FROM")
		}
	}
	if err := end(); err != nil || inner.released != 3 {
		t.Errorf("%d of 3 mounts were released, %v", inner.released, err)
	}
}

// mountable is what a step mounts.
type mountable struct{ bksnapshot.Mountable }

func (m mountable) Mount(context.Context, bool) (bkexecutor.MountableRef, error) {
	return m.Mountable, nil
}

// The root of a step is a bind mount of an overlay that BuildKit has mounted.
func TestDirsOfAnOverlayThatIsMounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
	dir := oddDir(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"1", "2", "upper", "work", "root"} {
		if err := os.Mkdir(path(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	overlay := mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
		"upperdir=" + path("upper"), "workdir=" + path("work"), "lowerdir=" + path("2") + ":" + path("1"),
	}}
	if err := overlay.Mount(path("root")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.Unmount(path("root"), 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.Symlink(path("root"), path("link")); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{path("root"), path("link")} {
		got := dirsOf(mount.Mount{Type: "bind", Source: source})
		if want := []string{source, path("2"), path("1")}; !slices.Equal(got, want) {
			t.Errorf("directories %q, want %q", got, want)
		}
	}
}

// Names, units and labels as Prometheus gets them; none of them grows with the layers.
func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	reader, err := otelprometheus.New(otelprometheus.WithRegisterer(reg), otelprometheus.WithoutScopeInfo(), otelprometheus.WithoutTargetInfo())
	if err != nil {
		t.Fatal(err)
	}
	meter := meterOf(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	var sum snapshot.Summary
	unregister, err := registerMetrics(meter, func() snapshot.Summary { return sum })
	if err != nil {
		t.Fatal(err)
	}
	w, err := watch(meter, &report.Reporter{})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := testutil.GatherAndCount(reg); n != 0 || err != nil {
		t.Errorf("%d metrics without a door, %v", n, err)
	}
	for _, name := range []string{"a", "b"} {
		w.Missed(digest.FromString(name), fill.Miss{Waited: 3 * time.Millisecond})
	}
	sum = snapshot.Summary{
		Door:   "erofs",
		Queue:  fill.Queue{Demand: 1, Ahead: 2, Profiled: 3, Background: 4, Unswept: 5},
		Totals: snapshot.Totals{Mounted: 6, Fetched: 7, Copied: 13, Served: 8, Misses: 9, Errors: 10, Retries: 11, Corrupt: 12},
	}
	want := `
# HELP buildkitd_lazy_background_queue_frames Frames of lazy layers that background fetching has not come to yet.
# TYPE buildkitd_lazy_background_queue_frames gauge
buildkitd_lazy_background_queue_frames 5
# HELP buildkitd_lazy_copied_bytes_total Compressed bytes of lazy layers that were not fetched, as chunks with the same digests were there.
# TYPE buildkitd_lazy_copied_bytes_total counter
buildkitd_lazy_copied_bytes_total 13
# HELP buildkitd_lazy_demand_misses_total Reads of lazy layers that waited for bytes to arrive.
# TYPE buildkitd_lazy_demand_misses_total counter
buildkitd_lazy_demand_misses_total 9
# HELP buildkitd_lazy_fetched_bytes_total Bytes received from registries for lazy layers, tables of contents included.
# TYPE buildkitd_lazy_fetched_bytes_total counter
buildkitd_lazy_fetched_bytes_total 7
# HELP buildkitd_lazy_mounted_layers Lazy layers that are mounted.
# TYPE buildkitd_lazy_mounted_layers gauge
buildkitd_lazy_mounted_layers{door="erofs"} 6
# HELP buildkitd_lazy_queue_bytes Compressed bytes of lazy layers that are to be fetched or on their way.
# TYPE buildkitd_lazy_queue_bytes gauge
buildkitd_lazy_queue_bytes{priority="ahead"} 2
buildkitd_lazy_queue_bytes{priority="background"} 4
buildkitd_lazy_queue_bytes{priority="demand"} 1
buildkitd_lazy_queue_bytes{priority="profiled"} 3
# HELP buildkitd_lazy_read_errors_total Reads of lazy layers that failed.
# TYPE buildkitd_lazy_read_errors_total counter
buildkitd_lazy_read_errors_total 10
# HELP buildkitd_lazy_retries_total Requests for bytes of lazy layers that were made again.
# TYPE buildkitd_lazy_retries_total counter
buildkitd_lazy_retries_total 11
# HELP buildkitd_lazy_served_bytes_total Bytes of lazy layers that reads asked the daemon for and got. Reads that the kernel answers are not among them.
# TYPE buildkitd_lazy_served_bytes_total counter
buildkitd_lazy_served_bytes_total 8
# HELP buildkitd_lazy_verification_failures_total Frames and tables of contents that were not what their digest says. None of their bytes reached a reader.
# TYPE buildkitd_lazy_verification_failures_total counter
buildkitd_lazy_verification_failures_total 12
# HELP buildkitd_lazy_wait_seconds Time that reads of lazy layers waited for bytes to arrive.
# TYPE buildkitd_lazy_wait_seconds histogram
buildkitd_lazy_wait_seconds_bucket{le="0.001"} 0
buildkitd_lazy_wait_seconds_bucket{le="0.0025"} 0
`
	for _, le := range []string{"0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "+Inf"} {
		want += "buildkitd_lazy_wait_seconds_bucket{le=\"" + le + "\"} 2\n"
	}
	want += "buildkitd_lazy_wait_seconds_sum 0.006\nbuildkitd_lazy_wait_seconds_count 2\n"
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	if err := unregister(); err != nil {
		t.Error(err)
	}
}
