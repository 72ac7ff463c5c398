package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
)

func TestFetch(t *testing.T) {
	blob := randomBlob(100_000)
	reg := newRegistry(t, blob)
	host := reg.host(t)
	host.Header = http.Header{"X-Test": {"configured"}}
	r := open(t, blob, quick, fixed(host))
	for _, c := range []struct{ off, n int64 }{{0, 1}, {0, 100_000}, {99_999, 1}, {1234, 5678}} {
		want(t, r, blob, c.off, c.n)
	}
	if got, exp := reg.ranges(), "0-0 0-99999 99999-99999 1234-6911"; got != exp {
		t.Errorf("ranges %q, want %q", got, exp)
	}
	for _, q := range reg.requests() {
		if exp := "/v2/team/image/blobs/" + digest.FromBytes(blob).String(); q.path != exp {
			t.Errorf("path %q, want %q", q.path, exp)
		}
		if q.custom != "configured" {
			t.Error("the host's own header was not sent")
		}
	}
	for _, c := range []struct{ off, n int64 }{{-1, 1}, {0, 0}, {0, -1}} {
		if _, err := r.Fetch(t.Context(), c.off, c.n); err == nil {
			t.Errorf("Fetch(%d, %d): no error", c.off, c.n)
		}
	}
}

func TestReadAfterClose(t *testing.T) {
	blob := randomBlob(1000)
	r := open(t, blob, quick, fixed(newRegistry(t, blob).host(t)))
	body, err := r.Fetch(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := body.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := body.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Read after Close: %v", err)
	}
}

// endless is a body which never ends; a client must not try to read it.
func endless(sent *atomic.Int64) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		buf := make([]byte, 1<<20)
		for {
			n, err := w.Write(buf)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	}
}

func TestWholeBlobIsErrNoRange(t *testing.T) {
	blob := randomBlob(1000)
	var sent atomic.Int64
	reg := newRegistry(t, blob, endless(&sent))
	r := open(t, blob, quick, fixed(reg.host(t)))
	err := fails(t, r, 10, 20)
	if !errors.Is(err, ErrNoRange) {
		t.Fatalf("error %q is not ErrNoRange", err)
	}
	contains(t, err, digest.FromBytes(blob).String(), reg.host(t).Host, "bytes 10-29")
	if n := len(reg.requests()); n != 1 {
		t.Errorf("%d requests: asking again is pointless", n)
	}
	reg.Close() // waits for the handler, which ends with the connection
	if n := sent.Load(); n > 64<<20 {
		t.Errorf("%d bytes of the body were read", n)
	}
}

func TestNextHost(t *testing.T) {
	blob := randomBlob(1000)
	var sent atomic.Int64
	for name, first := range map[string]http.HandlerFunc{
		"not found":   status(http.StatusNotFound),
		"whole blob":  endless(&sent),
		"unavailable": status(http.StatusServiceUnavailable),
		"silent":      silent,
		"reset":       func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			mirror, origin := newRegistry(t, blob, first), newRegistry(t, blob)
			want(t, open(t, blob, quick, fixed(mirror.host(t), origin.host(t))), blob, 5, 100)
			if m, o := mirror.ranges(), origin.ranges(); m != "5-104" || o != "5-104" {
				t.Errorf("mirror was asked for %q, origin for %q", m, o)
			}
		})
	}
}

func TestAllHostsRefuse(t *testing.T) {
	blob := randomBlob(1000)
	a, b := newRegistry(t, blob, status(http.StatusNotFound)), newRegistry(t, blob, status(http.StatusForbidden))
	contains(t, fails(t, open(t, blob, quick, fixed(a.host(t), b.host(t))), 0, 1), b.host(t).Host, "403 Forbidden", "registry.test/team/image")
	if len(a.requests()) != 1 || len(b.requests()) != 1 {
		t.Error("a host that refuses was asked again")
	}
	contains(t, fails(t, open(t, blob, quick, fixed()), 0, 1), "no host serves registry.test")
	contains(t, fails(t, open(t, blob, quick, func() ([]docker.RegistryHost, error) { return nil, errors.New("no session") }), 0, 1), "no session")
}

// A mirror is told which registry is meant; the registry itself and Docker Hub's
// well-known other name aren't mirrors.
func TestMirrorNamespace(t *testing.T) {
	for _, c := range []struct{ ref, host, query string }{
		{"registry.test/a/b:v1", "mirror.test", "ns=registry.test"},
		{"registry.test/a/b:v1", "registry.test", ""},
		{"registry.test:5000/a/b:v1", "registry.test", "ns=registry.test%3A5000"},
		{"docker.io/library/alpine:latest", "registry-1.docker.io", ""},
		{"docker.io/library/alpine:latest", "mirror.test", "ns=docker.io"},
	} {
		ref, err := reference.Parse(c.ref)
		if err != nil {
			t.Fatal(err)
		}
		r := New(ref, digest.FromString("x"), 0, nil, Options{})
		got := r.url(docker.RegistryHost{Scheme: "https", Host: c.host, Path: "/v2/proxy"})
		repository := strings.SplitN(r.Repository(), "/", 2)[1]
		exp := "https://" + c.host + "/v2/proxy/" + repository + "/blobs/" + digest.FromString("x").String()
		if c.query != "" {
			exp += "?" + c.query
		}
		if got != exp {
			t.Errorf("%s at %s: %s, want %s", c.ref, c.host, got, exp)
		}
	}
}

