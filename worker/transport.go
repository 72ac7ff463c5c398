package worker

import (
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/util/resolver/config"
	"github.com/moby/buildkit/util/tracing"
)

// idlePerHost is how many connections to a host are kept while nobody uses them: as many as a scheduler has requests
// outstanding. BuildKit's clients keep four. The others are closed after every burst of requests, and the next burst waits
// for new ones, each a round trip or two and a slow start.
const idlePerHost = 64

// clients are what layers are read with, in place of BuildKit's clients: one for each host, whatever the image.
type clients struct {
	registries map[string]config.RegistryConfig

	mu     sync.Mutex
	byHost map[string]*http.Client
}

func newClients(registries map[string]config.RegistryConfig) *clients {
	return &clients{registries: registries, byHost: map[string]*http.Client{}}
}

// use replaces the clients of hosts. Those whose TLS isn't the usual one keep theirs, as only BuildKit knows how to make it.
func (c *clients) use(hosts []docker.RegistryHost) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range hosts {
		h := &hosts[i]
		r := c.registries[h.Host]
		if len(r.TLSConfigDir) > 0 || len(r.RootCAs) > 0 || len(r.KeyPairs) > 0 || r.Insecure != nil && *r.Insecure {
			continue
		}
		key := h.Scheme + "://" + h.Host
		if c.byHost[key] == nil {
			c.byHost[key] = &http.Client{Transport: tracing.NewTransport(newTransport())}
		}
		h.Client = c.byHost[key]
	}
}

// newTransport returns what BuildKit's newDefaultTransport does, in util/resolver, but for the idle connections. As there, there's no
// HTTP/2, by which all requests share one connection's congestion window.
func newTransport() *http.Transport {
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 60 * time.Second}).DialContext,
		MaxIdleConns:          4 * idlePerHost,
		MaxIdleConnsPerHost:   idlePerHost,
		IdleConnTimeout:       120 * time.Second,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: 5 * time.Second,
		Protocols:             new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	return t
}
