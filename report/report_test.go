package report

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
)

var (
	a, b, c  = digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	manifest = digest.FromString("manifest")
	layers   = []Descriptor{{a, 1000}, {b, 200}, {a, 1000}} // the first one twice
	base     = Base{Ref: "image@sha256:1", Digest: manifest, Platform: "linux/amd64", Layers: layers}
)

func TestReport(t *testing.T) {
	var r Reporter
	r.Opened(a, "estargz")
	r.Fetched(a, 100, time.Second) // before the build: not its own

	build := r.Begin("session")
	r.Use([]string{"other", "session"}, Base{Ref: "image:v1", Digest: manifest, Layers: layers})
	r.Fetched(a, 10, 500*time.Millisecond)
	r.Use([]string{"session"}, Base{Ref: "image:v1", Digest: manifest, Layers: layers}) // by another step
	r.Fetched(a, 5, 250*time.Millisecond)
	r.Pulled(b, "no table of contents")
	r.Fetched(b, 200, time.Second)
	r.Fetched(c, 77, time.Second) // another image's

	got, ok := r.End(build)
	want := Report{
		Images: []Image{{
			Ref: "image:v1", Digest: manifest, Lazy: 2, Size: 1200, Fetched: 215,
			Layers: []Layer{
				{Digest: a, Size: 1000, Mode: Lazy, Format: "estargz", Fetched: 15, WaitSeconds: 0.75},
				{Digest: b, Size: 200, Mode: Eager, Reason: "no table of contents", Fetched: 200, WaitSeconds: 1},
				{Digest: a, Size: 1000, Mode: Lazy, Format: "estargz", Fetched: 15, WaitSeconds: 0.75},
			},
		}},
		Size: 1200, Fetched: 215, WaitSeconds: 1.75,
	}
	if !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("report:\n%+v\nwant:\n%+v", got, want)
	}
	if len(r.builds) != 0 {
		t.Errorf("accounts left: %v", r.builds)
	}
	// All that was ever fetched.
	if img := r.Image(Base{Ref: "image:v1", Digest: manifest, Layers: layers}); img.Fetched != 315 {
		t.Errorf("%d bytes in all", img.Fetched)
	}
}

// Bases are the layers of what the builds of a session use, or have asked for and another build resolves, as long as they go on.
func TestBases(t *testing.T) {
	var r Reporter
	build, other := r.Begin("s"), r.Begin("other")
	r.Use([]string{"s"}, Base{Ref: "x", Digest: manifest, Layers: []Descriptor{{a, 1}}})
	r.Expect([]string{"s"}, "y", "")
	r.Use([]string{"other"}, Base{Ref: "y", Digest: manifest, Layers: []Descriptor{{b, 1}}})
	for session, want := range map[string]map[digest.Digest]bool{"s": {a: true, b: true}, "other": {b: true}, "nobody": {}} {
		if got := r.Bases([]string{session}); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", session, got, want)
		}
	}
	r.End(build)
	if got := r.Bases([]string{"s"}); len(got) > 0 {
		t.Errorf("after the build: %v", got)
	}
	r.End(other)
}

// A layer in two images of a build counts once in the sums.
func TestSharedLayer(t *testing.T) {
	var r Reporter
	build := r.Begin("s")
	r.Use([]string{"s"}, Base{Ref: "z:v1", Digest: manifest, Layers: []Descriptor{{a, 1000}, {b, 10}}})
	r.Fetched(a, 7, 0)
	r.Use([]string{"s"}, Base{Ref: "y:v1", Digest: manifest, Layers: []Descriptor{{a, 1000}, {c, 20}}})
	r.Fetched(a, 3, 0)
	got, _ := r.End(build)
	if got.Size != 1030 || got.Fetched != 10 || len(got.Images) != 2 || got.Images[0].Ref != "y:v1" || got.Images[0].Fetched != 10 {
		t.Errorf("report %+v", got)
	}
}

