// Package repositorytest is a registry in memory for tests of what reads and writes images. It does what the distribution specification
// says of blobs, uploads in one piece and in several, mounts and manifests, remembers what it was asked, and fails where a test wants it to.
//
// Blobs are those of a repository, as in real registries, and a manifest that refers to what is not there is refused.
package repositorytest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Registry serves any number of repositories. It is safe for concurrent use.
type Registry struct {
	// Host is what references begin with.
	Host string
	// Fault, if set, may answer a request; it returns whether it has.
	Fault func(w http.ResponseWriter, r *http.Request) bool
	// Token, if set, is the bearer token without which nothing is answered but a challenge, and Scopes are told the scopes that
	// tokens are asked for.
	Token  string
	Scopes func(scopes []string)
	// Silent has it not say which blob it has been given.
	Silent bool

	server *httptest.Server

	mu      sync.Mutex
	repos   map[string]*repo
	uploads map[string]string // id -> repository
	begun   int
	log     []Request
	active  int // requests that aren't in the log yet
}

type repo struct {
	blobs     map[string][]byte
	manifests map[string]manifest // by tag and digest
}

type manifest struct {
	mediaType string
	body      []byte
}

// A Request is one that the registry was asked.
type Request struct {
	Method, Path, Query string
	Status              int
	Received, Sent      int64 // bytes of bodies
}

// New starts a registry that ends with the test.
func New(t testing.TB) *Registry {
	t.Helper()
	r := &Registry{repos: map[string]*repo{}, uploads: map[string]string{}}
	r.server = httptest.NewServer(r)
	t.Cleanup(func() {
		r.server.CloseClientConnections()
		r.server.Close()
	})
	r.Host = strings.TrimPrefix(r.server.URL, "http://")
	return r
}

// Hosts are for clients of it, each time with authorizers of their own.
func (r *Registry) Hosts() func(string) ([]docker.RegistryHost, error) {
	auth := docker.NewDockerAuthorizer(docker.WithAuthCreds(func(string) (string, string, error) { return "user", "secret", nil }))
	return func(string) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{
			Client: r.server.Client(), Scheme: "http", Host: r.Host, Path: "/v2", Authorizer: auth,
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush,
		}}, nil
	}
}

// settle waits for requests that have been answered to be in the log: who asked has the answer before. One that is never answered isn't waited for
// long. The caller holds mu.
func (r *Registry) settle() {
	for n := 0; r.active > 0 && n < 100; n++ {
		r.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
		r.mu.Lock()
	}
}

// Requests returns what was asked since the last Reset, without what tokens were asked for.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settle()
	return slices.Clone(r.log)
}

// Reset forgets the requests.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settle()
	r.log = nil
}

// Uploads is how many uploads have been begun and neither completed nor cancelled.
func (r *Registry) Uploads() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.uploads)
}

// Moved is how many bytes of blobs were read and written since the last Reset, but for those up to small, such as configurations.
func (r *Registry) Moved(small int64) (read, written int64) {
	for _, q := range r.Requests() {
		if strings.Contains(q.Path, "/blobs/") {
			if q.Sent > small {
				read += q.Sent
			}
			if q.Received > small {
				written += q.Received
			}
		}
	}
	return read, written
}

// PutBlob adds a blob.
func (r *Registry) PutBlob(name string, p []byte) digest.Digest {
	r.mu.Lock()
	defer r.mu.Unlock()
	dgst := digest.FromBytes(p)
	r.repo(name).blobs[dgst.String()] = p
	return dgst
}

// DeleteBlob removes a blob.
func (r *Registry) DeleteBlob(name string, dgst digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.repo(name).blobs, dgst.String())
}

// Blob returns a blob, nil if it isn't there.
func (r *Registry) Blob(name string, dgst digest.Digest) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.repo(name).blobs[dgst.String()]
}

// PutManifest adds a manifest, under its digest and the tag, if that isn't empty.
func (r *Registry) PutManifest(name, tag, mediaType string, v any) ocispecs.Descriptor {
	p, ok := v.([]byte)
	if !ok {
		var err error
		if p, err = json.Marshal(v); err != nil {
			panic(err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.put(name, tag, mediaType, p)
	return ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
}

// Manifest returns what a tag or digest names, nil if there is nothing.
func (r *Registry) Manifest(name, tag string) (mediaType string, body []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.repo(name).manifests[tag]
	return m.mediaType, m.body
}

func (r *Registry) put(name, tag, mediaType string, p []byte) {
	m := manifest{mediaType, p}
	r.repo(name).manifests[digest.FromBytes(p).String()] = m
	if tag != "" {
		r.repo(name).manifests[tag] = m
	}
}

// repo returns a repository, which is there as soon as it is asked for. The caller holds mu.
func (r *Registry) repo(name string) *repo {
	if r.repos[name] == nil {
		r.repos[name] = &repo{blobs: map[string][]byte{}, manifests: map[string]manifest{}}
	}
	return r.repos[name]
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/token" {
		r.token(w, req)
		return
	}
	body := &counter{ReadCloser: req.Body}
	req.Body = body
	cw := &counting{ResponseWriter: w, status: http.StatusOK}
	r.mu.Lock()
	r.active++
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.active--
		r.log = append(r.log, Request{req.Method, req.URL.Path, req.URL.RawQuery, cw.status, body.n, cw.n})
	}()
	if r.Token != "" && req.Header.Get("Authorization") != "Bearer "+r.Token {
		challenge := fmt.Sprintf("Bearer realm=%q,service=test", r.server.URL+"/token")
		if req.Header.Get("Authorization") != "" {
			challenge += `,error="invalid_token"`
		}
		cw.Header().Set("WWW-Authenticate", challenge)
		cw.WriteHeader(http.StatusUnauthorized)
		return
	}
	if r.Fault != nil && r.Fault(cw, req) {
		return
	}
	r.serve(cw, req)
}

// token gives a token to who has the password.
func (r *Registry) token(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodPost || req.FormValue("password") != "secret" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if r.Scopes != nil {
		r.Scopes(strings.Split(req.FormValue("scope"), " "))
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"access_token": r.Token, "expires_in": 3600})
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	path := strings.TrimPrefix(req.URL.Path, "/v2/")
	for _, kind := range []string{"/blobs/uploads/", "/blobs/", "/manifests/"} {
		name, what, ok := strings.Cut(path, kind)
		if !ok {
			continue
		}
		switch kind {
		case "/blobs/uploads/":
			r.upload(w, req, name, what)
		case "/blobs/":
			r.blob(w, req, name, what)
		default:
			r.manifest(w, req, name, what)
		}
		return
	}
	http.NotFound(w, req)
}

