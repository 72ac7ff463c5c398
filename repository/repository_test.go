package repository_test

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

func parse(t *testing.T, ref string, hosts repository.Hosts) repository.Repository {
	t.Helper()
	r, err := repository.Parse(ref, hosts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestParse(t *testing.T) {
	for _, tt := range []struct{ in, want, tag, err string }{
		{in: "busybox", want: "docker.io/library/busybox:latest", tag: "latest"},
		{in: "localhost:5000/a/b:1", want: "localhost:5000/a/b:1", tag: "1"},
		{in: "a.example/b@" + digest.FromString("").String(), want: "a.example/b@" + digest.FromString("").String()},
		{in: "oci-layout:///d/e", want: "oci-layout:///d/e", tag: "latest"},
		{in: "oci-layout://d:1/e:tag", want: "oci-layout://d:1/e:tag", tag: "tag"},
		{in: "oci-layout://d@" + digest.FromString("").String(), want: "oci-layout://d@" + digest.FromString("").String()},
		{in: "oci-layout://d@sha256:12", err: `digest "sha256:12"`},
		{in: "oci-layout://:tag", err: "no directory"},
		{in: "oci-layout://d:", err: "the tag is empty"},
		{in: "docker-archive://x", err: "unknown scheme docker-archive"},
		{in: "a/UPPER", err: "must be lowercase"},
	} {
		r, err := repository.Parse(tt.in, nil)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: error %v, want %q in it", tt.in, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.in, err)
		} else if r.String() != tt.want || r.Tag() != tt.tag {
			t.Errorf("%s: %s with the tag %q, want %s with %q", tt.in, r, r.Tag(), tt.want, tt.tag)
		}
	}
}

// Both kinds keep what Repository says.
func TestRepository(t *testing.T) {
	for name, start := range map[string]func(t *testing.T) repository.Repository{
		"registry": func(t *testing.T) repository.Repository {
			reg := repositorytest.New(t)
			t.Cleanup(func() {
				if n := reg.Uploads(); n > 0 {
					t.Errorf("%d uploads are left", n)
				}
			})
			return parse(t, reg.Host+"/a/b:tag", reg.Hosts())
		},
		"registry with tokens": func(t *testing.T) repository.Repository {
			reg := repositorytest.New(t)
			reg.Token = "t0ken"
			return parse(t, reg.Host+"/a/b:tag", reg.Hosts())
		},
		"layout": func(t *testing.T) repository.Repository {
			dir := t.TempDir()
			t.Cleanup(func() {
				if left, err := filepath.Glob(dir + "/ingest*"); len(left) > 0 {
					t.Errorf("left: %q %v", left, err)
				}
			})
			return parse(t, "oci-layout://"+dir+":tag", nil)
		},
	} {
		t.Run(name, func(t *testing.T) { testRepository(t, start(t)) })
	}
}

func testRepository(t *testing.T, r repository.Repository) {
	ctx := t.Context()
	if _, err := r.Resolve(ctx); !errdefs.IsNotFound(err) {
		t.Errorf("Resolve of nothing: %v", err)
	}
	if err := r.CheckPush(ctx); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
	has := func(want bool) {
		t.Helper()
		if got, err := r.Has(ctx, desc); err != nil || got != want {
			t.Errorf("Has: %v, %v", got, err)
		}
	}
	has(false)

	u, err := r.Create(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(data[:1000]); err != nil {
		t.Fatal(err)
	}
	u.Cancel()
	u.Cancel()
	has(false)

	if u, err = r.Create(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(u, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	if err := u.Commit(ctx, digest.FromString("another"), desc.Size); err == nil {
		t.Error("a blob was committed under a wrong digest")
	}
	has(false)

	for range 2 { // it may be there already
		if u, err = r.Create(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(u, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		if err := u.Commit(ctx, desc.Digest, desc.Size); err != nil {
			t.Fatal(err)
		}
		u.Cancel()
		has(true)
	}

	got, err := repository.ReadAll(ctx, r, desc, desc.Size)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("ReadAll: %d bytes, %v", len(got), err)
	}
	if _, err := repository.ReadAll(ctx, r, desc, desc.Size-1); err == nil {
		t.Error("a blob over the limit was read")
	}
	at, err := r.ReaderAt(ctx, desc)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100)
	if _, err := at.ReadAt(p, 5000); err != nil || !bytes.Equal(p, data[5000:5100]) {
		t.Errorf("ReadAt: %q, %v", p, err)
	}
	at.Close()

	manifest := []byte(`{"schemaVersion":2,"layers":[]}`)
	mdesc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	if err := r.PutManifest(ctx, mdesc, manifest, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Resolve(ctx); !errdefs.IsNotFound(err) {
		t.Errorf("Resolve before anything is tagged: %v", err)
	}
	if err := r.PutManifest(ctx, mdesc, manifest, r.Tag()); err != nil {
		t.Fatal(err)
	}
	resolved, err := r.Resolve(ctx)
	if err != nil || resolved.Digest != mdesc.Digest || resolved.Size != mdesc.Size || resolved.MediaType != mdesc.MediaType {
		t.Errorf("Resolve: %+v, %v; want %+v", resolved, err, mdesc)
	}
	if got, err := repository.ReadAll(ctx, r, resolved, repository.MaxManifest); err != nil || !bytes.Equal(got, manifest) {
		t.Errorf("manifest %q, %v", got, err)
	}
}

func TestLayoutByDigest(t *testing.T) {
	dir := t.TempDir()
	manifest := []byte(`{"schemaVersion":2,"manifests":[]}`)
	desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	if err := parse(t, "oci-layout://"+dir, nil).PutManifest(t.Context(), desc, manifest, "x"); err != nil {
		t.Fatal(err)
	}
	// The only image needs no tag.
	for _, ref := range []string{"oci-layout://" + dir, "oci-layout://" + dir + "@" + desc.Digest.String()} {
		if got, err := parse(t, ref, nil).Resolve(t.Context()); err != nil || got.Digest != desc.Digest || got.MediaType != desc.MediaType {
			t.Errorf("%s: %+v, %v", ref, got, err)
		}
	}
	_, err := parse(t, "oci-layout://"+dir+":other", nil).Resolve(t.Context())
	if err == nil || !strings.Contains(err.Error(), `no image of the layout has the tag "other"; it has "x"`) {
		t.Errorf("error %v doesn't name the tags that there are", err)
	}
	if err := parse(t, "oci-layout://"+dir+"@"+desc.Digest.String(), nil).CheckPush(t.Context()); err == nil {
		t.Error("a digest is a destination")
	}
}

func TestMount(t *testing.T) {
	reg := repositorytest.New(t)
	reg.Token = "t0ken"
	var scopes []string
	reg.Scopes = func(s []string) { scopes = append(scopes, s...) }
	data := []byte("layer")
	desc := ocispecs.Descriptor{Digest: reg.PutBlob("src", data), Size: int64(len(data))}
	src, dst := parse(t, reg.Host+"/src:1", reg.Hosts()), parse(t, reg.Host+"/dst:1", reg.Hosts())
	if ok, err := dst.Mount(t.Context(), desc, src); !ok || err != nil {
		t.Errorf("Mount: %v, %v", ok, err)
	}
	if reg.Blob("dst", desc.Digest) == nil {
		t.Error("the blob isn't there")
	}
	for _, want := range []string{"repository:dst:pull,push", "repository:src:pull"} {
		if !slices.Contains(scopes, want) {
			t.Errorf("no token for %s, but for %q", want, scopes)
		}
	}
	gone := ocispecs.Descriptor{Digest: digest.FromString("nowhere"), Size: 7}
	if ok, err := dst.Mount(t.Context(), gone, src); ok || err != nil {
		t.Errorf("Mount of what isn't there: %v, %v", ok, err)
	}
	if n := reg.Uploads(); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
	if ok, err := dst.Mount(t.Context(), desc, parse(t, "oci-layout:///nowhere", nil)); ok || err != nil {
		t.Errorf("Mount out of a layout: %v, %v", ok, err)
	}
}

// What isn't a layout is told from one, before anything is written.
func TestNoLayout(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "image.tar")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := parse(t, "oci-layout://"+file, nil).Resolve(t.Context()); err == nil || !strings.Contains(err.Error(), "unpack first") {
		t.Errorf("of a file: %v", err)
	}
	if err := parse(t, "oci-layout://"+file+":1", nil).CheckPush(t.Context()); err == nil || !strings.Contains(err.Error(), "it is a file; name a directory") {
		t.Errorf("to a file: %v", err)
	}
	if err := parse(t, "oci-layout://"+dir, nil).CheckPush(t.Context()); err == nil || !strings.Contains(err.Error(), "is no OCI layout, and has other files in it, such as image.tar") {
		t.Errorf("to a directory of other files: %v", err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("there are %v, %v", names, err)
	}
	// What a conversion has left that was killed is none of these.
	if err := os.MkdirAll(filepath.Join(dir, "new", "ingest"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := parse(t, "oci-layout://"+dir+"/new", nil).CheckPush(t.Context()); err != nil {
		t.Errorf("to one that was begun: %v", err)
	}
}

// Without credentials, or with others, the error says what to do.
func TestNoCredentials(t *testing.T) {
	reg := repositorytest.New(t)
	reg.Token = "t0ken"
	hosts := func(string) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{
			Client: http.DefaultClient, Host: reg.Host, Scheme: "http", Path: "/v2", Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush,
			Authorizer: docker.NewDockerAuthorizer(),
		}}, nil
	}
	_, err := parse(t, reg.Host+"/a:1", hosts).Resolve(t.Context())
	if err == nil || !strings.Contains(err.Error(), "docker login "+reg.Host) {
		t.Errorf("error %v", err)
	}
	if err := parse(t, reg.Host+"/a:1", hosts).CheckPush(t.Context()); err == nil || !strings.Contains(err.Error(), "there is no right to write there: `docker login "+reg.Host) {
		t.Errorf("to write: error %v", err)
	}
}

func TestNoRightToPush(t *testing.T) {
	reg := repositorytest.New(t)
	reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, `{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}`)
		return true
	}
	err := parse(t, reg.Host+"/a:1", reg.Hosts()).CheckPush(t.Context())
	for _, want := range []string{reg.Host + "/a:1", "403 Forbidden", "DENIED", "docker login " + reg.Host} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q in it", err, want)
		}
	}
	if repository.Transient(err) {
		t.Error("it will not succeed later")
	}
}

func TestCorruptManifest(t *testing.T) {
	dir := t.TempDir()
	r := parse(t, "oci-layout://"+dir+":1", nil)
	manifest := []byte(`{"schemaVersion":2}`)
	desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	if err := r.PutManifest(t.Context(), desc, manifest, "1"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "blobs/sha256", desc.Digest.Encoded())
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(`{"schemaVersion":3}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := repository.ReadAll(t.Context(), r, desc, 1<<20); err == nil || !strings.Contains(err.Error(), "is corrupt") {
		t.Errorf("error %v", err)
	}
}
