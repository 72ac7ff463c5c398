package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// debugPage fetches a page of a daemon's debug address.
func debugPage(t *testing.T, addr, page string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+page, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v\n%s", page, resp.Status, err, body)
	}
	return string(body)
}

// metrics returns the samples of a page of Prometheus' by name and, of our own, labels.
func metrics(t *testing.T, page string) map[string]float64 {
	t.Helper()
	scope := regexp.MustCompile(`otel_scope_[a-z_]+="[^"]*",?`)
	out := map[string]float64{}
	for line := range strings.Lines(page) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || !strings.HasPrefix(name, "buildkitd_lazy_") {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Errorf("metric %q: %v", line, err)
		}
		name = strings.ReplaceAll(scope.ReplaceAllString(name, ""), ",}", "}")
		out[strings.TrimSuffix(name, "{}")] = v
	}
	return out
}

// TestFiguresAgreeWithTheRegistry compares what the daemon says of a build's bytes with what the registry has sent.
func TestFiguresAgreeWithTheRegistry(t *testing.T) { eachDoor(t, testFiguresAgreeWithTheRegistry) }

func testFiguresAgreeWithTheRegistry(t *testing.T) {
	door := os.Getenv("BUILDKITD_LAZY_MOUNT")
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	reg.Log.Reset()
	addr := freePort(t)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Args: []string{"--debugaddr", addr}})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/2 /big/9\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(9, 1<<20)).Encoded())

	type layer struct {
		Digest                                 digest.Digest
		Repository, Source                     string
		Open                                   bool
		Filled, Total, Fetched                 int64
		Hits, Misses, Errors, Retries, Corrupt int64
		WaitSeconds                            float64
	}
	var page struct {
		Door   string
		Totals struct{ Mounted, Fetched, Misses int64 }
		Layers []layer
	}
	layers := layerDigests(t, img)
	want := map[digest.Digest]int64{}
	got := map[digest.Digest]int64{}
	// What was read ahead may still be on its way.
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		sent := reg.Log.BlobBytes()
		clear(want)
		clear(got)
		for _, l := range layers {
			want[l] = sent[l]
		}
		if err := json.Unmarshal([]byte(debugPage(t, addr, "/debug/lazy?format=json")), &page); err != nil {
			t.Fatal(err)
		}
		for _, l := range page.Layers {
			got[l.Digest] = l.Fetched
		}
		if maps.Equal(got, want) || time.Now().After(deadline) {
			break
		}
	}
	if !maps.Equal(got, want) || len(got) != 2 {
		t.Errorf("fetched according to the daemon %v, to the registry %v", got, want)
	}
	var sum, misses int64
	for _, l := range page.Layers {
		sum += l.Fetched
		misses += l.Misses
		if !l.Open || l.Repository != reg.Ref("base") || l.Source != reg.Host || l.Errors != 0 || l.Retries != 0 || l.Corrupt != 0 ||
			l.Filled > l.Total || (l.Misses == 0) != (l.WaitSeconds == 0) {
			t.Errorf("layer %+v", l)
		}
		// The other layer's shell may be there before it's read.
		if l.Digest == layers[1] && (l.Filled < 2<<20 || l.Total != 16<<20 || l.Misses == 0) {
			t.Errorf("2 of 16 MiB were read, the layer is %+v", l)
		}
	}
	if page.Door != door || page.Totals.Mounted != 2 || page.Totals.Fetched != sum || page.Totals.Misses != misses {
		t.Errorf("totals %+v by %s, layers %+v", page.Totals, page.Door, page.Layers)
	}
	wantContains(t, "/debug/lazy", debugPage(t, addr, "/debug/lazy"), "door", "2 mounted", layers[0].String(), layers[1].String(), reg.Host)

	m := metrics(t, debugPage(t, addr, "/metrics"))
	for name, want := range map[string]float64{
		"buildkitd_lazy_fetched_bytes_total": float64(sum), "buildkitd_lazy_demand_misses_total": float64(misses),
		"buildkitd_lazy_wait_seconds_count": float64(misses), `buildkitd_lazy_mounted_layers{door="` + door + `"}`: 2,
		"buildkitd_lazy_retries_total": 0, "buildkitd_lazy_verification_failures_total": 0, `buildkitd_lazy_queue_bytes{priority="demand"}`: 0,
	} {
		if got, ok := m[name]; !ok || got != want {
			t.Errorf("metric %s is %v (%t), want %v", name, got, ok, want)
		}
	}
	if m["buildkitd_lazy_served_bytes_total"] <= 0 {
		t.Errorf("metrics %v", m)
	}

	// Of the build's trace, the parts that are ours.
	spans := traceOf(t, d)
	for _, name := range []string{"resolve lazy image", "open lazy layer", "fill lazy layer"} {
		if spans[name] == 0 {
			t.Errorf("no span %q in the trace of the build: %v", name, spans)
		}
	}
	if got := int64(spans["fill lazy layer"]); got == 0 || got > misses {
		t.Errorf("%d spans of %d misses", got, misses)
	}
}

