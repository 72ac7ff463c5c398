package worker

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/moby/buildkit/util/resolver/config"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
)

// h2Registry serves one blob over TLS, by HTTP/2 to those who speak it.
type h2Registry struct {
	*httptest.Server
	blob     []byte
	opened   atomic.Int64 // connections
	requests atomic.Int64
	other    atomic.Int64 // requests that did not come by HTTP/2

	mu     sync.Mutex
	script []http.HandlerFunc // what happens to the next requests
}

func newH2Registry(t *testing.T, ln net.Listener, script ...http.HandlerFunc) *h2Registry {
	t.Helper()
	r := &h2Registry{blob: make([]byte, 1<<20), script: script}
	_, _ = rand.NewChaCha8([32]byte{}).Read(r.blob)
	r.Server = httptest.NewUnstartedServer(r)
	if ln != nil {
		r.Listener.Close()
		r.Listener = ln
	}
	r.EnableHTTP2 = true
	r.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			r.opened.Add(1)
		}
	}
	r.StartTLS()
	t.Cleanup(r.Close)
	return r
}

func (r *h2Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.requests.Add(1)
	if req.ProtoMajor != 2 {
		r.other.Add(1)
	}
	r.mu.Lock()
	next := r.serve
	if len(r.script) > 0 {
		next, r.script = r.script[0], r.script[1:]
	}
	r.mu.Unlock()
	next(w, req)
}

func (r *h2Registry) serve(w http.ResponseWriter, req *http.Request) {
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(r.blob))
}

// half sends half of what was asked for, and then does something else.
func (r *h2Registry) half(then func(w http.ResponseWriter, req *http.Request)) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		var first, last int
		if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(r.blob)))
		w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(r.blob[first : (first+last)/2])
		_ = http.NewResponseController(w).Flush()
		then(w, req)
	}
}

// reader returns a reader of the blob by clients of a worker that trusts the registry, and the transport it uses.
func (r *h2Registry) reader(t *testing.T) (*blob.Reader, *http.Transport) {
	t.Helper()
	u, err := url.Parse(r.URL)
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	pool := newClients(map[string]config.RegistryConfig{u.Host: {RootCAs: []string{ca}}})
	hosts := func() ([]docker.RegistryHost, error) {
		found := []docker.RegistryHost{{Scheme: u.Scheme, Host: u.Host, Path: "/v2", Capabilities: docker.HostCapabilityPull}}
		pool.use(found)
		return found, nil
	}
	if _, err := hosts(); err != nil {
		t.Fatal(err)
	}
	transport := pool.byHost[u.Scheme+"://"+u.Host].transport
	t.Cleanup(transport.CloseIdleConnections)
	ref, err := reference.Parse(u.Host + "/team/image:v1")
	if err != nil {
		t.Fatal(err)
	}
	return blob.New(ref, digest.FromBytes(r.blob), int64(len(r.blob)), hosts, blob.Options{RetryFor: time.Minute}), transport
}

