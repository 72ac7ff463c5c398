package worker

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/util/resolver/config"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestConnectionsOutliveABurst(t *testing.T) {
	const burst = 20
	var opened atomic.Int64
	var all sync.WaitGroup // all requests of a burst are outstanding at the same time
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		all.Done()
		all.Wait()
		_, _ = io.WriteString(w, "bytes")
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	c := newClients(nil)
	for range 3 {
		hosts := []docker.RegistryHost{{Scheme: "http", Host: u.Host, Client: http.DefaultClient}}
		c.use(hosts)
		all.Add(burst)
		var done sync.WaitGroup
		for range burst {
			done.Go(func() {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
				if err != nil {
					t.Error(err)
					return
				}
				resp, err := hosts[0].Client.Transport.RoundTrip(req)
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					t.Error(err)
				}
			})
		}
		done.Wait()
	}
	if n := opened.Load(); n > burst {
		t.Errorf("three bursts of %d requests opened %d connections", burst, n)
	}
}

// An Authorization header stays with its host also where it is a resolver that uses our clients.
func TestOurClientsAreDiscreet(t *testing.T) {
	body := []byte(`{"schemaVersion":2}`)
	asked := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Header.Get("Authorization")
		_, _ = w.Write(body)
	}))
	defer other.Close()
	registry := httptest.NewServer(http.RedirectHandler(other.URL+"/object", http.StatusTemporaryRedirect)) // the same host, another port
	defer registry.Close()
	host := strings.TrimPrefix(registry.URL, "http://")
	hosts := []docker.RegistryHost{{
		Scheme: "http", Host: host, Path: "/v2", Client: http.DefaultClient, Authorizer: header("Bearer meant for " + host),
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
	}}
	newClients(nil).use(hosts)
	fetch, err := docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) { return hosts, nil }}).Fetcher(t.Context(), host+"/image:v1-esgztoc")
	if err != nil {
		t.Fatal(err)
	}
	rc, err := fetch.Fetch(t.Context(), ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromBytes(body), Size: int64(len(body))})
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if got, err := io.ReadAll(rc); err != nil || !bytes.Equal(got, body) {
		t.Fatalf("read %q, %v", got, err)
	}
	if got := <-asked; got != "" {
		t.Errorf("another port was told %q", got)
	}
}

// TestWhoGetsOurClients looks at hosts whose TLS isn't the usual one.
func TestWhoGetsOurClients(t *testing.T) {
	insecure := true
	c := newClients(map[string]config.RegistryConfig{
		"gone.example":     {RootCAs: []string{filepath.Join(t.TempDir(), "ca.pem")}},
		"dir.example":      {TLSConfigDir: []string{filepath.Join(t.TempDir(), "gone")}},
		"insecure.example": {Insecure: &insecure},
		"plain.example":    {Mirrors: []string{"m.example"}},
		"docker.io":        {Insecure: &insecure},
	})
	for host, kept := range map[string]bool{
		"gone.example": true, "insecure.example": true, "registry-1.docker.io": true,
		"dir.example": false, "plain.example": false, "other.example": false,
	} {
		own := &http.Client{}
		hosts := []docker.RegistryHost{{Scheme: "https", Host: host, Client: own}}
		c.use(hosts)
		if (hosts[0].Client == own) != kept {
			t.Errorf("%s keeps its client: %t, want %t", host, !kept, kept)
		}
	}
}
