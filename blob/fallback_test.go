package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
)

// answers has a registry answer so, and take note that it was asked.
func (r *registry) answers(h http.HandlerFunc) {
	r.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.seen = append(r.seen, seen{at: time.Now()})
		r.mu.Unlock()
		h(w, req)
	})
}

// Of several reads one waits for a host that hangs.
func TestSilentHostIsAskedLast(t *testing.T) {
	t.Parallel()
	blob := randomBlob(1000)
	dead, alive := newRegistry(t, blob), newRegistry(t, blob)
	dead.answers(silent)
	r := open(t, blob, patient, fixed(dead.host(t), alive.host(t)))
	for off := range int64(5) {
		want(t, r, blob, 100*off, 100)
	}
	if n := len(dead.requests()); n != 1 {
		t.Errorf("the dead host was asked %d times, want once", n)
	}
	// A time that has passed: it's the first again.
	r.mu.Lock()
	r.avoided[dead.host(t).Host] = time.Now()
	r.mu.Unlock()
	want(t, r, blob, 500, 100)
	if n := len(dead.requests()); n != 2 {
		t.Errorf("the dead host was asked %d times, want twice", n)
	}
}

// A host that sends a byte now and then would otherwise be waited for as long as it does.
func TestCrawlingHostIsLeft(t *testing.T) {
	t.Parallel()
	blob := randomBlob(5000)
	crawling, alive := newRegistry(t, blob), newRegistry(t, blob)
	crawling.answers(func(w http.ResponseWriter, req *http.Request) {
		crawling.head(w, req, 1)
		var first int
		if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &first); err != nil {
			t.Error(err)
		}
		for i := first + 1; req.Context().Err() == nil && i < len(blob); i++ {
			_, _ = w.Write(blob[i : i+1])
			_ = http.NewResponseController(w).Flush()
			time.Sleep(20 * time.Millisecond)
		}
	})
	var said []string
	opt := patient
	opt.Retrying = func(_ digest.Digest, why error) { said = append(said, why.Error()) }
	r := open(t, blob, opt, fixed(crawling.host(t), alive.host(t)))
	start := time.Now()
	want(t, r, blob, 100, 4000)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("it took %s", took)
	}
	if n := len(crawling.requests()); n != 1 {
		t.Errorf("the crawling host was asked %d times, want once", n)
	}
	if len(said) != 1 || !strings.Contains(said[0], "only ") {
		t.Errorf("told %q", said)
	}
	// The last bytes of a range are fewer than what is asked of a host.
	said = nil
	want(t, open(t, blob, opt, fixed(crawling.host(t))), blob, 100, 10)
	if len(said) != 0 {
		t.Errorf("a short range: told %q", said)
	}
}

// A host that stops to serve ranges is read from the beginning, by who can't do without.
func TestAcceptWhole(t *testing.T) {
	t.Parallel()
	blob := randomBlob(300_000)
	all := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
		_, _ = w.Write(blob) // until the client has enough
	}
	reg := newRegistry(t, blob)
	reg.Config.Handler = http.HandlerFunc(all)
	r := open(t, blob, patient, fixed(reg.host(t)))
	if err := fails(t, r, 1000, 10); !errors.Is(err, ErrNoRange) {
		t.Errorf("got %v, want %v", err, ErrNoRange)
	}
	r.AcceptWhole()
	want(t, r, blob, 0, 1)
	want(t, r, blob, 1000, 10)
	want(t, r, blob, 250_000, 50_000)
	isWhole := func(r *Reader) bool {
		body, err := r.Fetch(t.Context(), 1000, 10)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		b, ok := body.(interface{ Whole() bool })
		return ok && b.Whole()
	}
	if !isWhole(r) {
		t.Error("a body that is cut out of a whole blob doesn't say so")
	}

	// Another host that serves ranges is better.
	good := newRegistry(t, blob)
	bad := newRegistry(t, blob, all, all, all)
	r = open(t, blob, patient, fixed(bad.host(t), good.host(t)))
	r.AcceptWhole()
	want(t, r, blob, 200_000, 10)
	want(t, r, blob, 100_000, 10)
	if isWhole(r) {
		t.Error("a body of a range is said to be cut out of a whole blob")
	}
	if b, g := len(bad.requests()), len(good.requests()); b != 1 || g != 3 {
		t.Errorf("%d requests to the host that ignores ranges, %d to the other; want 1 and 3", b, g)
	}

	// It may break, and be another blob.
	broken := newRegistry(t, blob, func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
		_, _ = w.Write(blob[:150_000])
		panic(http.ErrAbortHandler)
	}, all)
	r = open(t, blob, patient, fixed(broken.host(t)))
	r.AcceptWhole()
	want(t, r, blob, 100_000, 100_000)
	other := newRegistry(t, nil)
	other.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)-1))
		_, _ = w.Write(blob[1:])
	})
	r = open(t, blob, Options{RetryFor: time.Second}, fixed(other.host(t)))
	r.AcceptWhole()
	contains(t, fails(t, r, 0, 10), "has 299999 bytes of a blob of 300000")
}

