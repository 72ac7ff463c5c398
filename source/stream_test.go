package source

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// A streamed is a bench of one lazy layer, and the server that has it.
type streamed struct {
	*bench
	blob    []byte
	desc    ocispecs.Descriptor
	corrupt int // how many answers have a wrong byte
	hits    int
}

func newStreamed(t *testing.T) *streamed {
	s := &streamed{bench: newBench(t, "lazy0"), blob: bytes.Repeat([]byte("a layer "), 100_000)}
	l := &s.plan.layers[0]
	l.desc.Digest, l.desc.Size = digest.FromBytes(s.blob), int64(len(s.blob))
	s.desc = l.desc
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.hits++
		p := s.blob
		if s.corrupt > 0 {
			s.corrupt--
			p = slices.Clone(p)
			p[len(p)/2] ^= 1
		}
		if want := "/v2/image/blobs/" + s.desc.Digest.String(); r.URL.Path != want {
			t.Errorf("request for %s, want %s", r.URL.Path, want)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(p))
	}))
	t.Cleanup(server.Close)
	s.opt.Hosts = func(_ reference.Spec, sessions []string) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{Client: server.Client(), Host: strings.TrimPrefix(server.URL, "http://"), Scheme: "http", Path: "/v2"}}, nil
	}
	return s
}

func (s *streamed) read() ([]byte, error) {
	ra, err := s.Stream(s.t.Context(), s.desc, nil)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	if ra.Size() != s.desc.Size {
		s.t.Errorf("size %d, want %d", ra.Size(), s.desc.Size)
	}
	return io.ReadAll(io.NewSectionReader(ra, 0, ra.Size()))
}

// A lazy layer is read by one request, and nothing of it is kept.
func TestStream(t *testing.T) {
	s := newStreamed(t)
	got, err := s.read()
	if err != nil || !bytes.Equal(got, s.blob) {
		t.Errorf("read %d bytes, %v; want %d", len(got), err, len(s.blob))
	}
	if s.hits != 1 {
		t.Errorf("%d requests", s.hits)
	}
	if _, err := s.opt.ContentStore.Info(t.Context(), s.desc.Digest); !cerrdefs.IsNotFound(err) {
		t.Errorf("the content store has it: %v", err)
	}
	s.wantLines(nil, "passing on layer "+s.desc.Digest.String()+" from registry.test/image")
}

// The receiver may ask for a part, or for the same again.
func TestStreamAnywhere(t *testing.T) {
	s := newStreamed(t)
	ra, err := s.Stream(t.Context(), s.desc, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1000)
	for _, off := range []int64{0, 1000, 500_000, 0, int64(len(s.blob)) - 1000} {
		if n, err := ra.ReadAt(p, off); n != len(p) || err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(p, s.blob[off:off+1000]) {
			t.Errorf("at %d: %d bytes, %v", off, n, err)
		}
	}
	if n, err := ra.ReadAt(p, int64(len(s.blob))-10); n != 10 || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %d bytes, %v", n, err)
	}
	if n, err := ra.ReadAt(p, int64(len(s.blob))); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("behind the end: %d bytes, %v", n, err)
	}
	if _, err := ra.ReadAt(p, -1); err == nil {
		t.Error("read in front of the start")
	}
	ra.Close()
	if _, err := ra.ReadAt(p, 0); err == nil {
		t.Error("read after it was closed")
	}
}