func TestSize(t *testing.T) {
	blob := randomBlob(4321)
	for name, c := range map[string]struct {
		known  int64
		header string // Content-Range of the answer, if not the true one
		want   int64
		err    string
	}{
		"from the manifest": {known: 4321, want: 4321},
		"from the registry": {want: 4321},
		"nobody knows":      {header: "bytes 0-0/*", err: "neither manifest nor registry"},
	} {
		t.Run(name, func(t *testing.T) {
			var script []http.HandlerFunc
			if c.header != "" {
				script = append(script, func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Range", c.header)
					w.WriteHeader(http.StatusPartialContent)
					_, _ = w.Write(blob[:1])
				})
			}
			reg := newRegistry(t, blob, script...)
			r := open(t, blob, quick, fixed(reg.host(t)))
			r.size = c.known
			for range 2 {
				got, err := r.Size(t.Context())
				if c.err != "" {
					if err == nil {
						t.Fatalf("size %d, want an error", got)
					}
					contains(t, err, c.err)
					return
				}
				if err != nil || got != c.want {
					t.Fatalf("size %d, %v; want %d", got, err, c.want)
				}
			}
			if n := len(reg.requests()); c.known > 0 && n != 0 || c.known == 0 && n != 1 {
				t.Errorf("%d requests", n)
			}
		})
	}
}

func TestWrongAnswerIsRefused(t *testing.T) {
	blob := randomBlob(1000)
	answer := func(contentRange string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", contentRange)
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(blob[:10])
		}
	}
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		says   string
	}{
		"other offset":      {answer("bytes 0-9/1000"), `Content-Range "bytes 0-9/1000"`},
		"more than asked":   {answer("bytes 100-110/1000"), `Content-Range "bytes 100-110/1000"`},
		"no range":          {answer(""), `Content-Range ""`},
		"multipart":         {status(http.StatusPartialContent, "Content-Type", "multipart/byteranges; boundary=x"), "Content-Range"},
		"other blob length": {answer("bytes 100-109/999"), "has 999 bytes of a blob of 1000"},
		"no content":        {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, "204 No Content"},
		"nowhere":           {status(http.StatusTemporaryRedirect), "307 Temporary Redirect"},
	} {
		t.Run(name, func(t *testing.T) {
			bad, good := newRegistry(t, blob, c.answer), newRegistry(t, blob)
			r := open(t, blob, quick, fixed(bad.host(t)))
			contains(t, fails(t, r, 100, 10), bad.host(t).Host, c.says)
			if n := len(bad.requests()); n != 1 {
				t.Errorf("%d requests: asking again is pointless", n)
			}
			bad.script = append(bad.script, c.answer)
			r.SetHosts(fixed(bad.host(t), good.host(t)))
			want(t, r, blob, 100, 10)
		})
	}
}

// A host may send less than was asked for, as RFC 9110 allows.
func TestShorterRange(t *testing.T) {
	blob := randomBlob(1000)
	reg := newRegistry(t, blob, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Range", "bytes 100-149/1000")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(blob[100:150])
	})
	want(t, open(t, blob, quick, fixed(reg.host(t))), blob, 100, 200)
	if got := reg.ranges(); got != "100-299 150-299" {
		t.Errorf("ranges %q", got)
	}
}

