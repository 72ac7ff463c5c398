package convert

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/inspect"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"

	layerSize = 300 << 10
	small     = 16 << 10 // more than any configuration, and less than any layer
)

// tarOf makes a tar of one file that doesn't compress.
func tarOf(t *testing.T, name string) []byte {
	t.Helper()
	data := make([]byte, layerSize)
	seed := [32]byte{}
	copy(seed[:], name)
	_, _ = rand.NewChaCha8(seed).Read(data)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: layerSize, Typeflag: tar.TypeReg})); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t *testing.T, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(p)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A piece is a layer of a test's image.
type piece struct {
	tar, blob   []byte
	mediaType   string
	annotations map[string]string
	urls        []string
}

func plain(t *testing.T, name string) piece {
	p := tarOf(t, name)
	return piece{tar: p, blob: gzipped(t, p), mediaType: dockerLayer}
}

func lazy(t *testing.T, name string) piece {
	t.Helper()
	var b bytes.Buffer
	made, err := estargz.Write(t.Context(), &b, bytes.NewReader(tarOf(t, name)), estargz.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return piece{tar: inflate(t, b.Bytes()), blob: b.Bytes(), mediaType: ocispecs.MediaTypeImageLayerGzip, annotations: map[string]string{
		stargz.TOCJSONDigestAnnotation: made.TOCDigest.String(), "org.example.kept": "yes",
	}}
}

func inflate(t *testing.T, p []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// put adds an image, with fields that nobody knows, to the repository src.
func put(t *testing.T, reg *repositorytest.Registry, tag, platform, mediaType string, pieces ...piece) ocispecs.Descriptor {
	t.Helper()
	os, arch, _ := strings.Cut(platform, "/")
	var diffIDs, layers []string
	for _, p := range pieces {
		diffIDs = append(diffIDs, fmt.Sprintf("%q", digest.FromBytes(p.tar)))
		annotations, err := json.Marshal(p.annotations)
		if err != nil {
			t.Fatal(err)
		}
		extra := ""
		if p.urls != nil {
			extra = fmt.Sprintf(`,"urls":[%q]`, p.urls[0])
		} else {
			reg.PutBlob("src", p.blob)
		}
		if p.annotations != nil {
			extra += `,"annotations":` + string(annotations)
		}
		layers = append(layers, fmt.Sprintf(`{"mediaType":%q,"size":%d,"digest":%q%s}`, p.mediaType, len(p.blob), digest.FromBytes(p.blob), extra))
	}
	config := fmt.Appendf(nil, `{"unknown": {"a":  1.50, "b":"<&>"}, "architecture":%q,"os":%q,"created":"2026-01-02T03:04:05.678Z","history":[{"created_by":"x","extra":true}],"rootfs":{"type":"layers","more":[1, 2],"diff_ids":[%s]}}`,
		arch, os, strings.Join(diffIDs, ", "))
	configType := ocispecs.MediaTypeImageConfig
	if mediaType == dockerManifest {
		configType = dockerConfig
	}
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[%s],"annotations":{"z":"<1>","a":"2"}}`,
		mediaType, configType, reg.PutBlob("src", config), len(config), strings.Join(layers, ","))
	desc := reg.PutManifest("src", tag, mediaType, manifest)
	desc.Platform = &ocispecs.Platform{OS: os, Architecture: arch}
	return desc
}

func repo(t *testing.T, reg *repositorytest.Registry, name string) repository.Repository {
	t.Helper()
	return parsed(t, reg.Host+"/"+name, reg)
}

func parsed(t *testing.T, ref string, reg *repositorytest.Registry) repository.Repository {
	t.Helper()
	r, err := repository.Parse(ref, reg.Hosts())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func options() Options { return Options{Format: NewEStargz(estargz.WriteOptions{})} }

func state(t *testing.T, dir string) *State {
	t.Helper()
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func must(t *testing.T, src, dst repository.Repository, opt Options) Result {
	t.Helper()
	r, err := Convert(t.Context(), src, dst, opt)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func actions(r Result) (as []Action) {
	for _, l := range r.Layers {
		as = append(as, l.Action)
	}
	return as
}

// wantLazy fails if a layer of what a repository names isn't lazy.
func wantLazy(t *testing.T, r repository.Repository) inspect.Report {
	t.Helper()
	report, err := inspect.Inspect(t.Context(), r, inspect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if eager := report.Eager(); len(eager) > 0 {
		t.Errorf("eager: %q", eager)
	}
	return report
}
