package inspect

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

// entry is a file, or a directory if its name ends in a slash.
type entry struct {
	name string
	mode int64
}

func tarOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h, content := &tar.Header{Name: e.name, Mode: e.mode, Typeflag: tar.TypeReg}, e.name
		switch {
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag, content = tar.TypeDir, ""
		case strings.HasSuffix(e.name, ".landmark"):
			content = "\x0f"
		}
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func lazy(t *testing.T, reg *repositorytest.Registry, entries ...entry) ocispecs.Descriptor {
	t.Helper()
	var b bytes.Buffer
	w, err := estargz.Write(t.Context(), &b, bytes.NewReader(tarOf(t, entries...)), estargz.WriteOptions{MinChunkSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	return ocispecs.Descriptor{
		MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: reg.PutBlob("im", b.Bytes()), Size: int64(b.Len()),
		Annotations: map[string]string{stargz.TOCJSONDigestAnnotation: w.TOCDigest.String()},
	}
}

func plain(t *testing.T, reg *repositorytest.Registry, entries ...entry) ocispecs.Descriptor {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(tarOf(t, entries...)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: reg.PutBlob("im", b.Bytes()), Size: int64(b.Len())}
}

func image(t *testing.T, reg *repositorytest.Registry, tag, arch string, layers ...ocispecs.Descriptor) ocispecs.Descriptor {
	t.Helper()
	config, err := json.Marshal(ocispecs.Image{Platform: ocispecs.Platform{OS: "linux", Architecture: arch}})
	if err != nil {
		t.Fatal(err)
	}
	desc := reg.PutManifest("im", tag, ocispecs.MediaTypeImageManifest, ocispecs.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		Config:    ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageConfig, Digest: reg.PutBlob("im", config), Size: int64(len(config))},
		Layers:    layers,
	})
	desc.Platform = &ocispecs.Platform{OS: "linux", Architecture: arch}
	return desc
}

func look(t *testing.T, reg *repositorytest.Registry, tag string, wanted ...ocispecs.Platform) (Report, error) {
	t.Helper()
	r, err := repository.Parse(reg.Host+"/im:"+tag, reg.Hosts())
	if err != nil {
		t.Fatal(err)
	}
	return Inspect(t.Context(), r, Options{Platforms: wanted})
}

func TestInspect(t *testing.T) {
	reg := repositorytest.New(t)
	good := lazy(t, reg, entry{"a/", 0o755}, entry{"a/b", 0o644}, entry{"c/d", 0o644})
	image(t, reg, "one", "amd64", good)
	r, err := look(t, reg, "one")
	if err != nil {
		t.Fatal(err)
	}
	l := r.Images[0].Layers[0]
	if l.Format != "estargz" || l.Size != good.Size || l.TOCSize == 0 || l.TOCSize >= l.Size || l.TOCDigest.String() != good.Annotations[stargz.TOCJSONDigestAnnotation] {
		t.Errorf("%+v", l)
	}
	if l.Entries != 3 || l.Chunks != 2 || l.Frames != 2 || l.Landmark != None {
		t.Errorf("%d entries, %d chunks, %d frames, landmark %s; want 3, 2, 2, none", l.Entries, l.Chunks, l.Frames, l.Landmark)
	}
}

func TestLandmarks(t *testing.T) {
	reg := repositorytest.New(t)
	file := entry{"file", 0o644}
	for want, entries := range map[string][]entry{
		None:       {file},
		NoPrefetch: {{".no.prefetch.landmark", 0o644}, file},
		Prefetch:   {file, {".prefetch.landmark", 0o644}, {"other", 0o644}},
	} {
		layer := lazy(t, reg, entries...)
		image(t, reg, "it", "amd64", layer)
		r, err := look(t, reg, "it")
		if err != nil {
			t.Fatal(err)
		}
		if l := r.Images[0].Layers[0]; l.Landmark != want || (l.Prefetch > 0) != (want == Prefetch) || l.Prefetch >= layer.Size {
			t.Errorf("landmark %s with %d bytes in front of it, want %s", l.Landmark, l.Prefetch, want)
		}
	}
}

