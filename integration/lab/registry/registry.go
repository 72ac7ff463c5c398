// Package registry serves a real registry, CNCF distribution as a library,
// with what a test of a puller needs around it: an access log that can be
// asked, authentication, TLS, faults on demand and an optional front such as
// lab/link's delay.
//
// The chain of a request is front, signals, log, faults, object store, authentication, distribution.
// So the log shows what the client was answered, faults included.
//
// Blobs are on disk and several registries may serve one directory, one after
// the other or at the same time. A Registry lives in the calling process; to
// have it in another network namespace pass a listener made there.
package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // the storage driver we use
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/sirupsen/logrus"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/pki"
)

// Auth is what a registry demands of its clients.
type Auth int

// The kinds of authentication.
const (
	None  Auth = iota
	Basic      // HTTP basic authentication, distribution's htpasswd
	Token      // bearer tokens, distribution's token access and a token server at /token
)

// Options say how to serve. Only Dir is required.
type Options struct {
	// Dir is the storage directory; it is created. It outlives the registry.
	Dir string
	// Listener to serve on; nil listens on a free port of 127.0.0.1. The registry closes it.
	Listener net.Listener
	// Auth demands Username and Password.
	Auth               Auth
	Username, Password string
	// CA, if set, makes the registry speak TLS with a certificate for its address.
	CA *pki.CA
	// HTTP2 offers HTTP/2 to clients that speak TLS. A fault that resets a connection resets a stream then.
	HTTP2 bool
	// SignedURLs redirects GETs of blobs to an object store: another address, on which a signature in the URL is what
	// lets a client in, and any Authorization header keeps it out, as it does at the stores that registries use.
	SignedURLs bool
	// Front wraps everything, for example a link's delay.
	Front func(http.Handler) http.Handler
}

// A Registry is a running registry.
type Registry struct {
	// Host is the address as it stands in an image reference: host:port.
	Host string
	// Log is what was asked and answered.
	Log *Log
	// Faults are what goes wrong on purpose; initially nothing.
	Faults *Faults

	scheme   string
	username string
	password string
	ca       *pki.CA
	tmp      string
	server   *http.Server
	app      *handlers.App
	tokens   *tokenServer
	store    *objectStore
	signals  signals
	serve    sync.WaitGroup
	close    func() error
}

// quiet silences distribution, which logs to logrus' standard logger.
var quiet = sync.OnceFunc(func() {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.PanicLevel)
})