// traceOf returns how many spans of which names the daemon has recorded of its only build, all of one trace.
func traceOf(t *testing.T, d *daemon.Daemon) map[string]int {
	t.Helper()
	buildctl := client.Buildctl{Addr: d.Addr}
	var history struct {
		Record struct {
			Trace struct{ Digest string }
		}
	}
	for deadline := time.Now().Add(30 * time.Second); history.Record.Trace.Digest == ""; time.Sleep(100 * time.Millisecond) {
		out, err := buildctl.Run(t.Context(), "debug", "histories", "--format", "{{json .}}")
		if err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("no trace of the build in %s", out)
		}
		if err := json.Unmarshal(out, &history); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
	}
	out, err := buildctl.Run(t.Context(), "debug", "get", history.Record.Trace.Digest)
	if err != nil {
		t.Fatal(err)
	}
	names, traces := map[string]int{}, map[string]bool{}
	dec := json.NewDecoder(bytes.NewReader(out))
	for dec.More() {
		var span struct {
			Name        string
			SpanContext struct{ TraceID string }
		}
		if err := dec.Decode(&span); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		names[span.Name]++
		traces[span.SpanContext.TraceID] = true
	}
	if len(traces) != 1 {
		t.Errorf("the spans are of %d traces: %s", len(traces), out)
	}
	return names
}

// TestASlowReadIsShown has a registry that stops answering in the middle of a step, and in the middle of a COPY: who looks
// at the build learns what it waits for.
func TestASlowReadIsShown(t *testing.T) { eachDoorAtOnce(t, testASlowReadIsShown) }

