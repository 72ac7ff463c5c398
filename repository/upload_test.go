package repository_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

// An upload that the registry ends early fails with what the registry says, and may be tried again if that helps.
func TestUploadRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		status    int
		body      string
		transient []bool // of the first upload, the second, …
		says      string
	}{
		"too large":      {http.StatusRequestEntityTooLarge, "", []bool{true, false}, "or a proxy in front of it, wants less: have it take more"},
		"unavailable":    {http.StatusServiceUnavailable, "", []bool{true, true}, "503"},
		"no PATCH":       {http.StatusMethodNotAllowed, "", []bool{true}, "405"},
		"unknown upload": {http.StatusNotFound, `{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}`, []bool{false, false}, "BLOB_UPLOAD_UNKNOWN"},
		"no right":       {http.StatusForbidden, "", []bool{false, false}, "docker login"},
	} {
		t.Run(name, func(t *testing.T) {
			reg := repositorytest.New(t)
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodPatch {
					return false
				}
				w.WriteHeader(tt.status)
				_, _ = io.WriteString(w, tt.body)
				return true
			}
			r := parse(t, reg.Host+"/a:1", reg.Hosts())
			for i, transient := range tt.transient {
				u, err := r.Create(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				data := make([]byte, 1<<20)
				for n := 0; err == nil && n < 100; n++ {
					_, err = u.Write(data)
				}
				status, ok := errors.AsType[*repository.StatusError](err)
				if !ok || status.Code != tt.status || repository.Transient(err) != transient || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("upload %d: error %v, transient %v; want status %d, transient %v", i, err, repository.Transient(err), tt.status, transient)
				}
				u.Cancel()
				if n := reg.Uploads(); n != 0 {
					t.Errorf("upload %d: %d uploads are left", i, n)
				}
			}
		})
	}
}

// Registries that don't take a blob in one stream are given it in chunks, those that don't know PATCH at once. So is a blob that is in memory.
func TestWays(t *testing.T) {
	data := make([]byte, 40<<20+7)
	for i := range data {
		data[i] = byte(i >> 12)
	}
	dgst := digest.FromBytes(data)
	isChunk := func(r *http.Request) bool { return r.Header.Get("Content-Range") != "" && r.ContentLength > 0 }
	for name, tt := range map[string]struct {
		refuse  func(r *http.Request) int
		least   string // OCI-Chunk-Min-Length
		tries   int
		patches []int64 // bytes of those that the last try makes
	}{
		"takes all":     {func(*http.Request) int { return 0 }, "", 1, []int64{40<<20 + 7}},
		"limited":       {func(r *http.Request) int { return refuse(r.ContentLength < 0 || r.ContentLength > 20<<20, 413) }, "", 2, []int64{16 << 20, 16 << 20, 8<<20 + 7}},
		"wants lengths": {func(r *http.Request) int { return refuse(r.ContentLength < 0, 411) }, "", 2, []int64{16 << 20, 16 << 20, 8<<20 + 7}},
		"wants ranges":  {func(r *http.Request) int { return refuse(!isChunk(r), 416) }, "", 2, []int64{16 << 20, 16 << 20, 8<<20 + 7}},
		"large chunks":  {func(r *http.Request) int { return refuse(!isChunk(r), 400) }, "20971520", 2, []int64{20 << 20, 20 << 20, 7}},
		"huge chunks":   {func(r *http.Request) int { return refuse(!isChunk(r), 400) }, "9223372036854775807", 2, []int64{40<<20 + 7}},
		"no PATCH":      {func(*http.Request) int { return 405 }, "", 2, nil},
		"unknown PATCH": {func(*http.Request) int { return 404 }, "", 2, nil},
		"nor in chunks": {func(r *http.Request) int {
			if isChunk(r) {
				return 405
			}
			return 413
		}, "", 3, nil},
	} {
		t.Run(name, func(t *testing.T) {
			reg := repositorytest.New(t)
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
				switch r.Method {
				case http.MethodPost:
					if tt.least != "" {
						w.Header().Set("OCI-Chunk-Min-Length", tt.least)
					}
				case http.MethodPatch:
					if status := tt.refuse(r); status != 0 {
						w.WriteHeader(status)
						return true
					}
				}
				return false
			}
			r := parse(t, reg.Host+"/a:1", reg.Hosts())
			upload := func() error {
				u, err := r.Create(t.Context())
				if err != nil {
					return err
				}
				defer u.Cancel()
				for p := range slices.Chunk(data, 700_000) {
					if _, err := u.Write(p); err != nil {
						return err
					}
				}
				return u.Commit(t.Context(), dgst, int64(len(data)))
			}
			tries := 1
			err := upload()
			for ; err != nil && repository.Transient(err) && tries < 5; tries++ {
				reg.Reset()
				err = upload()
			}
			if err != nil || tries != tt.tries {
				t.Fatalf("%d tries, want %d: %v", tries, tt.tries, err)
			}
			var patches []int64
			for _, q := range reg.Requests() {
				if q.Method == http.MethodPatch {
					patches = append(patches, q.Received)
				}
			}
			if !slices.Equal(patches, tt.patches) {
				t.Errorf("requests with %d bytes, want %d", patches, tt.patches)
			}
			if !bytes.Equal(reg.Blob("a", dgst), data) || reg.Uploads() != 0 {
				t.Errorf("the registry has %d bytes, and %d uploads", len(reg.Blob("a", dgst)), reg.Uploads())
			}
			reg.Reset()
			if err := upload(); err != nil {
				t.Errorf("the next one: %v", err)
			}
			small := ocispecs.Descriptor{Digest: digest.FromString("small"), Size: 5}
			if err := repository.Put(t.Context(), r, small, []byte("small")); err != nil || string(reg.Blob("a", small.Digest)) != "small" {
				t.Errorf("what is in memory: %v", err)
			}
		})
	}
}

