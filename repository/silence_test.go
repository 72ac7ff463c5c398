package repository

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

// quiet is how long the registries of these tests may be silent.
const quiet = time.Second

func patientRegistry(t *testing.T, reg *repositorytest.Registry) *registry {
	t.Helper()
	r, err := newRegistry(reg.Host+"/a:1", patient(reg.Hosts(), quiet))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// An upload to a registry that takes no more bytes, or never says that it has all of them, fails, and may be tried again.
func TestSilentRegistry(t *testing.T) {
	for name, tt := range map[string]struct {
		method string
		pieces int // of 1 MiB: more than sockets hold, or some
	}{"takes nothing": {http.MethodPatch, 100}, "doesn't answer": {http.MethodPut, 1}} {
		t.Run(name, func(t *testing.T) {
			reg := repositorytest.New(t)
			over := make(chan struct{})
			t.Cleanup(func() { close(over) })
			var silent atomic.Int64
			reg.Fault = func(_ http.ResponseWriter, req *http.Request) bool {
				if req.Method != tt.method {
					return false
				}
				silent.Add(1)
				<-over
				return true
			}
			start := time.Now()
			u, err := patientRegistry(t, reg).Create(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer u.Cancel()
			data := bytes.Repeat([]byte("x"), 1<<20)
			for n := 0; err == nil && n < tt.pieces; n++ {
				_, err = u.Write(data)
			}
			if err == nil {
				all := bytes.Repeat(data, tt.pieces)
				err = u.Commit(t.Context(), digest.FromBytes(all), int64(len(all)))
			}
			if err == nil || !Transient(err) || !strings.Contains(err.Error(), "neither taken nor sent a byte") {
				t.Errorf("%v, transient: %v; want that the registry is silent", err, Transient(err))
			}
			if n := silent.Load(); n == 0 {
				t.Error("the registry wasn't asked")
			}
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

// Who makes the bytes may take longer than a registry may be silent.
func TestSlowUpload(t *testing.T) {
	reg := repositorytest.New(t)
	u, err := patientRegistry(t, reg).Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer u.Cancel()
	for range 3 {
		if _, err := u.Write([]byte("bytes")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * quiet)
	}
	all := []byte("bytesbytesbytes")
	if err := u.Commit(t.Context(), digest.FromBytes(all), int64(len(all))); err != nil {
		t.Fatal(err)
	}
}

// An answer may stop in the middle, and may be read slowly.
func TestSilentAnswer(t *testing.T) {
	over := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.WriteString(w, "half")
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		if req.URL.Path == "/stops" {
			<-over
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(over) })
	hosts, err := patient(func(string) ([]docker.RegistryHost, error) { return []docker.RegistryHost{{}}, nil }, quiet)("")
	if err != nil {
		t.Fatal(err)
	}
	for path, wrong := range map[string]bool{"/stops": true, "/ends": false} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := hosts[0].Client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * quiet)
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(got) != "half" || (err != nil) != wrong || wrong && !strings.Contains(err.Error(), "neither taken nor sent a byte") {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
}
