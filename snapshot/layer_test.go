package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// testLayer is an eStargz blob.
type testLayer struct {
	blob        []byte
	digest, toc digest.Digest
}

// layerOf makes a layer of files with their contents; a name that ends in a slash
// is a directory of the time 0.
func layerOf(t testing.TB, files map[string][]byte) testLayer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		data := files[name]
		if strings.HasSuffix(name, "/") {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
				t.Fatal(err)
			}
			continue
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o640, Size: int64(len(data)), Uid: 7, Gid: 8, ModTime: time.Unix(1e9, 0)}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(buf.Bytes()), 0, int64(buf.Len())), estargz.WithCompressionLevel(1))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	data, err := io.ReadAll(b)
	if err != nil {
		t.Fatal(err)
	}
	return testLayer{data, digest.FromBytes(data), b.TOCDigest()}
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(b)
	return b
}

// registry serves blobs; answer, if set, replaces its answers.
type registry struct {
	*httptest.Server
	answer http.HandlerFunc

	mu    sync.Mutex
	blobs map[string][]byte
	errs  []error // of reads that were given up
}

func (r *registry) failed() []error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.errs)
}

func newRegistry(t testing.TB, answer http.HandlerFunc, layers ...testLayer) *registry {
	t.Helper()
	r := &registry{answer: answer, blobs: map[string][]byte{}}
	for _, l := range layers {
		r.blobs[l.digest.String()] = l.blob
	}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if r.answer != nil {
			r.answer(w, req)
			return
		}
		r.mu.Lock()
		data, ok := r.blobs[filepath.Base(req.URL.Path)]
		r.mu.Unlock()
		if !ok || !strings.HasPrefix(req.URL.Path, "/v2/team/image/blobs/") {
			http.NotFound(w, req)
			return
		}
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(func() {
		r.CloseClientConnections()
		r.Close()
	})
	return r
}

// spoil changes a layer's first frame, for good.
func (r *registry) spoil(l testLayer) {
	bad := bytes.Clone(l.blob)
	for i := 2000; i < 3000; i++ {
		bad[i] ^= 0xff
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[l.digest.String()] = bad
}

func (r *registry) host() string { return strings.TrimPrefix(r.URL, "http://") }

func (r *registry) labels(target string, l testLayer) map[string]string {
	return map[string]string{
		LabelTarget: target, LabelRef: r.host() + "/team/image:v1", LabelDigest: l.digest.String(),
		LabelLayers: l.digest.String(), LabelSizes: strconv.Itoa(len(l.blob)),
		estargz.TOCJSONDigestAnnotation: l.toc.String(),
	}
}

// options reads from the registry by its name.
func (r *registry) options(door string) Options {
	told := func(_ digest.Digest, err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.errs = append(r.errs, err)
	}
	return Options{
		Door: door,
		Hosts: func(ref reference.Spec, _ []string) ([]docker.RegistryHost, error) {
			return []docker.RegistryHost{{Client: r.Client(), Scheme: "http", Host: ref.Hostname(), Path: "/v2"}}, nil
		},
		Blob:  blob.Options{Failed: told},
		Watch: Watch{Denied: told},
		Fill:  fill.SchedulerOptions{Room: func(int64) bool { return true }}, // however full the disk is
	}
}

// newSnapshotter opens a snapshotter; the test fails if it leaves mounts.
func newSnapshotter(t *testing.T, opt Options) (s *Snapshotter, root string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
	root = t.TempDir()
	s, err := New(root, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if m := mountsBelow(t, root); len(m) > 0 {
			t.Errorf("mounts left: %q", m)
			_ = unmountBelow(root)
		}
	})
	return s, root
}

func mountsBelow(t *testing.T, root string) []string {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint)
	}
	return points
}

// names lists the snapshots there are.
func names(t *testing.T, s snapshots.Snapshotter) []string {
	t.Helper()
	var names []string
	if err := s.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return names
}
