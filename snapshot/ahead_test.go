package snapshot

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/reference"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// ranged answers range requests, and remembers them.
type ranged struct {
	blob []byte
	hold chan struct{} // if there is one, the first request waits until it's closed

	mu  sync.Mutex
	log []string
}

func (r *ranged) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.log = append(r.log, strings.TrimPrefix(req.Header.Get("Range"), "bytes="))
	first := len(r.log) == 1
	r.mu.Unlock()
	if first && r.hold != nil {
		<-r.hold
	}
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(r.blob))
}

func (r *ranged) asked() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.log)
}

// manyFiles is a layer of a file of 1 MiB and so many small ones.
func manyFiles(t *testing.T, n int) (l testLayer, tocAt int) {
	t.Helper()
	files := map[string][]byte{"big": random(1 << 20)}
	for i := range n {
		files[fmt.Sprint("small", i)] = fmt.Append(nil, "content ", i)
	}
	l = layerOf(t, files)
	if _, err := fmt.Sscanf(string(l.blob[len(l.blob)-51+16:len(l.blob)-51+32]), "%x", &tocAt); err != nil {
		t.Fatal(err)
	}
	return l, tocAt
}

// waitForEnds waits until so many ends are there that nobody has taken, and none is on its way.
func waitForEnds(t *testing.T, s *Snapshotter, want int) {
	t.Helper()
	e := s.door
	count := func() (come, all int) {
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, x := range e.ends.of {
			if len(x.p) > 0 {
				come++
			}
		}
		return come, len(e.ends.of)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		come, all := count()
		if come == want && all == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d ends of %d are there, want %d", come, all, want)
		}
	}
}

// The table of contents is asked for in one request of the right size, less what has come before, and a layer that is known isn't asked for
// again.
func TestLookAhead(t *testing.T) { eachDoor(t, testLookAhead) }

func testLookAhead(t *testing.T, door string) {
	l, toc := manyFiles(t, 3000)
	size := len(l.blob)
	if n := size - toc; n < 2*endSize || n > size/8 {
		t.Fatalf("the table of contents has %d bytes of %d", n, size)
	}
	r := &ranged{blob: l.blob}
	reg := newRegistry(t, r.ServeHTTP, l)
	opt := reg.options(door)
	hosts := opt.Hosts
	var mu sync.Mutex
	var sessions [][]string
	opt.Hosts = func(ref reference.Spec, by []string) ([]docker.RegistryHost, error) {
		mu.Lock()
		defer mu.Unlock()
		sessions = append(sessions, by)
		return hosts(ref, by)
	}
	var told atomic.Int64
	opt.Blob.Fetched = func(_ digest.Digest, n int64, _ time.Duration) { told.Add(n) }
	s, root := newSnapshotter(t, opt)
	labels := reg.labels("base", l)
	s.LookAhead(labels, []string{"session"})
	s.LookAhead(labels, []string{"another"})
	waitForEnds(t, s, 1)
	mu.Lock()
	if len(sessions) != 1 || !slices.Equal(sessions[0], []string{"session"}) {
		t.Errorf("read with the credentials of %q", sessions)
	}
	mu.Unlock()
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(labels)); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	want := []string{fmt.Sprintf("%d-%d", size-endSize, size-1), fmt.Sprintf("%d-%d", toc, size-endSize-1)}
	if got := r.asked(); !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
	if st := s.Stats(); st.Layers[0].Fetched != int64(size-toc) || st.Totals.Fetched != int64(size-toc) || told.Load() != int64(size-toc) {
		t.Errorf("%d bytes fetched of the layer, %d of all, told of %d; want %d", st.Layers[0].Fetched, st.Totals.Fetched, told.Load(), size-toc)
	}
	if got, err := os.ReadFile(filepath.Join(mountsBelow(t, root)[0], "small77")); err != nil || string(got) != "content 77" {
		t.Errorf("small77: %q, %v", got, err)
	}
	before := len(r.asked())
	s.LookAhead(labels, nil)
	waitForEnds(t, s, 0)
	for _, got := range r.asked()[before:] {
		first, last := 0, 0
		if _, err := fmt.Sscanf(got, "%d-%d", &first, &last); err != nil || last >= toc { // before are files beside the one that was read
			t.Errorf("of a layer that is open, asked for %q", got)
		}
	}
}

