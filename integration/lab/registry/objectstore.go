package registry

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// SignatureParameter is the name of the parameter of a signed URL that nobody may see in a log.
const SignatureParameter = "X-Lab-Signature"

// objectStore serves a registry's blobs to whoever has a signed URL.
type objectStore struct {
	dir    string
	key    []byte
	epoch  atomic.Int64 // signatures of an earlier one have expired
	host   string
	server *http.Server
	serve  sync.WaitGroup
}

func startObjectStore(dir string, wrap func(http.Handler) http.Handler) (*objectStore, error) {
	var lc net.ListenConfig
	// Another name than the registry's: an HTTP client keeps credentials for all ports of a host.
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.2:0")
	if err != nil {
		return nil, err
	}
	s := &objectStore{dir: dir, key: []byte(rand.Text()), host: ln.Addr().String()}
	s.server = &http.Server{Handler: wrap(s), ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)}
	s.serve.Go(func() { _ = s.server.Serve(ln) }) // until Close
	return s, nil
}

// Close ends the store and every connection to it.
func (s *objectStore) Close() error {
	err := s.server.Close()
	s.serve.Wait()
	return err
}

// redirect has clients that may read a blob read it from the store.
func (s *objectStore) redirect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !matchBlobs(r) || strings.Contains(r.URL.Path, "/blobs/uploads/") {
			next.ServeHTTP(w, r)
			return
		}
		// The registry itself says who may, and what isn't there.
		next.ServeHTTP(&redirectWriter{ResponseWriter: w, location: s.sign(r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:])}, r)
	})
}

func (s *objectStore) sign(d string) string {
	epoch := fmt.Sprint(s.epoch.Load())
	u := url.URL{Scheme: "http", Host: s.host, Path: "/store/blobs/" + d,
		RawQuery: url.Values{"epoch": {epoch}, SignatureParameter: {s.signature(d, epoch)}}.Encode()}
	return u.String()
}

func (s *objectStore) signature(d, epoch string) string {
	h := hmac.New(sha256.New, s.key)
	fmt.Fprint(h, d, epoch)
	return fmt.Sprintf("%x", h.Sum(nil))
}

// ServeHTTP implements http.Handler.
func (s *objectStore) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d := digest.Digest(strings.TrimPrefix(r.URL.Path, "/store/blobs/"))
	q := r.URL.Query()
	switch {
	case d.Validate() != nil:
		http.NotFound(w, r)
	case r.Header.Get("Authorization") != "":
		http.Error(w, "only one way to authorize is allowed", http.StatusBadRequest)
	case q.Get("epoch") != fmt.Sprint(s.epoch.Load()) || !hmac.Equal([]byte(q.Get(SignatureParameter)), []byte(s.signature(d.String(), q.Get("epoch")))):
		http.Error(w, "request has expired", http.StatusForbidden)
	default:
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeFile(w, r, filepath.Join(s.dir, "docker/registry/v2/blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded(), "data"))
	}
}

// redirectWriter turns success into a redirect.
type redirectWriter struct {
	http.ResponseWriter
	location string
	started  bool
	sent     bool // the redirect: the body is dropped
}

// WriteHeader implements http.ResponseWriter.
func (w *redirectWriter) WriteHeader(status int) {
	w.started = true
	if status >= 300 {
		w.ResponseWriter.WriteHeader(status)
		return
	}
	w.sent = true
	clear(w.Header())
	w.Header().Set("Location", w.location)
	w.ResponseWriter.WriteHeader(http.StatusTemporaryRedirect)
}

// Write implements http.ResponseWriter.
func (w *redirectWriter) Write(p []byte) (int, error) {
	if !w.started {
		w.WriteHeader(http.StatusOK)
	}
	if w.sent {
		return 0, http.ErrBodyNotAllowed // nobody wants the rest either
	}
	return w.ResponseWriter.Write(p)
}
