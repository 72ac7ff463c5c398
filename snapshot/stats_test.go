package snapshot

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// counting serves blobs and counts their bytes; while it is broken it answers 503.
type counting struct {
	blobs  map[string][]byte
	sent   atomic.Int64
	broken atomic.Bool
}

func (c *counting) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if c.broken.Load() {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	http.ServeContent(&countingWriter{w, &c.sent}, req, "", time.Time{}, bytes.NewReader(c.blobs[filepath.Base(req.URL.Path)]))
}

type countingWriter struct {
	http.ResponseWriter
	sent *atomic.Int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.sent.Add(int64(len(p))) // who has received them may be done before Write returns
	return w.ResponseWriter.Write(p)
}

// TestStatsAgreeWithTheRegistry has a read wait for a registry that is broken for a while, and looks at all that is told
// of it.
func TestStatsAgreeWithTheRegistry(t *testing.T) { eachDoor(t, testStatsAgreeWithTheRegistry) }

func testStatsAgreeWithTheRegistry(t *testing.T, door string) {
	data := random(1 << 20)
	l := layerOf(t, map[string][]byte{"file": data})
	c := &counting{blobs: map[string][]byte{l.digest.String(): l.blob}}
	reg := newRegistry(t, c.ServeHTTP, l)
	opt := reg.options(door)
	opt.Fill.SlowAfter = 50 * time.Millisecond
	var mu sync.Mutex
	var misses []fill.Miss
	slow := slowReads{end: func() { c.broken.Store(false) }}
	opt.Watch = Watch{
		Missed: func(dgst digest.Digest, m fill.Miss) {
			mu.Lock()
			defer mu.Unlock()
			if dgst != l.digest {
				t.Errorf("a miss of %s", dgst)
			}
			misses = append(misses, m)
		},
		Slow: slow.add,
	}
	s, root := newSnapshotter(t, opt)
	if st := s.Stats(); st.Door != door || len(st.Layers) != 0 || st.Totals != (Totals{}) {
		t.Errorf("at first %+v", st)
	}
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	one := func() LayerStats {
		t.Helper()
		st := s.Stats()
		if len(st.Layers) != 1 || st.Totals.Mounted != 1 {
			t.Fatalf("%+v, want one layer", st)
		}
		return st.Layers[0]
	}
	if st := one(); !st.Open || st.Filled != 0 || st.Total < 1<<20 || st.Fetched != c.sent.Load() || st.Fetched == 0 ||
		st.Repository != reg.host()+"/team/image" || st.Source != reg.host() || st.Size != int64(len(l.blob)) || st.Misses != 0 {
		t.Errorf("mounted: %+v, the registry has sent %d", st, c.sent.Load())
	}

	c.broken.Store(true)
	if got, err := os.ReadFile(filepath.Join(mountsBelow(t, root)[0], "file")); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("file: %d bytes, %v", len(got), err)
	}
	st := one()
	if st.Filled != st.Total || st.Fetched != c.sent.Load() || st.Served == 0 || st.Misses == 0 || st.WaitSeconds < 0.05 ||
		st.Errors != 0 || st.Requests == 0 || st.Retries == 0 || st.Corrupt != 0 || !strings.Contains(st.Trouble, "503") {
		t.Errorf("read: %+v, the registry has sent %d", st, c.sent.Load())
	}
	total := s.Stats().Totals
	if total.Fetched != st.Fetched || total.Served != st.Served || total.Misses != st.Misses || total.Retries != st.Retries {
		t.Errorf("totals %+v, layer %+v", total, st)
	}
	if dt, err := json.Marshal(s.Stats()); err != nil || !bytes.Contains(dt, []byte(`"waitSeconds":`)) {
		t.Errorf("%s, %v", dt, err)
	}
	slow.wantBroken(t, reg, l, "file")
	mu.Lock()
	if int64(len(misses)) != st.Misses || misses[0].Waited < opt.Fill.SlowAfter || misses[0].Bytes == 0 {
		t.Errorf("misses %+v", misses)
	}
	mu.Unlock()

	// Where a step has it.
	mounts, err := s.Prepare(t.Context(), "rw", "base")
	if err != nil {
		t.Fatal(err)
	}
	if d, ok := s.LayerAt(lowerOf(t, mounts)); !ok || d != l.digest {
		t.Errorf("layer at %q: %q, %t", lowerOf(t, mounts), d, ok)
	}
	if d, ok := s.LayerAt("1/fs"); !ok || d != l.digest {
		t.Errorf("layer at 1/fs: %q, %t", d, ok)
	}
	if d, ok := s.LayerAt(root); ok {
		t.Errorf("layer at the root: %q", d)
	}

	// Totals outlive layers.
	for _, key := range []string{"rw", "base"} {
		if err := s.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	total.Mounted = 0
	if st := s.Stats(); len(st.Layers) != 0 || st.Totals != total {
		t.Errorf("removed: %+v, want totals %+v", st, total)
	}
}

