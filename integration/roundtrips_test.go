package integration

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// asked is a request, from when it came until it was answered.
type asked struct {
	what       string
	start, end time.Time
	after      int // requests one after the other that came before it
}

// slowRounds delays every request, so that those that wait for an answer are told from those that go out together: what was asked for
// while another request was under way didn't depend on it.
type slowRounds struct {
	delay time.Duration

	mu    sync.Mutex
	asked []asked
}

func (s *slowRounds) front(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		time.Sleep(s.delay)
		next.ServeHTTP(w, r)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked = append(s.asked, asked{strings.Join([]string{r.Method, r.URL.Path, r.Header.Get("Range")}, " "), start, time.Now(), 0})
	})
}

// until returns the requests that came before a moment, with the length of the chains that led to them.
func (s *slowRounds) until(end time.Time) []asked {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []asked
	for _, a := range s.asked {
		if a.start.Before(end) {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, func(a, b asked) int { return a.start.Compare(b.start) })
	for i := range all {
		for _, before := range all[:i] {
			if before.end.Before(all[i].start) {
				all[i].after = max(all[i].after, before.after+1)
			}
		}
	}
	return all
}

// TestFourRoundTripsToTheFirstRUN counts the requests that wait for each other between FROM and the moment when all layers of the
// base image are mounted: those of the manifest, the configuration and, all at once, the layers' tables of contents.
func TestFourRoundTripsToTheFirstRUN(t *testing.T) {
	eachDoor(t, func(t *testing.T) { countRoundTrips(t, registry.Options{}, 4) })
}

// TestRoundTripsWithATokenToTheFirstRUN is the same with a registry that wants a token.
func TestRoundTripsWithATokenToTheFirstRUN(t *testing.T) {
	countRoundTrips(t, registry.Options{Auth: registry.Token, Username: "ada", Password: "lovelace, 1815"}, 6)
}

func countRoundTrips(t *testing.T, opt registry.Options, most int) {
	const layers = 6
	rounds := &slowRounds{delay: time.Second}
	dir := t.TempDir()
	var more []baseimage.Layer
	for i := range layers - 1 {
		entries := []baseimage.Entry{baseimage.Dir(fmt.Sprintf("opt/%d", i))}
		for k := range 500 {
			entries = append(entries, baseimage.File(fmt.Sprintf("opt/%d/%d", i, k), noise(uint64(i*1000+k), 1000)))
		}
		more = append(more, layer(t, fmt.Sprint("layer", i), entries...))
	}
	img, _ := push(t, startRegistry(t, registry.Options{Dir: dir}), "six:estargz", busybox(t, more...), baseimage.EStargz)
	if n := len(layerDigests(t, img)); n != layers {
		t.Fatalf("the image has %d layers, want %d", n, layers)
	}
	opt.Dir, opt.Front = dir, rounds.front
	reg := startRegistry(t, opt)
	config := t.TempDir()
	if err := reg.DockerConfig(config); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{Env: []string{"DOCKER_CONFIG=" + config}, Dockerfile: "FROM " + reg.Ref("six:estargz") + "\nRUN cat /opt/3/7 | wc -c\n"})

	from := res.Vertex("[1/2] FROM")
	if from == nil {
		t.Fatal("no FROM step in the progress")
	}
	var mounted time.Time
	n := 0
	for _, s := range from.Statuses {
		if strings.HasPrefix(s.ID, "mounting layer ") && s.Completed != nil {
			n++
			if s.Completed.After(mounted) {
				mounted = *s.Completed
			}
		}
	}
	if n < layers {
		t.Fatalf("the progress of FROM says that %d layers were mounted, want %d: %q", n, layers, from.StatusIDs())
	}
	requests := rounds.until(mounted)
	trips := 0
	for _, a := range requests {
		trips = max(trips, a.after+1)
	}
	if trips < 2 || trips > most {
		t.Errorf("%d round trips until the layers were mounted, want at most %d", trips, most)
	}
	t.Logf("%d round trips", trips)
	for _, a := range requests {
		t.Logf("round trip %d, %v to %v before: %s", a.after+1, mounted.Sub(a.start), mounted.Sub(a.end), a.what)
	}
}
