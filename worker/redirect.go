package worker

import (
	"net/http"
	"net/url"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/util/resolver"
	"github.com/moby/buildkit/util/resolver/config"
)

// RegistryHosts returns what BuildKit makes of the registries in buildkitd.toml, with clients that keep credentials to themselves when they are
// redirected. Package blob, which reads layers, follows redirects by itself; with these manifests, configurations and whole blobs are
// fetched, and images are pushed, by containerd's resolver.
func RegistryHosts(registries map[string]config.RegistryConfig) docker.RegistryHosts {
	hosts := resolver.NewRegistryConfig(registries)
	return func(name string) ([]docker.RegistryHost, error) {
		found, err := hosts(name)
		for i := range found {
			h := &found[i]
			if h.Client == nil {
				continue
			}
			r := registries[h.Host]
			client := *h.Client
			client.Transport = discreet{client.Transport, r.Insecure != nil && *r.Insecure}
			h.Client = &client
		}
		return found, err
	}
}

// discreet is a transport that doesn't tell another host what was meant for the first one. By net/http's rule an Authorization header
// travels on to other ports of a host, to hosts below it, and from https to http.
type discreet struct {
	http.RoundTripper
	clear bool // http will do where https was asked for
}

// RoundTrip implements http.RoundTripper. What containerd's resolver adds when it is redirected, since it has credentials for the other host, is
// sent: that isn't what was meant for the first.
func (d discreet) RoundTrip(req *http.Request) (*http.Response, error) {
	const header = "Authorization"
	first := req
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	if had := req.Header.Get(header); first != req && had != "" && had == first.Header.Get(header) && !d.same(first.URL, req.URL) {
		req = req.Clone(req.Context())
		req.Header.Del(header)
	}
	next := d.RoundTripper
	if next == nil {
		next = http.DefaultTransport
	}
	return next.RoundTrip(req)
}

// same reports whether two addresses are one host's.
func (d discreet) same(a, b *url.URL) bool {
	return a.Hostname() == b.Hostname() && (a.Scheme == b.Scheme && port(a) == port(b) || d.clear && a.Port() == b.Port())
}

func port(u *url.URL) string {
	switch {
	case u.Port() != "":
		return u.Port()
	case u.Scheme == "https":
		return "443"
	}
	return "80"
}