// Start serves a registry. It takes over logrus' standard logger of the process, whose
// output it discards: distribution writes there.
func Start(opt Options) (_ *Registry, err error) {
	if opt.Dir == "" {
		return nil, errors.New("start registry: no storage directory")
	}
	quiet()
	if err := os.MkdirAll(opt.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	ln := opt.Listener
	if ln == nil {
		var lc net.ListenConfig
		if ln, err = lc.Listen(context.Background(), "tcp", "127.0.0.1:0"); err != nil {
			return nil, fmt.Errorf("start registry: %w", err)
		}
	}
	r := &Registry{
		Host:     ln.Addr().String(),
		Log:      &Log{},
		Faults:   &Faults{},
		scheme:   "http",
		username: opt.Username,
		password: opt.Password,
		ca:       opt.CA,
	}
	defer func() {
		if err != nil {
			ln.Close()
			os.RemoveAll(r.tmp)
			if r.store != nil {
				r.store.Close()
			}
		}
	}()
	if r.tmp, err = os.MkdirTemp("", "lab-registry-"); err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	if opt.CA != nil {
		r.scheme = "https"
	}

	cfg := &configuration.Configuration{
		Storage: configuration.Storage{
			"filesystem":  {"rootdirectory": opt.Dir},
			"cache":       {"blobdescriptor": "inmemory"},
			"delete":      {"enabled": true},
			"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
		},
	}
	cfg.HTTP.Secret = "lab"
	cfg.HTTP.RelativeURLs = true
	cfg.Catalog.MaxEntries = 1000
	cfg.Validation.Manifests.URLs.Allow = []string{".*"} // of foreign layers

	var outer http.Handler
	switch opt.Auth {
	case None:
	case Basic:
		path := filepath.Join(r.tmp, "htpasswd")
		if err := writeHtpasswd(path, opt.Username, opt.Password); err != nil {
			return nil, err
		}
		cfg.Auth = configuration.Auth{"htpasswd": {"realm": "lab", "path": path}}
	case Token:
		jwks := filepath.Join(r.tmp, "jwks.json")
		if r.tokens, err = newTokenServer(jwks, opt.Username, opt.Password); err != nil {
			return nil, err
		}
		cfg.Auth = configuration.Auth{"token": {
			"realm":             r.URL() + "/token",
			"service":           tokenService,
			"issuer":            tokenIssuer,
			"jwks":              jwks,
			"signingalgorithms": []any{"ES256"},
		}}
	default:
		return nil, fmt.Errorf("start registry: unknown authentication %d", opt.Auth)
	}
	r.app = handlers.NewApp(context.Background(), cfg)
	outer = r.app
	if r.tokens != nil {
		outer = r.tokens.wrap(outer)
	}
	if opt.SignedURLs {
		if r.store, err = startObjectStore(opt.Dir, func(h http.Handler) http.Handler { return r.Log.wrap(r.Faults.wrap(h)) }); err != nil {
			return nil, fmt.Errorf("start registry: %w", err)
		}
		outer = r.store.redirect(outer)
	}
	outer = r.signals.wrap(r.Log.wrap(r.Faults.wrap(outer)))
	if opt.Front != nil {
		outer = opt.Front(outer)
	}

	r.server = &http.Server{
		Handler:           outer,
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0), // clients that don't trust us are part of the tests
	}
	if opt.CA != nil {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			return nil, fmt.Errorf("start registry: %w", err)
		}
		pair, err := opt.CA.Issue("registry-"+filepath.Base(r.tmp), host, "localhost")
		if err != nil {
			return nil, fmt.Errorf("start registry: %w", err)
		}
		cert, err := pair.TLS()
		if err != nil {
			return nil, fmt.Errorf("start registry: %w", err)
		}
		// HTTP/1.1 only as a rule: faults take over connections.
		protocols := []string{"http/1.1"}
		if opt.HTTP2 {
			protocols = append([]string{"h2"}, protocols...)
		}
		r.server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: protocols}
		ln = tls.NewListener(ln, r.server.TLSConfig)
	}
	r.serve.Go(func() {
		// Serve returns ErrServerClosed when Close is called and nothing else
		// that anyone could act upon here: clients see the rest.
		_ = r.server.Serve(ln)
	})
	r.close = sync.OnceValue(func() error {
		err := r.server.Close()
		r.Faults.Clear()
		if r.store != nil {
			err = errors.Join(err, r.store.Close())
		}
		r.serve.Wait()
		return errors.Join(err, r.app.Shutdown(), os.RemoveAll(r.tmp))
	})
	return r, nil
}

// Close ends the registry and every connection to it. What it stored stays.
func (r *Registry) Close() error { return r.close() }

// URL is the registry's address with scheme and without a slash at its end.
func (r *Registry) URL() string { return r.scheme + "://" + r.Host }

// Ref returns a reference to name, for example "base:estargz", in this registry.
func (r *Registry) Ref(name string) string { return r.Host + "/" + name }

// Transport returns a transport for clients in this process: it trusts the
// registry's certificate. Credentials are the caller's business.
func (r *Registry) Transport() http.RoundTripper {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = nil
	if r.ca != nil {
		t.TLSClientConfig = &tls.Config{RootCAs: r.ca.Pool()}
	}
	return t
}

// RevokeTokens makes every token issued until now invalid, as if it had
// expired: the next request that carries one is answered 401 with a challenge.
func (r *Registry) RevokeTokens() {
	if r.tokens != nil {
		r.tokens.revokeAll()
	}
}

// ExpireURLs makes every signed URL issued until now invalid: the object store answers 403 to it.
func (r *Registry) ExpireURLs() {
	if r.store != nil {
		r.store.epoch.Add(1)
	}
}

// OnSignal has f called whenever something gets the URL that is returned: this is how a step of a build tells a test how
// far it has come, and waits for it. It is answered when f returns, with what f returns; no fault hits it.
func (r *Registry) OnSignal(name string, f func(*http.Request) string) (url string) {
	return r.URL() + r.signals.add(name, f)
}

// DockerConfig writes a docker config.json with the registry's credentials
// into dir, for use as DOCKER_CONFIG.
func (r *Registry) DockerConfig(dir string) error {
	return writeDockerConfig(dir, r.Host, r.username, r.password)
}

// Authenticator returns the credentials for go-containerregistry clients.
func (r *Registry) Authenticator() authn.Authenticator {
	if r.username == "" {
		return authn.Anonymous
	}
	return &authn.Basic{Username: r.username, Password: r.password}
}
