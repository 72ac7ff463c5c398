package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
)

// patient goes on for as long as a test may take.
var patient = Options{RetryFor: time.Minute, Stall: 500 * time.Millisecond}

// A read carries on from the byte at which it was interrupted.
func TestCarriesOn(t *testing.T) {
	blob := randomBlob(100_000)
	for name, c := range map[string]struct {
		script func(*registry) []http.HandlerFunc
		ranges string
	}{
		"reset in the body": {
			func(r *registry) []http.HandlerFunc { return []http.HandlerFunc{r.cut(1000)} },
			"100-50099 1100-50099",
		},
		"reset before the body": {
			func(r *registry) []http.HandlerFunc { return []http.HandlerFunc{r.cut(0), r.cut(0)} },
			"100-50099 100-50099 100-50099",
		},
		"silence in the body": {
			func(r *registry) []http.HandlerFunc { return []http.HandlerFunc{r.hang(1), r.hang(999)} },
			"100-50099 101-50099 1100-50099",
		},
		"silence before the header": {
			func(*registry) []http.HandlerFunc { return []http.HandlerFunc{silent} },
			"100-50099 100-50099",
		},
		"unavailable for a while": {
			func(*registry) []http.HandlerFunc {
				return []http.HandlerFunc{status(http.StatusServiceUnavailable), status(http.StatusBadGateway), status(http.StatusRequestTimeout)}
			},
			"100-50099 100-50099 100-50099 100-50099",
		},
		"broken, then unavailable": {
			func(r *registry) []http.HandlerFunc {
				return []http.HandlerFunc{r.cut(1000), status(http.StatusInternalServerError)}
			},
			"100-50099 1100-50099 1100-50099",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t, blob)
			reg.script = c.script(reg)
			want(t, open(t, blob, patient, fixed(reg.host(t))), blob, 100, 50_000)
			if got := reg.ranges(); got != c.ranges {
				t.Errorf("ranges %q, want %q", got, c.ranges)
			}
		})
	}
}

// A host which sends headers and hangs up must not be asked in a tight loop.
func TestPausesWithoutBytes(t *testing.T) {
	t.Parallel()
	blob := randomBlob(1000)
	reg := newRegistry(t, blob)
	reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		reg.mu.Lock()
		reg.seen = append(reg.seen, seen{at: time.Now()})
		reg.mu.Unlock()
		reg.cut(0)(w, req)
	})
	err := fails(t, open(t, blob, Options{RetryFor: 2 * time.Second}, fixed(reg.host(t))), 0, 10)
	contains(t, err, reg.host(t).Host)
	if errors.Is(err, io.EOF) {
		t.Errorf("%q looks like the end of the blob", err)
	}
	// At least 100, 200, 400 ms in between, or a hundred times that often.
	if n := len(reg.requests()); n < 3 || n > 6 {
		t.Errorf("%d requests in 2 s", n)
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	blob := randomBlob(1000)
	reg := newRegistry(t, blob, status(http.StatusTooManyRequests, "Retry-After", "1"))
	want(t, open(t, blob, patient, fixed(reg.host(t))), blob, 0, 10)
	seen := reg.requests()
	if len(seen) != 2 {
		t.Fatalf("%d requests", len(seen))
	}
	if d := seen[1].at.Sub(seen[0].at); d < time.Second {
		t.Errorf("asked again after %s", d)
	}
}

// Who is told to wait longer than anybody will isn't kept waiting.
func TestRetryAfterBeyondDeadline(t *testing.T) {
	t.Parallel()
	for _, after := range []string{"3600", "99999999999999999", time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)} {
		reg := newRegistry(t, nil, status(http.StatusTooManyRequests, "Retry-After", after))
		start := time.Now()
		contains(t, fails(t, open(t, nil, patient, fixed(reg.host(t))), 0, 10), "429 Too Many Requests")
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("Retry-After %s: gave up after %s", after, d)
		}
	}
}