// What came with the end of a small layer isn't asked for again when it's read.
func TestLookAheadAtAllOfALayer(t *testing.T) {
	l := layerOf(t, map[string][]byte{"a": []byte("content"), "b": random(5000)})
	if len(l.blob) > endSize {
		t.Fatalf("the layer has %d bytes", len(l.blob))
	}
	r := &ranged{blob: l.blob}
	reg := newRegistry(t, r.ServeHTTP, l)
	s, root := newSnapshotter(t, reg.options(DoorFUSE))
	s.LookAhead(reg.labels("base", l), nil)
	waitForEnds(t, s, 1)
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	if got, err := os.ReadFile(filepath.Join(mountsBelow(t, root)[0], "b")); err != nil || !bytes.Equal(got, random(5000)) {
		t.Errorf("b: %d bytes, %v", len(got), err)
	}
	if got, want := r.asked(), []string{fmt.Sprintf("0-%d", len(l.blob)-1)}; !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
	if st := s.Stats().Layers[0]; st.Source != reg.host() || st.Fetched != int64(len(l.blob)) {
		t.Errorf("%d bytes fetched from %q", st.Fetched, st.Source)
	}
}

// Nobody waits for an end that takes long, and what it was is counted all the same.
func TestLookAheadTooLate(t *testing.T) {
	l, _ := manyFiles(t, 10)
	r := &ranged{blob: l.blob, hold: make(chan struct{})}
	reg := newRegistry(t, r.ServeHTTP, l)
	s, _ := newSnapshotter(t, reg.options(DoorFUSE))
	s.LookAhead(reg.labels("base", l), nil)
	for len(r.asked()) == 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	guessed := s.Stats().Layers[0].Fetched
	close(r.hold)
	waitForEnds(t, s, 0)
	if st := s.Stats(); st.Layers[0].Fetched != guessed+endSize || st.Totals.Fetched != guessed+endSize {
		t.Errorf("%d bytes fetched of the layer, %d of all, want %d and %d", st.Layers[0].Fetched, st.Totals.Fetched, guessed, endSize)
	}
}

// An end that can't be had is no more than that, and one that was corrupt isn't kept.
func TestLookAheadInVain(t *testing.T) {
	l, _ := manyFiles(t, 10)
	for name, answer := range map[string]http.HandlerFunc{
		"not found": func(w http.ResponseWriter, req *http.Request) { http.NotFound(w, req) },
		"no ranges": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(l.blob) },
		"corrupt": func(w http.ResponseWriter, req *http.Request) {
			bad := bytes.Clone(l.blob)
			bad[len(bad)-500] ^= 1
			http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(bad))
		},
	} {
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t, nil, l)
			reg.answer = answer
			s, _ := newSnapshotter(t, reg.options(DoorFUSE))
			s.LookAhead(reg.labels("base", l), nil)
			s.LookAhead(map[string]string{LabelDigest: "none"}, nil)
			prepare := func() error {
				_, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l)))
				return err
			}
			if name == "corrupt" {
				waitForEnds(t, s, 1)
				if err := prepare(); cerrdefs.IsAlreadyExists(err) {
					t.Fatal("the layer is mounted")
				}
			} else {
				waitForEnds(t, s, 0)
			}
			if errs := reg.failed(); name != "corrupt" && len(errs) > 0 {
				t.Errorf("reads were given up: %v", errs)
			}
			reg.answer = (&ranged{blob: l.blob}).ServeHTTP
			if err := prepare(); !cerrdefs.IsAlreadyExists(err) {
				t.Errorf("Prepare: %v", err)
			}
		})
	}
}

// Images that nobody mounts don't pile up.
func TestEndsAreBounded(t *testing.T) {
	e := &engine{layers: map[store.Key]*served{}}
	e.ends.of = map[store.Key]*end{}
	for i := range 3 * keepEnds {
		e.keepEnd(store.Key{Blob: digest.FromString(fmt.Sprint(i))}, &end{tail: tail{p: []byte("end")}})
	}
	if len(e.ends.of) != keepEnds || len(e.ends.come) != keepEnds || e.ends.of[store.Key{Blob: digest.FromString(fmt.Sprint(3*keepEnds - 1))}] == nil {
		t.Errorf("%d ends, %d in order", len(e.ends.of), len(e.ends.come))
	}
}