func testASlowReadIsShown(t *testing.T, door []string) {
	const trouble = 7 * time.Second
	for name, c := range map[string]struct {
		kind  registry.Kind
		steps string // at and after {fault}
		below string // the name of the vertex that says so
	}{
		"503 in RUN": {
			registry.Status, "RUN sha256sum /big/0; wget -q -O /dev/null {fault}; sha256sum /big/12\n", "RUN sha256sum",
		},
		"silence in RUN": {
			registry.Silence, "RUN sha256sum /big/0; wget -q -O /dev/null {fault}; sha256sum /big/12\n", "RUN sha256sum",
		},
		"503 when it's mounted": {
			registry.Status, "RUN sha256sum /big/12\n", "FROM {ref}",
		},
		"503 in a frontend": {
			registry.Status, "# syntax={ref}\n", "docker-image://{ref}",
		},
		"503 in a container of a client's": {
			registry.Status, "", "docker-image://{ref}",
		},
		"503 in COPY": {
			registry.Status, "RUN sha256sum /big/0; wget -q -O /dev/null {fault}; true\nFROM {ref} AS copy\nCOPY --from=0 /big/12 /copied\nRUN sha256sum /copied\n", "FROM {ref}",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := startRegistry(t, registry.Options{})
			why := "no answer yet"
			if c.kind == registry.Status {
				why = reg.Host + " answered 503 Service Unavailable, retrying"
			}
			reads := "sha256sum /big/0; wget -q -O /dev/null " + reg.URL() + "/lab-fault; sha256sum /big/12"
			im := busybox(t, bigLayer(t, 16<<20))
			im.Config.Entrypoint = []string{"sh", "-c", "sha256sum /big/12 >&2"} // of a frontend
			img, _ := push(t, reg, "base:1", im, baseimage.EStargz)
			top := layerDigests(t, img)[1]
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door})
			fill := func(s string) string {
				return strings.NewReplacer("{fault}", reg.URL()+"/lab-fault", "{ref}", reg.Ref("base:1")).Replace(s)
			}
			var broken atomic.Bool
			broken.Store(!strings.Contains(c.steps, "{fault}") && strings.HasPrefix(c.steps, "RUN"))
			var first sync.Once // of the requests that are in trouble
			var remove func()
			match := registry.MatchBlob(top)
			remove = reg.Faults.Add(registry.Fault{Kind: c.kind, Code: http.StatusServiceUnavailable, Match: func(r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/lab-fault") {
					broken.Store(true)
				}
				if !broken.Load() || !match(r) {
					return false
				}
				first.Do(func() { time.AfterFunc(trouble, func() { remove() }) })
				return true
			}})
			said, plain := "", ""
			switch {
			case c.steps == "":
				plain = throughGateway(t, d, reg.Ref("base:1"), func(ctx context.Context, gw gateway.Client, image gateway.Reference) (err error) {
					said, err = runByGateway(ctx, gw, image, "sh", "-c", reads)
					return err
				})
			case strings.HasPrefix(c.steps, "#"):
				build(t, d, client.Solve{Dockerfile: fill("FROM {ref}\nRUN true\n")})
				broken.Store(true)
				res := tryBuild(t, d, client.Solve{Dockerfile: fill(c.steps), Plain: true})
				wantContains(t, "build", res.Err, "failed to solve") // as it says nothing
				plain = res.Plain
			default:
				plain = build(t, d, client.Solve{Dockerfile: fill("FROM {ref}\n" + c.steps), Plain: true}).Plain
				said = plain
			}
			if !broken.Load() {
				t.Fatal("the step never broke the registry")
			}
			show := shownBelow // of a frontend that says nothing within 10 s, which BuildKit ends
			if !strings.HasPrefix(c.steps, "#") {
				wantContains(t, "output", said, digest.FromString(noise(12, 1<<20)).Encoded())
				show = shown
			}
			if err := show(plain, fill(c.below), fmt.Sprintf("waiting for %s layer %s (%s)", reg.Ref("base"), top, why)); err != nil {
				t.Errorf("%v:\n%s", err, plain)
			}
			wantContains(t, "log", d.Logs(), "a read waits for the registry")
			if strings.Contains(d.Logs(), "without vertex") {
				t.Errorf("progress is written of no vertex:\n%s", d.Logs())
			}
		})
	}
}

// TestASlowReadOfACacheIsShown copies from a step that is cached, whose layer is lazy: who waits for it learns that below the step.
func TestASlowReadOfACacheIsShown(t *testing.T) { eachDoorAtOnce(t, testASlowReadOfACacheIsShown) }

func testASlowReadOfACacheIsShown(t *testing.T, door []string) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t), baseimage.EStargz)
	made := "FROM " + reg.Ref("base:1") + " AS made\nRUN head -c 8000000 /dev/urandom > /large\n"
	build(t, startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door}), client.Solve{
		Dockerfile: made, CacheTo: []string{"type=registry,mode=max,compression=estargz,ref=" + reg.Ref("cache:1")},
	})
	var first sync.Once
	var remove func()
	remove = reg.Faults.Add(registry.Fault{Kind: registry.Status, Code: http.StatusServiceUnavailable, Match: func(r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/cache/blobs/") || r.Header.Get("Range") == "" || r.Method != http.MethodGet {
			return false
		}
		first.Do(func() { time.AfterFunc(7*time.Second, func() { remove() }) })
		return true
	}})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door})
	res := build(t, d, client.Solve{
		Dockerfile: made + "FROM scratch\nCOPY --from=made /large /\n", CacheFrom: []string{"type=registry,ref=" + reg.Ref("cache:1")}, Plain: true,
	})
	line := regexp.MustCompile("waiting for " + reg.Ref("cache") + " layer sha256:[0-9a-f]+ " + regexp.QuoteMeta("("+reg.Host+" answered 503 Service Unavailable, retrying)")).FindString(res.Plain)
	if line == "" {
		t.Fatalf("the wait isn't shown:\n%s", res.Plain)
	}
	if err := shown(res.Plain, "RUN head", line); err != nil {
		t.Errorf("%v:\n%s", err, res.Plain)
	}
}

// TestAWaitOutsideOfStepsIsShown has two builds wait for one file: a step of the one, and of the other what is no step. Both learn it, though the
// kernel tells of one read only.
func TestAWaitOutsideOfStepsIsShown(t *testing.T) { eachDoorAtOnce(t, testAWaitOutsideOfStepsIsShown) }

