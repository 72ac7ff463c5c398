package worker

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/util/resolver/config"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Authorization header that was meant for a registry doesn't travel to where that redirects: not to a host below it, and not to another port,
// as net/http would have it.
func TestAuthorizationStaysWithItsHost(t *testing.T) {
	body := []byte(`{"schemaVersion":2}`)
	var mu sync.Mutex
	seen := map[string]string{} // Host header -> Authorization of the last request
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.Host] = r.Header.Get("Authorization")
		mu.Unlock()
		if strings.HasPrefix(r.URL.Path, "/v2/") {
			to := strings.ReplaceAll(strings.Split(r.URL.Path, "/")[2], "_", ":")
			if to != "here" {
				http.Redirect(w, r, "http://"+to+"/object", http.StatusTemporaryRedirect)
				return
			}
			http.Redirect(w, r, "/object", http.StatusTemporaryRedirect)
			return
		}
		_, _ = w.Write(body)
	})
	servers := []*httptest.Server{httptest.NewServer(handler), httptest.NewServer(handler)}
	ports := make([]string, len(servers))
	for i, s := range servers {
		defer s.Close()
		_, ports[i], _ = net.SplitHostPort(s.Listener.Addr().String())
	}
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr) // a.test and all below it are on loopback
		if err != nil {
			return nil, err
		}
		return (&net.Dialer{}).DialContext(ctx, network, "127.0.0.1:"+port)
	}
	registry := "a.test:" + ports[0]
	for name, c := range map[string]struct {
		to    string
		keeps bool
	}{
		"the same host":      {"here", true},
		"a host below":       {"sub.a.test_" + ports[0], false},
		"another port":       {"a.test_" + ports[1], false},
		"another host":       {"b.test_" + ports[1], false},
		"a host above":       {"test_" + ports[0], false},
		"the host by itself": {"a.test_" + ports[0], true},
	} {
		t.Run(name, func(t *testing.T) {
			hosts := RegistryHosts(map[string]config.RegistryConfig{registry: {PlainHTTP: new(true)}})
			fetch := docker.NewResolver(docker.ResolverOptions{Hosts: func(name string) ([]docker.RegistryHost, error) {
				found, err := hosts(name)
				for i := range found {
					found[i].Authorizer = header("Bearer meant for " + registry)
					d, ok := found[i].Client.Transport.(discreet)
					if !ok {
						return nil, fmt.Errorf("the transport is %T", found[i].Client.Transport)
					}
					d.RoundTripper = &http.Transport{DialContext: dial, DisableKeepAlives: true}
					found[i].Client.Transport = d
				}
				return found, err
			}})
			f, err := fetch.Fetcher(t.Context(), registry+"/"+c.to+"/image:v1")
			if err != nil {
				t.Fatal(err)
			}
			rc, err := f.Fetch(t.Context(), ocispecs.Descriptor{
				MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromBytes(body), Size: int64(len(body)),
			})
			if err != nil {
				t.Fatal(err)
			}
			defer rc.Close()
			if got, err := io.ReadAll(rc); err != nil || !bytes.Equal(got, body) {
				t.Fatalf("read %q, %v", got, err)
			}
			mu.Lock()
			defer mu.Unlock()
			to := strings.ReplaceAll(strings.Replace(c.to, "here", registry, 1), "_", ":")
			if got, there := seen[to]; !there || (got != "") != c.keeps {
				t.Errorf("%s was told %q (asked: %t)", to, got, there)
			}
			clear(seen)
		})
	}
}

// header authorizes with a header, for one host only, as authorizers do.
type header string

func (h header) Authorize(_ context.Context, req *http.Request) error {
	if _, host, _ := strings.Cut(string(h), "for "); req.URL.Host == host {
		req.Header.Set("Authorization", string(h))
	}
	return nil
}

func (header) AddResponses(context.Context, []*http.Response) error { return nil }

// What's sent over https isn't told to who listens on http, unless whoever configured the registry takes that for the same.
func TestAuthorizationStaysEncrypted(t *testing.T) {
	at := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	for _, c := range []struct {
		from, to string
		insecure bool
		want     bool
	}{
		{"https://a.test/v2/x", "https://a.test:443/x", false, true},
		{"https://a.test/v2/x", "http://a.test/x", false, false},
		{"https://a.test/v2/x", "http://a.test/x", true, true},
		{"https://a.test:5000/v2/x", "http://a.test:5000/x", true, true},
		{"https://a.test:5000/v2/x", "http://a.test:5001/x", true, false},
		{"http://a.test/v2/x", "http://a.test:80/x", false, true},
		{"https://[::1]/v2/x", "https://[::2]/x", true, false},
	} {
		if got := (discreet{clear: c.insecure}).same(at(c.from), at(c.to)); got != c.want {
			t.Errorf("%s and %s (insecure: %t): %t", c.from, c.to, c.insecure, got)
		}
	}
}