// What one host asks for holds up no read that another one serves.
func TestRetryAfterOfOneHost(t *testing.T) {
	blob := randomBlob(1000)
	busy := func(seconds string) http.HandlerFunc {
		return status(http.StatusTooManyRequests, "Retry-After", seconds)
	}
	for name, c := range map[string]struct {
		mirror string // what it asks for
		origin func(*registry) []http.HandlerFunc
		least  time.Duration
	}{
		"the other breaks in the body": {"30", func(r *registry) []http.HandlerFunc { return []http.HandlerFunc{r.cut(100), r.cut(100)} }, 0},
		"more than there is time":      {"120", func(r *registry) []http.HandlerFunc { return []http.HandlerFunc{r.cut(100)} }, 0},
		"the other breaks before it":   {"120", func(r *registry) []http.HandlerFunc { return []http.HandlerFunc{r.cut(0)} }, 0},
		"the other asks for less":      {"120", func(*registry) []http.HandlerFunc { return []http.HandlerFunc{busy("1")} }, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mirror, origin := newRegistry(t, blob, busy(c.mirror)), newRegistry(t, blob)
			origin.script = c.origin(origin)
			start := time.Now()
			want(t, open(t, blob, patient, fixed(mirror.host(t), origin.host(t))), blob, 0, 1000)
			if d := time.Since(start); d < c.least || d > 20*time.Second {
				t.Errorf("it took %s", d)
			}
			if n := len(mirror.requests()); n != 1 {
				t.Errorf("the mirror was asked %d times, want once", n)
			}
		})
	}
}

func TestParseRetryAfter(t *testing.T) {
	for h, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, "-7": 0, "soon": 0, "9223372036854775807": maxRetryAfter,
		"Mon, 02 Jan 2006 15:04:05 GMT": 0, "Mon, 02 Jan 2090 15:04:05 GMT": maxRetryAfter,
	} {
		if got := retryAfter(h); got != want {
			t.Errorf("retryAfter(%q) = %s, want %s", h, got, want)
		}
	}
}

// A read is given up when RetryFor has passed without a byte, whatever the host
// does in the meantime.
func TestGivesUp(t *testing.T) {
	blob := randomBlob(1000)
	for name, c := range map[string]struct {
		behaviour func(*registry) http.HandlerFunc
		opt       Options
		says      string
	}{
		"silence":               {func(*registry) http.HandlerFunc { return silent }, Options{RetryFor: time.Second, Stall: 300 * time.Millisecond}, "no byte arrived"},
		"silence, long Stall":   {func(*registry) http.HandlerFunc { return silent }, Options{RetryFor: time.Second, Stall: time.Hour}, "no byte arrived"},
		"silence, no Stall":     {func(*registry) http.HandlerFunc { return silent }, Options{RetryFor: time.Second}, "no byte arrived"},
		"only headers":          {func(r *registry) http.HandlerFunc { return r.hang(0) }, Options{RetryFor: time.Second, Stall: 300 * time.Millisecond}, "no byte arrived"},
		"only headers, patient": {func(r *registry) http.HandlerFunc { return r.hang(0) }, Options{RetryFor: time.Second, Stall: time.Hour}, "no byte arrived"},
		"unavailable":           {func(*registry) http.HandlerFunc { return status(http.StatusServiceUnavailable) }, Options{RetryFor: time.Second}, "503 Service Unavailable"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t, blob)
			reg.Config.Handler = c.behaviour(reg)
			start := time.Now()
			err := fails(t, open(t, blob, c.opt, fixed(reg.host(t))), 0, 10)
			contains(t, err, reg.host(t).Host, c.says)
			if errors.Is(err, context.Canceled) {
				t.Errorf("%q: nobody cancelled it", err)
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("gave up after %s", d)
			}
		})
	}
}

// What is counted as made again has been: the failure that a read is given up for leads to no other request.
func TestRetriesAreRequests(t *testing.T) {
	blob := randomBlob(1000)
	for name, c := range map[string]struct {
		code      int
		hosts     int
		retryFor  time.Duration
		least     int64
		recovered bool
	}{
		"given up":       {http.StatusServiceUnavailable, 1, time.Second, 2, false},
		"at two hosts":   {http.StatusServiceUnavailable, 2, time.Second, 4, false},
		"refused":        {http.StatusNotFound, 1, time.Second, 0, false},
		"refused by two": {http.StatusNotFound, 2, time.Second, 1, false},
		"in the end":     {http.StatusServiceUnavailable, 1, 20 * time.Second, 2, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var hosts []docker.RegistryHost
			// Counted where they are made: the last one may be given up before it has arrived.
			var requests atomic.Int64
			for range c.hosts {
				reg := newRegistry(t, blob)
				for range 40 {
					reg.script = append(reg.script, status(c.code))
				}
				if c.recovered {
					reg.script = reg.script[:2]
				}
				host := reg.host(t)
				host.Client = &http.Client{Transport: counting{host.Client.Transport, &requests}}
				hosts = append(hosts, host)
			}
			var retried atomic.Int64
			opt := Options{RetryFor: c.retryFor, Retried: func(d digest.Digest) {
				if d != digest.FromBytes(blob) {
					t.Errorf("retried %s", d)
				}
				retried.Add(1)
			}}
			if _, err := read(t.Context(), open(t, blob, opt, fixed(hosts...)), 0, 1000); (err == nil) != c.recovered {
				t.Errorf("error %v", err)
			}
			if n, made := retried.Load(), requests.Load(); n != made-1 || n < c.least {
				t.Errorf("%d retries, and %d requests", n, made)
			}
		})
	}
}