// TestASlowTableOfContentsIsTold has a registry be broken when a layer is to be mounted.
func TestASlowTableOfContentsIsTold(t *testing.T) { eachDoor(t, testASlowTableOfContentsIsTold) }

func testASlowTableOfContentsIsTold(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": []byte("content")})
	c := &counting{blobs: map[string][]byte{l.digest.String(): l.blob}}
	reg := newRegistry(t, c.ServeHTTP, l)
	opt := reg.options(door)
	opt.Fill.SlowAfter = 50 * time.Millisecond
	slow := slowReads{end: func() { c.broken.Store(false) }}
	opt.Watch = Watch{Slow: slow.add}
	s, _ := newSnapshotter(t, opt)
	c.broken.Store(true)
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	slow.wantBroken(t, reg, l, "")
}

// slowReads are the reads that a snapshotter has told are slow.
type slowReads struct {
	end func() // of what makes them slow

	mu   sync.Mutex
	all  []SlowRead
	why  string
	over int
}

func (r *slowReads) add(read SlowRead) (over func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all, r.why = append(r.all, read), read.Why()
	r.end()
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.over++
	}
}

// wantBroken fails the test unless a read of a file, "" for the table of contents, was slow as the registry was broken, and all are over.
func (r *slowReads) wantBroken(t *testing.T, reg *registry, l testLayer, file string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) == 0 || r.over != len(r.all) || r.all[0].Layer != l.digest || r.all[0].Repository != reg.host()+"/team/image" ||
		r.all[0].File != file || r.why != reg.host()+" answered 503 Service Unavailable, retrying" {
		t.Errorf("slow reads %+v because %q, %d are over", r.all, r.why, r.over)
	}
}

func lowerOf(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	for _, o := range mounts[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return dirs
		}
	}
	t.Fatalf("no lowerdir in %+v", mounts)
	return ""
}

// TestCorruptionIsCounted spoils a chunk for good, and then a table of contents.
func TestCorruptionIsCounted(t *testing.T) { eachDoor(t, testCorruptionIsCounted) }

func testCorruptionIsCounted(t *testing.T, door string) {
	// It has one page, or the kernel would go on to read ahead after it has answered.
	l := layerOf(t, map[string][]byte{"file": random(4096)})
	reg := newRegistry(t, nil, l)
	reg.spoil(l)
	s, root := newSnapshotter(t, reg.options(door))
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	if _, err := os.ReadFile(filepath.Join(mountsBelow(t, root)[0], "file")); err == nil {
		t.Fatal("corrupt bytes reached a reader")
	}
	st := s.Stats()
	if c := st.Layers[0].Corrupt; c < 2 || st.Totals.Corrupt != c || st.Totals.Errors == 0 || st.Totals.Errors != st.Layers[0].Errors ||
		!strings.Contains(st.Layers[0].Trouble, "digest mismatch") {
		t.Errorf("%+v", st)
	}
	other := l
	other.toc = digest.FromString("another")
	if _, err := s.Prepare(t.Context(), "key2", "", snapshots.WithLabels(reg.labels("other", other))); err == nil {
		t.Fatal("a layer with another table of contents was mounted")
	}
	if after := s.Stats().Totals; after.Corrupt != st.Totals.Corrupt+1 || after.Mounted != 1 {
		t.Errorf("%+v after a wrong table of contents, %+v before", after, st.Totals)
	}
}

// TestOpeningIsASpanOfTheBuild opens a layer in a trace, and one in none.
func TestOpeningIsASpanOfTheBuild(t *testing.T) { eachDoor(t, testOpeningIsASpanOfTheBuild) }

func testOpeningIsASpanOfTheBuild(t *testing.T, door string) {
	a, b := layerOf(t, map[string][]byte{"file": []byte("a")}), layerOf(t, map[string][]byte{"file": []byte("b")})
	reg := newRegistry(t, nil, a, b)
	s, _ := newSnapshotter(t, reg.options(door))
	spans := tracetest.NewSpanRecorder()
	ctx, build := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)).Tracer("").Start(t.Context(), "build")
	if _, err := s.Prepare(ctx, "key", "", snapshots.WithLabels(reg.labels("a", a))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("b", b))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	ended := spans.Ended()
	if len(ended) != 1 || ended[0].Name() != "open lazy layer" || ended[0].Parent().SpanID() != build.SpanContext().SpanID() {
		t.Fatalf("spans %v", ended)
	}
	attrs := map[string]string{}
	for _, kv := range ended[0].Attributes() {
		attrs[string(kv.Key)] = kv.Value.String()
	}
	if attrs["lazy.layer"] != a.digest.String() || attrs["lazy.repository"] != reg.host()+"/team/image" || attrs["lazy.bytes"] == "0" {
		t.Errorf("attributes %v", attrs)
	}
}