// want reads a range and compares it.
func (r *h2Registry) want(ctx context.Context, t *testing.T, b *blob.Reader, off, n int64) {
	t.Helper()
	body, err := b.Fetch(ctx, off, n)
	if err != nil {
		t.Error(err)
		return
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil || !bytes.Equal(got, r.blob[off:off+n]) {
		t.Errorf("read %d bytes at %d: %d bytes, error %v", n, off, len(got), err)
	}
}

// TestRangesShareAnHTTP2Connection has a scheduler's number of requests outstanding at a time.
func TestRangesShareAnHTTP2Connection(t *testing.T) {
	var all, done sync.WaitGroup
	r := newH2Registry(t, nil)
	b, _ := r.reader(t)
	r.want(t.Context(), t, b, 0, 10) // else each of them would begin to connect
	all.Add(idlePerHost)
	r.mu.Lock()
	for range idlePerHost {
		r.script = append(r.script, func(w http.ResponseWriter, req *http.Request) {
			all.Done()
			all.Wait()
			r.serve(w, req)
		})
	}
	r.mu.Unlock()
	for i := range int64(idlePerHost) {
		done.Go(func() { r.want(t.Context(), t, b, i*1000, 10_000) })
	}
	done.Wait()
	if n := r.opened.Load(); n != 1 {
		t.Errorf("%d connections were opened, want 1", n)
	}
	if n := r.other.Load(); n > 0 {
		t.Errorf("%d requests of %d did not come by HTTP/2", n, r.requests.Load())
	}
}

// TestHTTP2Faults breaks streams and connections in the middle of a range.
func TestHTTP2Faults(t *testing.T) {
	for name, c := range map[string]struct {
		then   func(*h2Registry) func(http.ResponseWriter, *http.Request)
		opened int64
	}{
		"stream reset": {func(*h2Registry) func(http.ResponseWriter, *http.Request) {
			return func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
		}, 1},
		"connection closed": {func(r *h2Registry) func(http.ResponseWriter, *http.Request) {
			return func(http.ResponseWriter, *http.Request) { r.CloseClientConnections() }
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newH2Registry(t, nil)
			r.script = []http.HandlerFunc{r.half(c.then(r))}
			b, _ := r.reader(t)
			r.want(t.Context(), t, b, 1000, 100_000)
			if n, opened := r.requests.Load(), r.opened.Load(); n != 2 || opened != c.opened {
				t.Errorf("%d requests on %d connections, want 2 on %d", n, opened, c.opened)
			}
		})
	}
}

// TestHTTP2GoAway has the server ask for another connection while a range is on its way, as servers do after so many requests.
func TestHTTP2GoAway(t *testing.T) {
	r := newH2Registry(t, nil)
	b, _ := r.reader(t)
	going, over := make(chan struct{}), make(chan struct{})
	r.script = []http.HandlerFunc{
		func(w http.ResponseWriter, req *http.Request) { // takes until the other is over
			close(going)
			<-over
			r.serve(w, req)
		},
		func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Connection", "close") // Go's servers take it for GOAWAY
			r.serve(w, req)
		},
	}
	var first sync.WaitGroup
	first.Go(func() { r.want(t.Context(), t, b, 0, 100_000) })
	<-going
	r.want(t.Context(), t, b, 1000, 10)
	for range 3 {
		r.want(t.Context(), t, b, 2000, 100_000)
	}
	close(over)
	first.Wait()
	if n, opened := r.requests.Load(), r.opened.Load(); n != 5 || opened != 2 {
		t.Errorf("%d requests on %d connections, want 5 on 2: none again", n, opened)
	}
}

// deafListener's connections can go silent for good, without anybody learning of it.
type deafListener struct {
	net.Listener
	mu    sync.Mutex
	conns []*deafConn
}

type deafConn struct {
	net.Conn
	deaf atomic.Bool
}

func (l *deafListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	d := &deafConn{Conn: c}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, d)
	return d, nil
}

// deafen has what is connected say nothing any more.
func (l *deafListener) deafen() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.deaf.Store(true)
	}
}

func (c *deafConn) Write(p []byte) (int, error) {
	if c.deaf.Load() {
		return len(p), nil // lost on its way
	}
	return c.Conn.Write(p)
}

// TestDeadHTTP2Connection kills the connection without a word: no end, no reset. The read goes on over another.
func TestDeadHTTP2Connection(t *testing.T) {
	inner, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := &deafListener{Listener: inner}
	r := newH2Registry(t, ln)
	b, transport := r.reader(t)
	if sum, patience := transport.HTTP2.SendPingTimeout+transport.HTTP2.PingTimeout, 60*time.Second/3; sum <= 0 || sum >= patience {
		t.Errorf("a dead connection is noticed after %s, an attempt ends after %s", sum, patience)
	}
	transport.HTTP2.SendPingTimeout, transport.HTTP2.PingTimeout = 200*time.Millisecond, 2*time.Second
	r.script = []http.HandlerFunc{r.half(func(_ http.ResponseWriter, req *http.Request) {
		ln.deafen()
		<-req.Context().Done()
	})}
	start := time.Now()
	r.want(t.Context(), t, b, 1000, 100_000)
	// An attempt would end after 60/3 s; then the next one would be lost on the same connection.
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("the read took %s", took)
	}
	if n, opened := r.requests.Load(), r.opened.Load(); n != 2 || opened != 2 {
		t.Errorf("%d requests on %d connections, want 2 on 2", n, opened)
	}
}

// TestRenewedCertificates has a registry's authority replaced while the daemon runs.
func TestRenewedCertificates(t *testing.T) {
	r := newH2Registry(t, nil)
	own := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate().Raw})
	u, err := url.Parse(r.URL)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pool := newClients(map[string]config.RegistryConfig{u.Host: {TLSConfigDir: []string{dir}}})
	get := func() error {
		hosts := []docker.RegistryHost{{Scheme: u.Scheme, Host: u.Host}}
		pool.use(hosts)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.URL, nil)
		if err != nil {
			return err
		}
		resp, err := hosts[0].Client.Transport.RoundTrip(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	if err := get(); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without an authority: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), own, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := get(); err != nil {
		t.Errorf("with the authority: %v", err)
	}
}