func testAWaitOutsideOfStepsIsShown(t *testing.T, door []string) {
	dockerfile := func(text string) func(*testing.T, *daemon.Daemon, string) string {
		return func(t *testing.T, d *daemon.Daemon, _ string) string {
			return build(t, d, client.Solve{Dockerfile: text, Plain: true}).Plain
		}
	}
	for name, other := range map[string]func(reg *registry.Registry) func(t *testing.T, d *daemon.Daemon, ref string) (plain string){
		"COPY": func(reg *registry.Registry) func(*testing.T, *daemon.Daemon, string) string {
			return dockerfile("FROM " + reg.Ref("base:1") + " AS base\nFROM scratch\nCOPY --from=base /big/12 /copied\n")
		},
		"digest for RUN": func(reg *registry.Registry) func(*testing.T, *daemon.Daemon, string) string {
			return dockerfile("FROM " + reg.Ref("base:1") + " AS base\nFROM " + reg.Ref("shell:1") + "\nRUN --mount=from=base,source=/big,target=/big true\n")
		},
		"ReadFile": func(*registry.Registry) func(*testing.T, *daemon.Daemon, string) string { return readByGateway },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := startRegistry(t, registry.Options{})
			img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
			push(t, reg, "shell:1", busybox(t), baseimage.Gzip)
			top := layerDigests(t, img)[1]
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door})
			broken, asked := make(chan struct{}), make(chan struct{})
			breaks, asks := sync.OnceFunc(func() { close(broken) }), sync.OnceFunc(func() { close(asked) })
			match := registry.MatchBlob(top)
			remove := reg.Faults.Add(registry.Fault{Kind: registry.Status, Code: http.StatusServiceUnavailable, Match: func(r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/lab-fault") {
					breaks()
				}
				select {
				case <-broken:
				default:
					return false
				}
				if match(r) {
					asks()
				}
				return match(r)
			}})
			line := fmt.Sprintf("waiting for %s layer %s (%s answered 503 Service Unavailable, retrying)", reg.Ref("base"), top, reg.Host)
			var run *client.Result
			var builds errgroup.Group
			builds.Go(func() (err error) {
				run, err = client.Buildctl{Addr: d.Addr}.Build(t.Context(), client.Solve{
					Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/0; wget -q -O /dev/null " + reg.URL() + "/lab-fault; sha256sum /big/12\n", Plain: true,
				})
				return err
			})
			select {
			case <-asked: // so the step waits
			case <-time.After(time.Minute):
				t.Fatal("the step reads nothing of the layer")
			}
			time.AfterFunc(22*time.Second, remove)
			plain := other(reg)(t, d, reg.Ref("base:1"))
			if err := shownBelow(plain, reg.Ref("base:1"), line); err != nil {
				t.Errorf("%s: %v:\n%s", name, err, plain)
			}
			if err := builds.Wait(); err != nil || run.Err != "" {
				t.Fatal(err, run)
			}
			// When, isn't asked: the wait is shown below both builds' FROM too, and plain progress has one vertex at a time.
			if err := shownBelow(run.Plain, "RUN sha256sum", line); err != nil {
				t.Errorf("RUN: %v:\n%s", err, run.Plain)
			}
		})
	}
}

// readByGateway reads a file of an image as frontends do, and returns the build's progress.
func readByGateway(t *testing.T, d *daemon.Daemon, ref string) (plain string) {
	t.Helper()
	return throughGateway(t, d, ref, func(ctx context.Context, _ gateway.Client, image gateway.Reference) error {
		dt, err := image.ReadFile(ctx, gateway.ReadRequest{Filename: "/big/12"})
		if err == nil && string(dt) != noise(12, 1<<20) {
			err = errors.New("the file is another one")
		}
		return err
	})
}