// What the manifest says a layer is, is said of layers that aren't lazy, too.
func TestFormats(t *testing.T) {
	reg := repositorytest.New(t)
	var blob bytes.Buffer
	w, err := zstdchunked.Write(t.Context(), &blob, bytes.NewReader(tarOf(t, entry{"a/", 0o755}, entry{"a/b", 0o644}, entry{"c", 0o644})), zstdchunked.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	chunked := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerZstd, Digest: reg.PutBlob("im", blob.Bytes()), Size: w.Size, Annotations: w.Annotations}
	of := func(mediaType string) ocispecs.Descriptor {
		return ocispecs.Descriptor{MediaType: mediaType, Digest: chunked.Digest, Size: chunked.Size}
	}
	for _, tt := range []struct {
		layer          ocispecs.Descriptor
		format, reason string
	}{
		{chunked, "zstd:chunked", ""},
		{of(ocispecs.MediaTypeImageLayerZstd), "zstd", "no table of contents"},
		{of(ocispecs.MediaTypeImageLayerGzip), "gzip", "no table of contents"},
		{of("application/vnd.docker.image.rootfs.diff.tar.gzip"), "gzip", "no table of contents"},
		{of(ocispecs.MediaTypeImageLayer), "tar", "no table of contents"},
		{of("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "foreign", "no table of contents"},
		{of(ocispecs.MediaTypeImageLayerGzip + "+encrypted"), "encrypted", "it is encrypted"},
		{of("application/vnd.oci.image.layer.v2.squashfs"), "application/vnd.oci.image.layer.v2.squashfs", "no table of contents"},
	} {
		image(t, reg, "it", "amd64", tt.layer)
		r, err := look(t, reg, "it")
		if err != nil {
			t.Fatal(err)
		}
		l := r.Images[0].Layers[0]
		if l.Format != tt.format || l.Lazy != (tt.reason == "") || l.Reason != tt.reason {
			t.Errorf("%s: format %q, lazy %t, %q; want %q, %q", tt.layer.MediaType, l.Format, l.Lazy, l.Reason, tt.format, tt.reason)
		}
		if l.Lazy && (l.Entries != 3 || l.Chunks != 2 || l.TOCSize == 0 || l.Landmark != None) {
			t.Errorf("%+v", l)
		}
	}
}

func TestReasons(t *testing.T) {
	reg := repositorytest.New(t)
	annotated := func(d ocispecs.Descriptor, toc string) ocispecs.Descriptor {
		d.Annotations = map[string]string{stargz.TOCJSONDigestAnnotation: toc}
		return d
	}
	some := digest.FromString("another").String()
	file := entry{"file", 0o644}
	for _, tt := range []struct {
		name   string
		layers []ocispecs.Descriptor
		lazy   int
		reason string // of the last layer
	}{
		{"lazy", []ocispecs.Descriptor{lazy(t, reg, file)}, 1, ""},
		{"plain", []ocispecs.Descriptor{plain(t, reg, file)}, 0, "no table of contents"},
		{"lazy above plain", []ocispecs.Descriptor{plain(t, reg, file), lazy(t, reg, file)}, 1, ""},
		{"no digest", []ocispecs.Descriptor{annotated(plain(t, reg, file), "x")}, 0, `its TOC digest annotation "x" is no digest`},
		{"not eStargz", []ocispecs.Descriptor{annotated(plain(t, reg, file), some)}, 0, "its table of contents can't be used: no eStargz footer"},
		{"another table", []ocispecs.Descriptor{annotated(lazy(t, reg, file), some)}, 0, "TOC digest mismatch"},
		{"hides", []ocispecs.Descriptor{lazy(t, reg, entry{"tmp/", 0o777}), lazy(t, reg, entry{"tmp/x", 0o644})}, 1, "it has no entry for the directory /tmp, whose mode 0777"},
		{"hides nothing", []ocispecs.Descriptor{lazy(t, reg, entry{"opt/", 0o755}), lazy(t, reg, entry{"opt/x", 0o644})}, 2, ""},
		{"gone", []ocispecs.Descriptor{annotated(ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: digest.FromString("gone"), Size: 5000, URLs: []string{"x"}}, some)}, 0, "404 Not Found"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image(t, reg, "it", "amd64", tt.layers...)
			r, err := look(t, reg, "it")
			if err != nil {
				t.Fatal(err)
			}
			im := r.Images[0]
			last := im.Layers[len(im.Layers)-1]
			if im.Lazy != tt.lazy || last.Lazy != (tt.reason == "") || !strings.Contains(last.Reason, tt.reason) {
				t.Errorf("%d lazy layers, the last one %v: %q; want %d, %q", im.Lazy, last.Lazy, last.Reason, tt.lazy, tt.reason)
			}
			if got, want := len(r.Eager()), len(im.Layers)-tt.lazy; got != want {
				t.Errorf("%d eager layers, want %d", got, want)
			}
		})
	}
}

