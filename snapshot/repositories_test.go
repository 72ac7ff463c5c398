package snapshot

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
)

// build has a snapshot used once by a build whose image has these labels for it, as BuildKit does.
func (r *reopenable) build(target, session string, image map[string]string) {
	r.t.Helper()
	labels := map[string]string{labelSession + "0." + session: session}
	for k, v := range image {
		if k != LabelTarget {
			labels[k+"."+session] = v
		}
	}
	set := func() {
		r.t.Helper()
		var fields []string
		for k := range labels {
			fields = append(fields, "labels."+k)
		}
		if _, err := r.Update(r.t.Context(), snapshots.Info{Name: target, Labels: labels}, fields...); err != nil {
			r.t.Fatal(err)
		}
	}
	set()
	if _, err := r.View(r.t.Context(), "of-"+session, target); err != nil {
		r.t.Fatal(err)
	}
	for k := range labels {
		labels[k] = ""
	}
	set()
}

// Who uses a layer brings his credentials, and those of builds that go on are kept.
func TestSessionsOfSeveralBuilds(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		l := layerOf(t, map[string][]byte{"file": random(1 << 20)})
		reg := newRegistry(t, nil, l)
		opt := reg.options(door)
		hosts := opt.Hosts
		var mu sync.Mutex
		var last []string
		opt.Hosts = func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error) {
			mu.Lock()
			last = sessions
			mu.Unlock()
			return hosts(ref, sessions)
		}
		r := newReopenable(t, opt)
		r.lazily(reg, "base", "", l)
		for _, session := range []string{"a", "b", "c", "a1", "b"} {
			r.build("base", session, reg.labels("base", l))
			if err := r.Remove(t.Context(), "of-"+session); err != nil {
				t.Fatal(err)
			}
		}
		r.in("running", "base", func(dir string) error { wantFile(t, dir, "file", random(1<<20)); return nil })
		mu.Lock()
		defer mu.Unlock()
		if want := []string{"b", "a1", "c", "a"}; !slices.Equal(last, want) {
			t.Errorf("read with the sessions %q, want %q", last, want)
		}
	})
}

// A build goes on reading where it has, when one that came after it has a registry that fails, in whatever way.
func TestAnotherBuildsRegistryFails(t *testing.T) {
	for name, fail := range map[string]func(second *registry, l testLayer){
		"it's gone": func(second *registry, _ testLayer) { second.answer = http.NotFound },
		"it wants credentials": func(second *registry, _ testLayer) {
			second.answer = func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "who are you?", http.StatusUnauthorized) }
		},
		"it's corrupt": func(second *registry, l testLayer) { second.spoil(l) },
		"it goes away": func(second *registry, l testLayer) {
			var once atomic.Bool
			second.answer = func(w http.ResponseWriter, req *http.Request) {
				var first, end int
				if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-%d", &first, &end); err != nil || once.Swap(true) {
					http.NotFound(w, req)
					return
				}
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, end, len(l.blob)))
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(l.blob[first : (first+end)/2])
				panic(http.ErrAbortHandler)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachDoor(t, func(t *testing.T, door string) {
				l := layerOf(t, map[string][]byte{"file": random(1 << 20), "zfile": random(2 << 20)})
				first, second := newRegistry(t, nil, l), newRegistry(t, nil, l)
				asked := countRequests(second)
				opt := first.options(door)
				opt.Blob.RetryFor = time.Second
				r := newReopenable(t, opt)
				r.lazily(first, "base", "", l)
				r.build("base", "other", second.labels("base", l))
				fail(second, l)
				r.in("running", "base", func(dir string) error {
					wantFile(t, dir, "file", random(1<<20))
					wantFile(t, dir, "zfile", random(2<<20))
					return nil
				})
				if asked.n.Load() == 0 {
					t.Error("the newer build's registry wasn't asked")
				}
				if errs := first.failed(); len(errs) > 0 {
					t.Errorf("reads that failed: %v", errs)
				}
				if at := r.Stats().Layers[0].Repository; name != "it's corrupt" && at != first.host()+"/team/image" {
					t.Errorf("the layer is read from %s", at)
				}
				// It's asked again when it is used again.
				r.build("base", "third", second.labels("base", l))
				if at := r.Stats().Layers[0].Repository; at != second.host()+"/team/image" {
					t.Errorf("used again, the layer is read from %s", at)
				}
			})
		})
	}
}

// A read that fails everywhere is told of once, with all that has failed.
func TestAllRepositoriesFail(t *testing.T) {
	reg := newRegistry(t, http.NotFound)
	opt := reg.options(DoorFUSE)
	r := &repositories{hosts: opt.Hosts, opt: opt.Blob}
	for _, image := range []string{"one", "two"} {
		ref, err := reference.Parse(reg.host() + "/" + image + ":v1")
		if err != nil {
			t.Fatal(err)
		}
		r.name(layerSource{ref: ref, digest: digest.FromString("layer")})
	}
	_, err := r.Fetch(t.Context(), 0, 10)
	if err == nil || !strings.Contains(err.Error(), "/one") || !strings.Contains(err.Error(), "/two") {
		t.Errorf("Fetch: %v", err)
	}
	if errs := reg.failed(); len(errs) != 1 || errs[0].Error() != err.Error() {
		t.Errorf("told of %v", errs)
	}
	if at := r.first().src.ref.Locator; at != reg.host()+"/two" {
		t.Errorf("%s is asked first", at)
	}
}

// However many builds use a layer, what is remembered of them is bounded, and the newest are remembered.
func TestRepositoriesAreBounded(t *testing.T) {
	r := &repositories{}
	for i := range 2 * keepRepositories {
		for j := range 2 * keepSessions {
			ref := reference.Spec{Locator: fmt.Sprint("registry.test/", i)}
			r.name(layerSource{ref: ref, digest: digest.FromString("layer"), sessions: []string{fmt.Sprint(j)}})
		}
	}
	if n := len(r.all()); n != keepRepositories {
		t.Errorf("%d repositories are kept", n)
	}
	now := r.first().src
	if now.ref.Locator != fmt.Sprint("registry.test/", 2*keepRepositories-1) || len(now.sessions) != keepSessions || now.sessions[0] != fmt.Sprint(2*keepSessions-1) {
		t.Errorf("%s is asked first, with the sessions %q", now.ref.Locator, now.sessions)
	}
}