// wholes is a transport at whose end is a host that ignores ranges: each answer, which it knows by its number, comes in pieces.
type wholes struct {
	size  int64
	pause time.Duration // before a piece
	piece int64
	until func(answer int) int64 // where it breaks
	n     int
}

func (w *wholes) RoundTrip(req *http.Request) (*http.Response, error) {
	w.n++
	return &http.Response{
		StatusCode: http.StatusOK, ContentLength: w.size, Request: req,
		Body: io.NopCloser(&pieces{w, req.Context(), 0, w.until(w.n)}),
	}, nil
}

type pieces struct {
	*wholes
	ctx       context.Context
	at, until int64
}

func (p *pieces) Read(b []byte) (int, error) {
	if p.at == p.until {
		return 0, io.ErrUnexpectedEOF
	}
	select {
	case <-time.After(p.pause):
	case <-p.ctx.Done():
		return 0, context.Cause(p.ctx)
	}
	n := min(int64(len(b)), p.piece, p.until-p.at)
	p.at += n
	return int(n), nil
}

// What is dropped keeps a read going only if it leads somewhere.
func TestAcceptWholeEnds(t *testing.T) {
	const size, off = 1 << 20, 1 << 19
	for name, c := range map[string]struct {
		piece int64
		pause time.Duration
		until func(answer int) int64
		says  string // "" if the read succeeds
	}{
		"always broken in front of it":      {10_000, time.Second, func(int) int64 { return off - 1 }, "unexpected EOF"},
		"broken ever sooner":                {10_000, time.Second, func(n int) int64 { return max(off-int64(n)*10_000, 0) }, "unexpected EOF"},
		"a byte now and then":               {1, 19 * time.Second, func(int) int64 { return size }, "only 2 bytes arrived"},
		"slower than RetryFor":              {5_000, time.Second, func(int) int64 { return size }, ""},
		"slower than RetryFor, broken once": {5_000, time.Second, func(n int) int64 { return min(off-1+int64(n-1)*size, size) }, ""},
		"further each time":                 {5_000, time.Second, func(n int) int64 { return min(int64(n)*100_000, size) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host := docker.RegistryHost{Client: &http.Client{Transport: &wholes{size, c.pause, c.piece, c.until, 0}}, Scheme: "http", Host: "registry.test", Path: "/v2"}
				r := New(reference.Spec{Locator: "registry.test/team/image"}, digest.FromString(name), size, fixed(host), Options{})
				r.AcceptWhole()
				ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
				defer cancel()
				body, err := r.Fetch(ctx, off, 1<<15)
				if err != nil {
					t.Fatal(err)
				}
				defer body.Close()
				_, err = io.ReadFull(body, make([]byte, 1<<15))
				if (err == nil) != (c.says == "") {
					t.Errorf("error %v, want %q", err, c.says)
				} else if err != nil {
					contains(t, err, c.says)
				}
			})
		})
	}
}