func TestNoRanges(t *testing.T) {
	reg := repositorytest.New(t)
	layer := lazy(t, reg, entry{"file", 0o644})
	image(t, reg, "it", "amd64", layer)
	reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, layer.Digest.String()) {
			return false
		}
		_, _ = w.Write(reg.Blob("im", layer.Digest))
		return true
	}
	r, err := look(t, reg, "it")
	if err != nil || r.Images[0].Layers[0].Reason != "the registry answered 200 to a range request" {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestPlatforms(t *testing.T) {
	reg := repositorytest.New(t)
	amd, arm := image(t, reg, "", "amd64", lazy(t, reg, entry{"amd", 0o644})), image(t, reg, "", "arm64", plain(t, reg, entry{"arm", 0o644}))
	attestation := reg.PutManifest("im", "", ocispecs.MediaTypeImageManifest, ocispecs.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}})
	attestation.Platform = &ocispecs.Platform{OS: "unknown", Architecture: "unknown"}
	attestation.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": amd.Digest.String()}
	reg.PutManifest("im", "all", ocispecs.MediaTypeImageIndex, ocispecs.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispecs.Descriptor{amd, arm, attestation},
	})
	r, err := look(t, reg, "all")
	if err != nil || len(r.Images) != 2 || r.Images[0].Platform != "linux/amd64" || r.Images[1].Platform != "linux/arm64" {
		t.Fatalf("%+v, %v", r, err)
	}
	if eager := r.Eager(); len(eager) != 1 || !strings.HasSuffix(eager[0], "of linux/arm64: no table of contents") {
		t.Errorf("eager: %q", eager)
	}
	if r, err = look(t, reg, "all", ocispecs.Platform{OS: "linux", Architecture: "amd64"}); err != nil || len(r.Images) != 1 || len(r.Eager()) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	_, err = look(t, reg, "all", ocispecs.Platform{OS: "linux", Architecture: "riscv64"})
	if err == nil || !strings.Contains(err.Error(), "has no image for linux/riscv64, but for linux/amd64, linux/arm64") {
		t.Errorf("error %v", err)
	}
}

func TestNoImage(t *testing.T) {
	reg := repositorytest.New(t)
	if _, err := look(t, reg, "nothing"); err == nil || !strings.Contains(err.Error(), "im:nothing") {
		t.Errorf("error %v", err)
	}
	empty := reg.PutBlob("im", []byte("{}"))
	reg.PutManifest("im", "chart", ocispecs.MediaTypeImageManifest, ocispecs.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, Config: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeEmptyJSON, Digest: empty, Size: 2},
	})
	if _, err := look(t, reg, "chart"); err == nil || !strings.Contains(err.Error(), "is no container image: it's "+ocispecs.MediaTypeEmptyJSON) {
		t.Errorf("error %v", err)
	}
}

func TestCancelled(t *testing.T) {
	reg := repositorytest.New(t)
	image(t, reg, "it", "amd64", lazy(t, reg, entry{"file", 0o644}))
	r, err := repository.Parse(reg.Host+"/im:it", reg.Hosts())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Inspect(ctx, r, Options{}); err == nil {
		t.Error("a cancelled inspection succeeded")
	}
}