// Builds of one session, as bake makes them, see the same; each has its own end.
func TestSharedSession(t *testing.T) {
	var r Reporter
	one, two, stranger := r.Begin("s"), r.Begin("s"), r.Begin("t")
	r.Use([]string{"s"}, Base{Ref: "i", Digest: manifest, Layers: layers})
	r.Fetched(a, 10, 0)
	if got, ok := r.End(one); !ok || got.Fetched != 10 {
		t.Errorf("first: %+v", got)
	}
	r.Use([]string{"s"}, Base{Ref: "late", Digest: manifest, Layers: layers})
	r.Fetched(a, 5, 0)
	if got, ok := r.End(two); !ok || got.Fetched != 15 || len(got.Images) != 2 {
		t.Errorf("second: %+v", got)
	}
	if got, ok := r.End(stranger); ok {
		t.Errorf("another session's: %+v", got)
	}
}

func TestModes(t *testing.T) {
	var r Reporter
	layer := func() Layer { return r.Image(Base{Ref: "i", Digest: manifest, Layers: layers[:1]}).Layers[0] }
	if l := layer(); l.Mode != Unused {
		t.Errorf("at first %+v", l)
	}
	r.Pulled(a, "why")
	if l := layer(); l.Mode != Eager || l.Reason != "why" || l.Format != "" {
		t.Errorf("pulled: %+v", l)
	}
	r.Opened(a, "estargz")
	r.Fetched(a, 5, 0)
	if l := layer(); l.Mode != Lazy || l.Reason != "" || l.Format != "estargz" {
		t.Errorf("opened: %+v", l)
	}
	r.Forget(a)
	if l := layer(); l.Mode != Unused || l.Reason != "" || l.Format != "" || l.Fetched != 0 {
		t.Errorf("forgotten: %+v", l)
	}
	r.Opened(a, "estargz")
	r.Fetched(a, 3, 0)
	if l := layer(); l.Fetched != 3 {
		t.Errorf("opened anew: %+v", l)
	}
	r.Forget(c) // never met
}

// A step is told of reads of its own layers, and of what nobody knows the layer of.
func TestDenied(t *testing.T) {
	var r Reporter
	step, other := r.BeginStep(t.Context()), r.BeginStep(t.Context())
	defer step.End()
	defer other.End()
	step.Mounts([]digest.Digest{a, b})
	other.Mounts([]digest.Digest{c})
	for _, d := range []struct {
		layer digest.Digest
		why   string
	}{{a, "a1"}, {b, "b1"}, {a, "a2"}, {c, "c1"}} {
		r.Denied(d.layer, errors.New(d.why))
	}
	if errs := step.Denied(time.Time{}); fmt.Sprint(errs) != "[a2 b1]" {
		t.Errorf("denied: %v; want the last one of each of its layers", errs)
	}
	if errs := other.Denied(time.Time{}); fmt.Sprint(errs) != "[c1]" {
		t.Errorf("denied another step: %v", errs)
	}
	time.Sleep(time.Millisecond)
	since := time.Now()
	r.Denied("", errors.New("too many open files"))
	for _, s := range []*Step{step, other} {
		if errs := s.Denied(since); fmt.Sprint(errs) != "[too many open files]" {
			t.Errorf("denied since then: %v", errs)
		}
	}
}