func (r *Registry) blob(w http.ResponseWriter, req *http.Request, name, dgst string) {
	p := r.Blob(name, digest.Digest(dgst))
	if p == nil {
		http.NotFound(w, req)
		return
	}
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(p))
}

func (r *Registry) manifest(w http.ResponseWriter, req *http.Request, name, tag string) {
	if req.Method == http.MethodPut {
		p, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		if missing := r.missing(name, p); missing != "" {
			refuse(w, http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", missing)
			return
		}
		r.mu.Lock()
		r.put(name, tag, req.Header.Get("Content-Type"), p)
		r.mu.Unlock()
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(p).String())
		w.WriteHeader(http.StatusCreated)
		return
	}
	mediaType, p := r.Manifest(name, tag)
	if p == nil {
		http.NotFound(w, req)
		return
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(p).String())
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(p))
}

// missing returns what a manifest refers to and isn't there, "" if there is nothing. Layers with URLs needn't be there.
func (r *Registry) missing(name string, p []byte) string {
	var m struct {
		Config    *ocispecs.Descriptor
		Layers    []ocispecs.Descriptor
		Manifests []ocispecs.Descriptor
	}
	if err := json.Unmarshal(p, &m); err != nil {
		return err.Error()
	}
	if m.Config != nil {
		m.Layers = append(m.Layers, *m.Config)
	}
	for _, l := range m.Layers {
		if len(l.URLs) == 0 && r.Blob(name, l.Digest) == nil {
			return l.Digest.String()
		}
	}
	for _, c := range m.Manifests {
		if _, p := r.Manifest(name, c.Digest.String()); p == nil {
			return c.Digest.String()
		}
	}
	return ""
}

func (r *Registry) upload(w http.ResponseWriter, req *http.Request, name, id string) {
	r.mu.Lock()
	of, known := r.uploads[id]
	r.mu.Unlock()
	if req.Method != http.MethodPost && (!known || of != name) {
		refuse(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", id)
		return
	}
	switch req.Method {
	case http.MethodPost:
		r.begin(w, name, req.URL.Query())
	case http.MethodPatch:
		if !r.append(w, req, name, id) {
			return
		}
		w.Header().Set("Location", req.URL.Path+"?state=more")
		w.WriteHeader(http.StatusAccepted)
	case http.MethodPut:
		if !r.append(w, req, name, id) {
			return
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		p := r.repo(name).blobs["upload "+id]
		dgst := req.URL.Query().Get("digest")
		if digest.FromBytes(p).String() != dgst {
			refuse(w, http.StatusBadRequest, "DIGEST_INVALID", dgst)
			return
		}
		r.forget(name, id)
		r.repo(name).blobs[dgst] = append([]byte{}, p...)
		if !r.Silent {
			w.Header().Set("Docker-Content-Digest", dgst)
		}
		w.WriteHeader(http.StatusCreated)
	case http.MethodDelete:
		r.mu.Lock()
		defer r.mu.Unlock()
		r.forget(name, id)
		w.WriteHeader(http.StatusNoContent)
	}
}

// append adds the body of a request to an upload. It reports whether it could.
func (r *Registry) append(w http.ResponseWriter, req *http.Request, name, id string) bool {
	p, err := io.ReadAll(req.Body)
	if err != nil {
		return false // broken off
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	had := r.repo(name).blobs["upload "+id]
	if at := req.Header.Get("Content-Range"); at != "" && at != fmt.Sprintf("%d-%d", len(had), len(had)+len(p)-1) {
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return false
	}
	r.repo(name).blobs["upload "+id] = append(had, p...)
	return true
}

func (r *Registry) begin(w http.ResponseWriter, name string, q url.Values) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p, ok := r.repo(q.Get("from")).blobs[q.Get("mount")]; ok && q.Get("mount") != "" {
		r.repo(name).blobs[q.Get("mount")] = p
		w.WriteHeader(http.StatusCreated)
		return
	}
	r.begun++
	id := fmt.Sprint(r.begun)
	r.uploads[id] = name
	w.Header().Set("Location", "/v2/"+name+"/blobs/uploads/"+id+"?state=none")
	w.WriteHeader(http.StatusAccepted)
}

func (r *Registry) forget(name, id string) {
	delete(r.uploads, id)
	delete(r.repo(name).blobs, "upload "+id)
}

// Blobs lists the digests of a repository's blobs, sorted.
func (r *Registry) Blobs(name string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.repo(name).blobs))
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}

type counter struct {
	io.ReadCloser
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n += int64(n)
	return n, err
}

type counting struct {
	http.ResponseWriter
	status int
	n      int64
}

func (c *counting) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n += int64(n)
	return n, err
}