func refuse(is bool, status int) int {
	if is {
		return status
	}
	return 0
}

// An upload that goes on elsewhere has no credentials there, and comes back with them; that its token has expired meanwhile is no matter.
func TestUploadElsewhere(t *testing.T) {
	for _, chunks := range []bool{false, true} {
		reg := repositorytest.New(t)
		reg.Token = "first"
		elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if a := r.Header.Get("Authorization"); a != "" {
				t.Errorf("%s elsewhere has %s", r.Method, a)
			}
			if chunks && r.Header.Get("Content-Range") == "" {
				w.WriteHeader(http.StatusLengthRequired)
				return
			}
			r.Header.Set("Authorization", "Bearer "+reg.Token)
			reg.ServeHTTP(&located{w, "http://" + reg.Host}, r)
			if r.Method == http.MethodPatch {
				reg.Token += "+" // the one that the client has is none any more
			}
		}))
		defer elsewhere.Close()
		reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				w.Header().Set("Elsewhere", elsewhere.URL)
			}
			return false
		}
		known := reg.Hosts()
		hosts := func(name string) ([]docker.RegistryHost, error) {
			hosts, err := known(name)
			hosts[0].Client = &http.Client{Transport: locating{}}
			return hosts, err
		}
		r, data := parse(t, reg.Host+"/a:1", hosts), bytes.Repeat([]byte("0123456789"), 1<<20)
		for tries := 0; ; tries++ {
			u, err := r.Create(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err = u.Write(data); err == nil {
				err = u.Commit(t.Context(), digest.FromBytes(data), int64(len(data)))
			}
			u.Cancel()
			if err == nil {
				break
			}
			if tries > 0 || !repository.Transient(err) {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(reg.Blob("a", digest.FromBytes(data)), data) {
			t.Error("it isn't there")
		}
	}
}

// located makes the location of an answer an absolute one.
type located struct {
	http.ResponseWriter
	at string
}

func (l *located) WriteHeader(status int) {
	if to := l.Header().Get("Location"); to != "" {
		l.Header().Set("Location", l.at+to)
	}
	l.ResponseWriter.WriteHeader(status)
}

// locating sends uploads that begin elsewhere.
type locating struct{}

func (locating) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err == nil && resp.Header.Get("Elsewhere") != "" {
		resp.Header.Set("Location", resp.Header.Get("Elsewhere")+resp.Header.Get("Location"))
	}
	return resp, err
}

// An upload ends well when the registry has what was sent, and not when it says that it has, and hasn't.
func TestCommitIsChecked(t *testing.T) {
	data := []byte("layer")
	desc := ocispecs.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
	for name, tt := range map[string]struct {
		header, has string // of the answers to PUT and HEAD
		err         string
	}{
		"it says so":            {desc.Digest.String(), "no", ""},
		"another digest":        {digest.FromString("other").String(), "no", "keeps the blob " + desc.Digest.String() + " as " + digest.FromString("other").String()},
		"another algorithm":     {digest.SHA512.FromBytes(data).String(), "5", ""},
		"silent":                {"", "5", ""},
		"silent, other size":    {"", "4", "has taken the blob " + desc.Digest.String() + " of 5 bytes, and hasn't got it"},
		"silent, hasn't got it": {"", "no", "hasn't got it"},
	} {
		t.Run(name, func(t *testing.T) {
			reg := repositorytest.New(t)
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case r.Method == http.MethodPut:
					if tt.header != "" {
						w.Header().Set("Docker-Content-Digest", tt.header)
					}
					w.WriteHeader(http.StatusCreated)
				case r.Method == http.MethodHead && tt.has == "no":
					w.WriteHeader(http.StatusNotFound)
				case r.Method == http.MethodHead:
					w.Header().Set("Content-Length", tt.has)
				default:
					return false
				}
				return true
			}
			u, err := parse(t, reg.Host+"/a:1", reg.Hosts()).Create(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := u.Write(data); err != nil {
				t.Fatal(err)
			}
			err = u.Commit(t.Context(), desc.Digest, desc.Size)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q in it", err, tt.err)
			}
		})
	}
}

// A cancelled context ends an upload, and the registry forgets it.
func TestUploadCancelled(t *testing.T) {
	reg := repositorytest.New(t)
	ctx, cancel := context.WithCancel(t.Context())
	u, err := parse(t, reg.Host+"/a:1", reg.Hosts()).Create(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write([]byte("some")); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := u.Commit(ctx, digest.FromString("some"), 4); err == nil {
		t.Error("a cancelled upload was committed")
	}
	if n := reg.Uploads(); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
}

// Small requests that fail are made again.
func TestRetry(t *testing.T) {
	reg := repositorytest.New(t)
	failed := map[string]bool{}
	reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPatch || failed[r.Method] {
			return false
		}
		failed[r.Method] = true
		w.WriteHeader(http.StatusBadGateway)
		return true
	}
	r := parse(t, reg.Host+"/a:1", reg.Hosts())
	if _, err := r.Has(t.Context(), ocispecs.Descriptor{Digest: digest.FromString("x")}); err != nil {
		t.Error(err)
	}
	if err := r.CheckPush(t.Context()); err != nil {
		t.Error(err)
	}
}