func TestInterceptor(t *testing.T) {
	solve := &grpc.UnaryServerInfo{FullMethod: controlapi.Control_Solve_FullMethodName}
	broken := errors.New("step failed")
	for name, tc := range map[string]struct {
		req    any
		info   *grpc.UnaryServerInfo
		use    bool
		resp   any
		err    error
		report bool
	}{
		"build with image":    {&controlapi.SolveRequest{Session: "s"}, solve, true, &controlapi.SolveResponse{ExporterResponse: map[string]string{"k": "v"}}, nil, true},
		"no other response":   {&controlapi.SolveRequest{Session: "s"}, solve, true, &controlapi.SolveResponse{}, nil, true},
		"build without image": {&controlapi.SolveRequest{Session: "s"}, solve, false, &controlapi.SolveResponse{}, nil, false},
		"build that fails":    {&controlapi.SolveRequest{Session: "s"}, solve, true, nil, broken, false},
		"other method":        {&controlapi.InfoRequest{}, &grpc.UnaryServerInfo{FullMethod: "/moby.buildkit.v1.Control/Info"}, true, &controlapi.InfoResponse{}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			var r Reporter
			resp, err := r.UnaryInterceptor()(t.Context(), tc.req, tc.info, func(_ context.Context, req any) (any, error) {
				if req != tc.req {
					t.Errorf("the handler got %v", req)
				}
				if tc.use {
					r.Use([]string{"s"}, Base{Ref: "image:v1", Digest: manifest, Layers: layers})
					r.Opened(a, "estargz")
					r.Fetched(a, 42, time.Second)
				}
				return tc.resp, tc.err
			})
			if !errors.Is(err, tc.err) || resp != tc.resp {
				t.Fatalf("response %v, %v", resp, err)
			}
			if len(r.builds) != 0 {
				t.Errorf("accounts left: %v", r.builds)
			}
			out, _ := resp.(*controlapi.SolveResponse)
			encoded, ok := out.GetExporterResponse()[ResponseKey]
			if ok != tc.report {
				t.Fatalf("report %q", encoded)
			}
			if !ok {
				return
			}
			dt, err := base64.StdEncoding.DecodeString(encoded)
			if err != nil {
				t.Fatal(err)
			}
			var rep Report
			if err := json.Unmarshal(dt, &rep); err != nil {
				t.Fatal(err)
			}
			if rep.Fetched != 42 || rep.Size != 1200 || len(rep.Images) != 1 || rep.Images[0].Lazy != 2 {
				t.Errorf("report %s", dt)
			}
			var keys map[string]any
			if err := json.Unmarshal(dt, &keys); err != nil {
				t.Fatal(err)
			}
			for _, k := range []string{"images", "size", "fetched", "waitSeconds"} {
				if _, ok := keys[k]; !ok {
					t.Errorf("no key %q in %s", k, dt)
				}
			}
			if tc.resp.(*controlapi.SolveResponse).ExporterResponse["k"] != "v" && name == "build with image" {
				t.Error("the exporter's own response is gone")
			}
		})
	}
}

func TestConcurrentUse(t *testing.T) {
	var r Reporter
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s := fmt.Sprint("session", i%3)
			step := r.BeginStep(t.Context())
			defer step.End()
			for range 50 {
				build := r.Begin(s)
				r.Use([]string{s}, Base{Ref: "i", Digest: manifest, Layers: layers})
				r.Fetched(a, 1, time.Millisecond)
				r.Opened(b, "estargz")
				r.Denied(b, errors.New("x"))
				r.Pulled(b, "y")
				r.Forget(b)
				step.Mounts([]digest.Digest{b})()
				_ = step.Denied(time.Time{})
				if got, ok := r.End(build); !ok || got.Fetched < 1 {
					t.Errorf("report %+v", got)
				}
			}
		})
	}
	wg.Wait()
	if n := r.Image(Base{Ref: "i", Digest: manifest, Layers: layers}).Fetched; n != 400 {
		t.Errorf("%d bytes", n)
	}
}

// Two targets of a bake share their FROM step: the second build only asks what the
// image is, and still finds it in its report.
func TestExpectedImageIsReported(t *testing.T) {
	var r Reporter
	img := Base{Ref: "image@sha256:1", Digest: manifest, Platform: "linux/amd64", Layers: []Descriptor{{digest.FromString("shared"), 100}}}
	first := r.Begin("first")
	r.Use([]string{"first"}, img)
	r.Fetched(img.Layers[0].Digest, 30, 0)
	second := r.Begin("second")
	r.Expect([]string{"second"}, img.Ref, img.Platform)
	r.Expect([]string{"second"}, img.Ref, "linux/arm64") // nobody used it
	r.Fetched(img.Layers[0].Digest, 5, 0)
	for name, c := range map[string]struct {
		a    *Account
		want int64
	}{"first": {first, 35}, "second": {second, 5}} {
		rep, ok := r.End(c.a)
		if !ok || len(rep.Images) != 1 || rep.Images[0].Platform != img.Platform || rep.Fetched != c.want {
			t.Errorf("%s: report %+v, %t; want one image, %d bytes fetched", name, rep, ok, c.want)
		}
	}
}

func TestPlatformsOfAnIndexAreToldApart(t *testing.T) {
	var r Reporter
	a := r.Begin("s")
	for _, p := range []string{"linux/arm64", "linux/amd64"} {
		img := Base{Ref: "image@sha256:1", Digest: manifest, Platform: p, Layers: []Descriptor{{digest.FromString(p), 100}}}
		r.Use([]string{"s"}, img)
		r.Use([]string{"s"}, img)
	}
	rep, _ := r.End(a)
	if len(rep.Images) != 2 || rep.Images[0].Platform != "linux/amd64" || rep.Size != 200 {
		t.Errorf("report %+v, want both platforms", rep)
	}
}
