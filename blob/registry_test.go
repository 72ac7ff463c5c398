package blob

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
)

// registry serves one blob. Requests get the next behaviour of its script, and a
// proper answer when that is at its end.
type registry struct {
	*httptest.Server
	blob []byte

	mu     sync.Mutex
	script []http.HandlerFunc
	seen   []seen
}

// seen is a request that a registry has received.
type seen struct {
	path, query, rng, authorization string
	custom                          string // X-Test
	at                              time.Time
}

func newRegistry(t *testing.T, blob []byte, script ...http.HandlerFunc) *registry {
	t.Helper()
	r := &registry{blob: blob, script: script}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.seen = append(r.seen, seen{
		path: req.URL.Path, query: req.URL.RawQuery, rng: req.Header.Get("Range"),
		authorization: req.Header.Get("Authorization"), custom: req.Header.Get("X-Test"), at: time.Now(),
	})
	next := r.serve
	if len(r.script) > 0 {
		next, r.script = r.script[0], r.script[1:]
	}
	r.mu.Unlock()
	next(w, req)
}

func (r *registry) serve(w http.ResponseWriter, req *http.Request) {
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(r.blob))
}

func (r *registry) requests() []seen {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]seen(nil), r.seen...)
}

func (r *registry) ranges() string {
	var s []string
	for _, q := range r.requests() {
		s = append(s, strings.TrimPrefix(q.rng, "bytes="))
	}
	return strings.Join(s, " ")
}

// host is the registry as a resolver describes it.
func (r *registry) host(t *testing.T) docker.RegistryHost {
	t.Helper()
	u, err := url.Parse(r.URL)
	if err != nil {
		t.Fatal(err)
	}
	return docker.RegistryHost{
		Client: r.Client(), Scheme: u.Scheme, Host: u.Host, Path: "/v2",
		Capabilities: docker.HostCapabilityPull,
	}
}

// Behaviours.

func status(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		http.Error(w, "no", code)
	}
}

// cut sends the right header and n bytes of the body, and breaks the connection.
func (r *registry) cut(n int) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		r.head(w, req, n)
		panic(http.ErrAbortHandler)
	}
}

// hang sends the right header and n bytes of the body, and then nothing.
func (r *registry) hang(n int) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		r.head(w, req, n)
		<-req.Context().Done()
	}
}

func (r *registry) head(w http.ResponseWriter, req *http.Request, n int) {
	var first, last int
	if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil {
		http.Error(w, "bad range", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(r.blob)))
	w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
	w.WriteHeader(http.StatusPartialContent)
	_, _ = w.Write(r.blob[first : first+n])
	_ = http.NewResponseController(w).Flush()
}

// silent accepts the request and says nothing.
func silent(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() }

func randomBlob(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// fixed serves the blob from the same hosts at all times.
func fixed(hosts ...docker.RegistryHost) Hosts {
	return func() ([]docker.RegistryHost, error) { return hosts, nil }
}

// quick gives up soon, but for no pause that a busy machine makes: for tests of what happens when nothing else helps.
var quick = Options{RetryFor: 3 * time.Second, Stall: time.Second}

// open returns a Reader of blob as registry.test/team/image has it.
func open(t *testing.T, blob []byte, opt Options, hosts Hosts) *Reader {
	t.Helper()
	ref, err := reference.Parse("registry.test/team/image:v1")
	if err != nil {
		t.Fatal(err)
	}
	return New(ref, digest.FromBytes(blob), int64(len(blob)), hosts, opt)
}

// read returns the n bytes at off.
func read(ctx context.Context, r *Reader, off, n int64) ([]byte, error) {
	body, err := r.Fetch(ctx, off, n)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

// want reads the n bytes at off and compares them.
func want(t *testing.T, r *Reader, blob []byte, off, n int64) {
	t.Helper()
	got, err := read(t.Context(), r, off, n)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, blob[off:off+n]) {
		t.Fatalf("read %d bytes at %d: other bytes than the blob's (%d of them)", n, off, len(got))
	}
}

// fails reads the n bytes at off and returns the error.
func fails(t *testing.T, r *Reader, off, n int64) error {
	t.Helper()
	got, err := read(t.Context(), r, off, n)
	if err == nil {
		t.Fatalf("read %d bytes at %d: got %d bytes, want an error", n, off, len(got))
	}
	return err
}

func contains(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

// noLeaks fails the test if goroutines which it started in this package or in
// net/http's transport outlive it.
func noLeaks(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		var stacks string
		for range 1000 {
			buf := make([]byte, 1<<20)
			stacks = string(buf[:runtime.Stack(buf, true)])
			if !strings.Contains(stacks, "http.(*persistConn)") && !strings.Contains(stacks, "blob.(*") {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("goroutines left:\n%s", stacks)
	})
}