// Wrong bytes are an error before the receiver has them all; the first time it says that it's worth to try again.
func TestStreamCorrupt(t *testing.T) {
	s := newStreamed(t)
	s.corrupt = 3
	for i, temporary := range []bool{true, false, true} {
		got, err := s.read()
		if len(got) >= len(s.blob) {
			t.Errorf("attempt %d: all of %d bytes were handed on", i, len(got))
		}
		ne, ok := errors.AsType[net.Error](err)
		if !ok || ne.Temporary() != temporary || !strings.Contains(err.Error(), s.desc.Digest.String()) { //nolint:staticcheck // BuildKit asks it
			t.Errorf("attempt %d: %v, want one that is temporary: %t", i, err, temporary)
		}
	}
	if got, err := s.read(); err != nil || !bytes.Equal(got, s.blob) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// Then it's fetched from another host than the one that has sent them, which need not be the first.
func TestStreamCorruptAtAMirror(t *testing.T) {
	s := newStreamed(t)
	s.corrupt = 2
	mirrors := s.opt.Hosts
	empty := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(empty.Close)
	sound := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.blob))
	}))
	t.Cleanup(sound.Close)
	s.opt.Hosts = func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error) {
		hosts, err := mirrors(ref, sessions)
		first, last := hosts[0], hosts[0]
		first.Host, last.Host = strings.TrimPrefix(empty.URL, "http://"), strings.TrimPrefix(sound.URL, "http://")
		return []docker.RegistryHost{first, hosts[0], last}, err
	}
	if _, err := s.read(); err == nil {
		t.Error("corrupt bytes were taken")
	}
	if got, err := s.read(); err != nil || !bytes.Equal(got, s.blob) {
		t.Errorf("read again: %d bytes, %v", len(got), err)
	}
	if s.hits != 1 {
		t.Errorf("the corrupt mirror was asked %d times, want once", s.hits)
	}
}

// What can't be streamed is BuildKit's to provide; what must not be used is an error.
func TestStreamRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change   func(s *streamed)
		notFound bool
	}{
		"in the content store": {func(s *streamed) {
			if err := content.WriteBlob(context.Background(), s.opt.ContentStore, "x", bytes.NewReader(s.blob), s.desc); err != nil {
				s.t.Fatal(err)
			}
		}, true},
		"of a client's layout": {func(s *streamed) { s.plan.registry = false }, true},
		"nobody knows it":      {func(s *streamed) { s.desc.Digest = digest.FromString("another") }, true},
		"no hosts":             {func(s *streamed) { s.opt.Hosts = nil }, true},
		"refused":              {func(s *streamed) { s.plan.layers[0].refuse(errors.New("a bad one")) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStreamed(t)
			c.change(s)
			if _, err := s.Stream(t.Context(), s.desc, nil); err == nil || cerrdefs.IsNotFound(err) != c.notFound {
				t.Errorf("error %v", err)
			}
			if s.hits > 0 {
				t.Errorf("%d requests", s.hits)
			}
		})
	}
}

// Where layers have been pushed is kept with their origins, and outlives the daemon and the next FROM.
func TestPushed(t *testing.T) {
	b := newBench(t, "lazy0", "lazy1")
	md, top := records(t, b.plan)
	if err := b.rememberImage(t.Context(), b.plan, top); err != nil {
		t.Fatal(err)
	}
	for _, repository := range []string{"one.test/app", "two.test/app", "one.test/app"} {
		if err := b.Pushed(t.Context(), top, repository); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"one.test/app", "two.test/app"}
	if err := b.rememberImage(t.Context(), b.plan, top); err != nil {
		t.Fatal(err)
	}
	next := newBench(t)
	if err := next.origins.load(md); err != nil {
		t.Fatal(err)
	}
	for i := range b.plan.layers {
		dgst := b.plan.layers[i].desc.Digest
		for _, got := range [][]string{b.Repositories(dgst), next.Repositories(dgst)} {
			if !slices.Equal(got, want) {
				t.Errorf("layer %d: %q, want %q", i, got, want)
			}
		}
	}
	for range 2 * keepPushed {
		if err := b.Pushed(t.Context(), top, "test/"+digest.FromString(strings.Repeat("x", len(want))).Encoded()); err != nil {
			t.Fatal(err)
		}
		want = append(want, "")
	}
	if n := len(b.Repositories(b.plan.layers[0].desc.Digest)); n > keepPushed {
		t.Errorf("%d repositories are kept", n)
	}
	if got := b.Repositories("sha256:unknown"); got != nil {
		t.Errorf("%q have a blob that nobody knows", got)
	}
}
