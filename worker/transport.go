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

// A connection of HTTP/2 that is silent for silentFor, with requests outstanding, is asked for a sign of life, and closed if there is
// none for lostAfter. All requests to a host share it, and who gives one up leaves it to the next: so a connection that died without a
// word must be noticed here, and before package blob gives up an attempt.
const (
	silentFor = 5 * time.Second
	lostAfter = 5 * time.Second
)

// clients are what layers are read with, in place of BuildKit's clients: one for each host, whatever the image.
type clients struct {
	registries map[string]config.RegistryConfig

	mu     sync.Mutex
	byHost map[string]*hostClient
}

type hostClient struct {
	*http.Client
	transport *http.Transport
	tls       *tlsFiles
}

func newClients(registries map[string]config.RegistryConfig) *clients {
	return &clients{registries: registries, byHost: map[string]*hostClient{}}
}

// use replaces the clients of hosts. Those that aren't verified keep theirs: BuildKit's falls back to plain HTTP.
func (c *clients) use(hosts []docker.RegistryHost) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range hosts {
		h := &hosts[i]
		r := c.configOf(h.Host)
		if r.Insecure != nil && *r.Insecure {
			continue
		}
		key := h.Scheme + "://" + h.Host
		hc := c.byHost[key]
		if hc == nil || hc.tls.changed() {
			files, err := loadTLS(r)
			if err != nil {
				continue // BuildKit has read them, so they are being replaced
			}
			if hc != nil {
				hc.transport.CloseIdleConnections()
			}
			t := newTransport()
			t.TLSClientConfig = files.config
			// Package blob follows redirects by itself; containerd's resolver, which finds tables of contents elsewhere, has net/http do it.
			hc = &hostClient{&http.Client{Transport: discreet{tracing.NewTransport(t), false}}, t, files}
			c.byHost[key] = hc
		}
		h.Client = hc.Client
	}
}

// configOf returns the configuration of a host. Docker Hub's has another name than the host.
func (c *clients) configOf(host string) config.RegistryConfig {
	if r, ok := c.registries[host]; ok || host != "registry-1.docker.io" {
		return r
	}
	return c.registries["docker.io"]
}

// newTransport returns what BuildKit's newDefaultTransport does, in util/resolver, but for the idle connections, and for HTTP/2. BuildKit
// turns that off for the sake of pushes, whose flow control it can't tune. These clients only read, and no more in one go than a
// stream's window holds, 4 MiB.
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
		HTTP2:                 &http.HTTP2Config{SendPingTimeout: silentFor, PingTimeout: lostAfter},
	}
	t.Protocols.SetHTTP1(true)
	t.Protocols.SetHTTP2(true)
	return t
}