// throughGateway is a client with a frontend of its own, to which an image is there.
func throughGateway(t *testing.T, d *daemon.Daemon, ref string, frontend func(context.Context, gateway.Client, gateway.Reference) error) (plain string) {
	t.Helper()
	c, err := bkclient.New(t.Context(), d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var out bytes.Buffer
	display, err := progressui.NewDisplay(&out, progressui.PlainMode)
	if err != nil {
		t.Fatal(err)
	}
	statuses := make(chan *bkclient.SolveStatus)
	eg, ctx := errgroup.WithContext(t.Context())
	eg.Go(func() error {
		_, err := c.Build(ctx, bkclient.SolveOpt{}, "", func(ctx context.Context, gw gateway.Client) (*gateway.Result, error) {
			def, err := llb.Image(ref).Marshal(ctx)
			if err != nil {
				return nil, err
			}
			res, err := gw.Solve(ctx, gateway.SolveRequest{Definition: def.ToPB(), Evaluate: true})
			if err != nil {
				return nil, err
			}
			image, err := res.SingleRef()
			if err != nil {
				return nil, err
			}
			return res, frontend(ctx, gw, image)
		}, statuses)
		return err
	})
	eg.Go(func() error {
		_, err := display.UpdateFrom(ctx, statuses)
		return err
	})
	if err := eg.Wait(); err != nil {
		t.Fatalf("%v:\n%s", err, out.String())
	}
	return out.String()
}

// runByGateway runs a command in a container of an image, as debuggers do, and returns what it prints.
func runByGateway(ctx context.Context, gw gateway.Client, image gateway.Reference, args ...string) (string, error) {
	ctr, err := gw.NewContainer(ctx, gateway.NewContainerRequest{Mounts: []gateway.Mount{{Dest: "/", MountType: pb.MountType_BIND, Ref: image}}})
	if err != nil {
		return "", err
	}
	defer func() { _ = ctr.Release(ctx) }()
	var out struct {
		bytes.Buffer
		io.Closer
	}
	out.Closer = io.NopCloser(nil)
	proc, err := ctr.Start(ctx, gateway.StartRequest{Args: args, Env: []string{"PATH=/bin"}, Stdout: &out})
	if err != nil {
		return "", err
	}
	err = proc.Wait()
	return out.String(), err
}

// shownBelow reports whether a line is in the plain progress below a vertex.
func shownBelow(plain, vertex, line string) error {
	_, _, err := lineBelow(plain, vertex, line)
	return err
}

// shown reports whether a line is in the plain progress below a vertex: that it went on after 5 s, and its end.
func shown(plain, vertex, line string) error {
	n, rest, err := lineBelow(plain, vertex, line)
	if err != nil {
		return err
	}
	if !regexp.MustCompile(`^ [5-9]\.\ds$`).MatchString(rest) {
		return fmt.Errorf("the wait is shown as %q", rest)
	}
	done := regexp.MustCompile(`^` + regexp.QuoteMeta(n+" "+line) + ` \d+\.\ds done$`)
	if !slices.ContainsFunc(strings.Split(plain, "\n"), done.MatchString) {
		return errors.New("its end isn't shown")
	}
	return nil
}

// lineBelow returns the number of a vertex below which a line is in the plain progress, and what stands behind the line where it is for the first time.
func lineBelow(plain, vertex, line string) (n, rest string, err error) {
	lines := strings.Split(plain, "\n")
	of := map[string]string{} // number -> name
	for _, l := range lines {
		if n, rest, ok := strings.Cut(l, " "); ok && strings.HasPrefix(n, "#") && of[n] == "" {
			of[n] = rest
		}
	}
	at := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, line) })
	if at < 0 {
		return "", "", fmt.Errorf("progress does not show %q", line)
	}
	n, rest, _ = strings.Cut(lines[at], " ")
	if !strings.Contains(of[n], vertex) {
		return "", "", fmt.Errorf("%q is shown below %q, not %q", line, of[n], vertex)
	}
	return n, strings.TrimPrefix(rest, line), nil
}

// TestReportAfterARestart builds on layers that an earlier daemon has mounted and pulled: the report says what they are.
func TestReportAfterARestart(t *testing.T) { eachDoor(t, testReportAfterARestart) }

func testReportAfterARestart(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 2<<20)), baseimage.Gzip, baseimage.EStargz)
	opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
	var reports []lazyReport
	for _, file := range []string{"/big/0", "/big/1"} {
		d := startDaemon(t, opt)
		reports = append(reports, reportOf(t, build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum " + file + "\n"})))
		stopDaemon(t, d)
	}
	for i, rep := range reports {
		layers := rep.Images[0].Layers
		if layers[0].Mode != "eager" || layers[0].Reason != "no table of contents" || layers[1].Mode != "lazy" {
			t.Errorf("build %d: layers %+v", i+1, layers)
		}
	}
	if n := reports[1].Images[0].Layers[0].Fetched; n != 0 {
		t.Errorf("%d bytes were fetched of what is there", n)
	}
}