// counting counts requests.
type counting struct {
	http.RoundTripper
	n *atomic.Int64
}

func (c counting) RoundTrip(req *http.Request) (*http.Response, error) {
	c.n.Add(1)
	return c.RoundTripper.RoundTrip(req)
}

// A host that is silent doesn't take the time of those after it.
func TestSilentHostLeavesTime(t *testing.T) {
	t.Parallel()
	blob := randomBlob(1000)
	mirror, origin := newRegistry(t, blob), newRegistry(t, blob)
	mirror.Config.Handler = http.HandlerFunc(silent)
	r := open(t, blob, Options{RetryFor: 2 * time.Second}, fixed(mirror.host(t), origin.host(t)))
	want(t, r, blob, 0, 1000)
}

// The clock of a silent host stands still while its reader does something else.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	blob := randomBlob(1 << 20)
	reg := newRegistry(t, blob)
	body, err := open(t, blob, quick, fixed(reg.host(t))).Fetch(t.Context(), 0, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	for range 2 {
		time.Sleep(2 * quick.Stall)
		if _, err := io.ReadFull(body, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(reg.requests()); got != 1 {
		t.Errorf("%d requests for a body that only its reader let wait", got)
	}
}

func TestCancel(t *testing.T) {
	blob := randomBlob(1000)
	stop := errors.New("build cancelled")
	for name, behaviour := range map[string]func(*registry) http.HandlerFunc{
		"before the header": func(*registry) http.HandlerFunc { return silent },
		"in the body":       func(r *registry) http.HandlerFunc { return r.hang(10) },
		"between attempts":  func(*registry) http.HandlerFunc { return status(http.StatusTooManyRequests, "Retry-After", "30") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			noBlame := Options{RetryFor: time.Minute, Failed: func(_ digest.Digest, err error) { t.Errorf("blamed on the registry: %v", err) }}
			reg := newRegistry(t, blob)
			reg.Config.Handler = behaviour(reg)
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(100*time.Millisecond, func() { cancel(stop) })
			start := time.Now()
			if _, err := read(ctx, open(t, blob, noBlame, fixed(reg.host(t))), 0, 1000); !errors.Is(err, stop) {
				t.Errorf("error %v", err)
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("returned after %s", d)
			}
		})
	}
}

// New hosts are used from the next attempt on, also by a read under way.
func TestSetHosts(t *testing.T) {
	t.Parallel()
	blob := randomBlob(1000)
	gone, fresh := newRegistry(t, blob), newRegistry(t, blob)
	gone.script = []http.HandlerFunc{gone.cut(300)}
	r := open(t, blob, patient, nil)
	asked := 0
	r.SetHosts(func() ([]docker.RegistryHost, error) {
		if asked++; asked == 1 {
			return []docker.RegistryHost{gone.host(t)}, nil
		}
		return []docker.RegistryHost{fresh.host(t)}, nil
	})
	want(t, r, blob, 0, 1000)
	if g, f := gone.ranges(), fresh.ranges(); g != "0-999" || f != "300-999" {
		t.Errorf("first host was asked for %q, second for %q", g, f)
	}
}

func TestPermanent(t *testing.T) {
	for err, want := range map[error]bool{
		fmt.Errorf("h %w", ErrNoRange):                              true,
		&statusError{code: 404}:                                     true,
		&statusError{code: 416}:                                     true,
		&statusError{code: 429}:                                     false,
		&statusError{code: 408}:                                     false,
		&statusError{code: 500}:                                     false,
		&statusError{status: "malformed"}:                           true,
		fmt.Errorf("authorize: %w", docker.ErrInvalidAuthorization): true,
		io.ErrUnexpectedEOF:                                         false,
	} {
		if got := permanent(err); got != want {
			t.Errorf("permanent(%q) = %t", strings.TrimSpace(err.Error()), got)
		}
	}
}