func TestCallbacks(t *testing.T) {
	blob := randomBlob(50_000)
	reg := newRegistry(t, blob)
	reg.script = []http.HandlerFunc{
		func(w http.ResponseWriter, req *http.Request) { // what a reader waits for comes before the first byte
			time.Sleep(50 * time.Millisecond)
			reg.serve(w, req)
		},
		reg.cut(1000),
		status(http.StatusServiceUnavailable),
		reg.serve,
		status(http.StatusNotFound),
	}
	var (
		mu     sync.Mutex
		bytes  int64
		waited time.Duration
		failed []error
		again  []string
	)
	opt := quick
	opt.Retrying = func(d digest.Digest, why error) {
		mu.Lock()
		defer mu.Unlock()
		if d != digest.FromBytes(blob) {
			t.Errorf("retrying %s", d)
		}
		again = append(again, why.Error())
	}
	opt.Fetched = func(d digest.Digest, n int64, wait time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		if d != digest.FromBytes(blob) {
			t.Errorf("bytes of %s", d)
		}
		bytes += n
		waited += wait
	}
	opt.Failed = func(d digest.Digest, err error) {
		mu.Lock()
		defer mu.Unlock()
		if d != digest.FromBytes(blob) {
			t.Errorf("failed: %s", d)
		}
		failed = append(failed, err)
	}
	r := open(t, blob, opt, fixed(reg.host(t)))
	want(t, r, blob, 100, 40_000)
	if bytes != 40_000 || waited < 50*time.Millisecond || waited > 10*time.Second || len(failed) != 0 {
		t.Errorf("fetched %d bytes, waited %s, failed %v", bytes, waited, failed)
	}
	if len(again) != 0 {
		t.Errorf("retried %q", again)
	}
	want(t, r, blob, 0, 2000)
	host := reg.host(t).Host
	if len(again) != 2 || !strings.HasPrefix(again[0], host+": ") || again[1] != host+" answered 503 Service Unavailable" {
		t.Errorf("retried %q", again)
	}
	err := fails(t, r, 0, 1)
	if len(again) != 2 { // a refusal is for good
		t.Errorf("retried %q", again)
	}
	if len(failed) != 1 || failed[0].Error() != err.Error() {
		t.Errorf("failed %v, want %v", failed, err)
	}
	// Who hangs up hasn't failed.
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("build cancelled"))
	if _, err := read(ctx, r, 0, 1); err == nil {
		t.Error("read with a cancelled context")
	}
	if len(failed) != 1 || bytes != 42_000 {
		t.Errorf("fetched %d bytes, failed %v", bytes, failed)
	}
}

func TestConcurrentReads(t *testing.T) {
	blob := randomBlob(300_000)
	flaky := func(reg *registry) http.HandlerFunc {
		var n atomic.Int64
		return func(w http.ResponseWriter, req *http.Request) {
			switch i := n.Add(1) % 4; {
			case i == 0:
				reg.cut(10)(w, req)
			case i == 1 && strings.HasPrefix(req.URL.Path, "/v2/"):
				http.Redirect(w, req, "/elsewhere?n="+strconv.FormatInt(n.Load(), 10), http.StatusTemporaryRedirect)
			default:
				reg.serve(w, req)
			}
		}
	}
	reg := newRegistry(t, blob)
	reg.Config.Handler = flaky(reg)
	var fetched atomic.Int64
	r := open(t, blob, Options{Fetched: func(_ digest.Digest, n int64, _ time.Duration) { fetched.Add(n) }}, fixed(reg.host(t)))
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 8 {
				off, n := int64(i*17_000+j), int64(5000+j*700)
				got, err := read(t.Context(), r, off, n)
				if err != nil || !bytes.Equal(got, blob[off:off+n]) {
					t.Errorf("read %d bytes at %d: %d bytes, %v", n, off, len(got), err)
				}
				r.SetHosts(fixed(reg.host(t)))
				if size, err := r.Size(t.Context()); err != nil || size != int64(len(blob)) {
					t.Errorf("size %d, %v", size, err)
				}
			}
		})
	}
	wg.Wait()
	if got, exp := fetched.Load(), int64(16*8*5000+16*28*700); got != exp {
		t.Errorf("%d bytes counted, %d read", got, exp)
	}
}

func TestNoGoroutinesLeft(t *testing.T) {
	noLeaks(t)
	blob := randomBlob(1000)
	srv := &registry{blob: blob}
	srv.script = []http.HandlerFunc{srv.cut(10), srv.hang(5), silent, status(http.StatusServiceUnavailable)}
	srv.Server = httptest.NewServer(srv)
	defer srv.Close()
	r := open(t, blob, Options{RetryFor: 5 * time.Second, Stall: 50 * time.Millisecond}, fixed(srv.host(t)))
	want(t, r, blob, 0, 1000)
	body, err := r.Fetch(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	body.Close() // unread
	srv.Client().CloseIdleConnections()
}

func FuzzParseContentRange(f *testing.F) {
	for _, s := range []string{
		"bytes 0-0/1", "bytes 0-9/*", "bytes 5-4/10", "bytes 0-10/10", "bytes */10", "bytes 0-9/0", "", "bytes", "octets 0-1/2",
		"bytes 0-9223372036854775807/9223372036854775807", "bytes 0-9223372036854775808/*", "bytes -1-2/3", "bytes 0-1/2\n", "bytes 00-01/02",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, h string) {
		first, last, size, err := parseContentRange(h)
		if err != nil {
			return
		}
		if first < 0 || last < first || size < 0 || size > 0 && last >= size {
			t.Fatalf("%q: %d-%d/%d", h, first, last, size)
		}
		total := "*"
		if size > 0 {
			total = fmt.Sprint(size)
		}
		again := fmt.Sprintf("bytes %d-%d/%s", first, last, total)
		if f2, l2, s2, err := parseContentRange(again); err != nil || f2 != first || l2 != last || s2 != size {
			t.Fatalf("%q reads as %q, which reads as %d-%d/%d, %v", h, again, f2, l2, s2, err)
		}
	})
}
