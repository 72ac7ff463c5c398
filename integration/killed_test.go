package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// thorough returns how often to do what can't be done often enough: full with RELIABILITY=full (make reliability), few without.
func thorough(few, full int) int {
	if os.Getenv("RELIABILITY") == "full" {
		return full
	}
	return few
}

// TestKilledAtAnyMoment kills the daemon at random moments of a cold build. The next one on the same state directory builds,
// and every file is what its digest says.
func TestKilledAtAnyMoment(t *testing.T) {
	const files, size = 48, 192 << 10
	entries := []baseimage.Entry{baseimage.Dir("big")}
	var sums []string
	for i := range files {
		content := noise(uint64(i), size)
		entries = append(entries, baseimage.File(fmt.Sprintf("big/%d", i), content))
		sums = append(sums, fmt.Sprintf("%s  /big/%d\n", digest.FromString(content).Encoded(), i))
	}
	im := busybox(t, layer(t, "killed", entries...))
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := startRegistry(t, registry.Options{})
		push(t, reg, "base:1", im, baseimage.EStargz)
		reg.Faults.Add(registry.Fault{Kind: registry.Slow, Delay: 50 * time.Millisecond})
		s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/* && cp -r /big /copy && sha256sum /copy/*\n"}
		verify := func(t *testing.T, res *client.Result) {
			t.Helper()
			for _, sum := range sums {
				wantContains(t, "output", res.Output(), sum, strings.Replace(sum, "/big/", "/copy/", 1))
			}
		}
		var took time.Duration
		t.Run("never", func(t *testing.T) {
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door})
			res := build(t, d, s)
			verify(t, res)
			took = res.Total
		})
		for i := range thorough(6, 50) {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				opt := daemon.Options{Config: plainHTTP(reg), Env: door, Root: t.TempDir()}
				d := startDaemon(t, opt)
				moment := rand.N(took + took/10)
				t.Logf("killed after %v of a build of %v", moment, took)
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := (client.Buildctl{Addr: d.Addr}).Build(t.Context(), s); err != nil {
						t.Error(err)
					}
				})
				time.Sleep(moment)
				d.Kill()
				wg.Wait()
				next := startDaemon(t, opt)
				s := s
				s.NoCache = true // what was built just before the end may be kept
				verify(t, build(t, next, s))
			})
		}
	})
}

// TestNoZerosWhenKilledInMidRUN kills the daemon while a step waits for a file. The step's processes live on: what waits, and what
// is read later, is an error and never zeros. The next daemon cleans up and goes on.
func TestNoZerosWhenKilledInMidRUN(t *testing.T) {
	m := newMidRUN(t)
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := m.serve(t, registry.Options{})
		opt := daemon.Options{Config: plainHTTP(reg), Env: door, Root: t.TempDir()}
		d := startDaemon(t, opt)
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("a step that outlives its daemon takes a minute"))
		defer cancel()

		var silence func()
		reading := reg.OnSignal("reading", func(*http.Request) string {
			silence = reg.Faults.Add(registry.Fault{Kind: registry.Silence, Match: registry.MatchBlob(m.top)})
			return ""
		})
		type told struct{ what, status, body string }
		said := make(chan told, 3)
		tell := reg.OnSignal("tell", func(r *http.Request) string {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			said <- told{r.URL.Query().Get("what"), r.URL.Query().Get("status"), string(body)}
			return ""
		})
		// The shell itself must not be lazy: its pages would be what it can't read.
		s := client.Solve{Dockerfile: fmt.Sprintf(`FROM %s
RUN mkdir /b && cp /bin/busybox /b && sha256sum /big/0 && exec /b/busybox sh -c 'b=/b/busybox; \
	$b wget -q -O /dev/null %s; \
	$b cat /big/12 > /b/waiting 2> /b/why; waiting=$?; \
	$b cat /big/28 > /b/later 2>> /b/why; later=$?; \
	$b wget -q -O /dev/null --post-file=/b/waiting "%s?what=waiting&status=$waiting"; \
	$b wget -q -O /dev/null --post-file=/b/later "%s?what=later&status=$later"; \
	$b wget -q -O /dev/null --post-file=/b/why "%s?what=why"' 2>/dev/null
`, reg.Ref(midRUNName), reading, tell, tell, tell)}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := (client.Buildctl{Addr: d.Addr}).Build(ctx, s); err != nil {
				t.Error(err)
			}
		})
		for reg.Faults.Hits() == 0 {
			select {
			case <-ctx.Done():
				t.Fatal(context.Cause(ctx), "; nothing was read")
			case <-time.After(20 * time.Millisecond):
			}
		}
		time.Sleep(200 * time.Millisecond) // whatever else it asks for
		d.Kill()
		wg.Wait()
		for _, what := range []string{"waiting", "later", "why"} {
			var got told
			select {
			case got = <-said:
			case <-ctx.Done():
				t.Fatal(context.Cause(ctx), "; it didn't say ", what)
			}
			if got.what != what {
				t.Fatalf("the step said %s, want %s", got.what, what)
			}
			if what == "why" {
				// Of FUSE it is that the connection is gone.
				if eio := strings.Count(got.body, "Input/output error"); door[0] == throughDoor("erofs")[0] && eio != 2 {
					t.Errorf("%d I/O errors, want 2:\n%s", eio, got.body)
				}
				continue
			}
			file := map[string]uint64{"waiting": 12, "later": 28}[what]
			if !strings.HasPrefix(noise(file, 1<<20), got.body) {
				t.Errorf("the read that was %s got %d bytes that are not the file's", what, len(got.body))
			}
			if got.status == "0" {
				t.Errorf("the read that was %s had no error, and %d bytes", what, len(got.body))
			}
		}
		silence()
		next := startDaemon(t, opt)
		res := build(t, next, client.Solve{Dockerfile: "FROM " + reg.Ref(midRUNName) + "\nRUN sha256sum /big/0 /big/12 /big/28 /big/14 /big/20\n"})
		wantBetween(t, res)
		wantContains(t, "output", res.Output(), digest.FromString(noise(12, 1<<20)).Encoded())
	})
}
