package integration

import (
	"bytes"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestExportExternalTOC pushes an image and, before it, one with the tables of contents of its layers.
func TestExportExternalTOC(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", busybox(t), baseimage.EStargz)
	root := t.TempDir()
	d := startDaemon(t, daemon.Options{Config: "debug = true\n" + plainHTTP(reg), Root: root})
	dir := t.TempDir()
	writeFile(t, dir, "list", "/app/lib/30\n")
	export := func(t *testing.T, tag, attrs string) v1.Image {
		t.Helper()
		build(t, d, client.Solve{Dockerfile: prioritized(reg.Ref("base:estargz")), Context: dir, Outputs: imageTo(reg, tag, attrs)})
		return pull(t, reg, tag)
	}
	n := len(layerDigests(t, base))
	wantReadable := func(t *testing.T, tag string) v1.Image {
		t.Helper()
		img, tocs := pull(t, reg, tag), pull(t, reg, tag+"-esgztoc")
		if err := validate.Image(img); err != nil {
			t.Errorf("go-containerregistry: %v", err)
		}
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		kept, err := tocs.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		if len(kept.Layers) != len(m.Layers)-n {
			t.Errorf("there are %d tables of contents", len(kept.Layers))
		}
		for _, l := range m.Layers[n:] {
			i := slices.IndexFunc(kept.Layers, func(k v1.Descriptor) bool {
				return k.Annotations["containerd.io/snapshot/stargz/layer.digest"] == l.Digest.String()
			})
			if i < 0 {
				t.Fatalf("layer %s has no table of contents", l.Digest)
			}
			blob := layerBlob(t, img, l.Digest)
			r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))),
				estargz.WithDecompressors(externaltoc.NewGzipDecompressor(func() ([]byte, error) { return layerBlob(t, tocs, kept.Layers[i].Digest), nil })))
			if err != nil {
				t.Fatal(err)
			}
			if want := l.Annotations[estargz.TOCJSONDigestAnnotation]; want != r.TOCDigest().String() {
				t.Errorf("table of contents %s, the annotation has %s", r.TOCDigest(), want)
			}
			root, ok := r.Lookup("")
			if !ok {
				t.Fatal("there is no root")
			}
			wantChunks(t, r, tocNames(root, ""))
			if strings.Contains(string(gunzip(t, blob)), estargz.TOCTarName) {
				t.Error("the table of contents is in the layer, too")
			}
		}
		return img
	}
	wantLazy := func(t *testing.T, tag string) {
		t.Helper()
		o := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
		img := pull(t, reg, tag)
		reg.Log.Reset()
		res := build(t, o, client.Solve{Dockerfile: "FROM " + reg.Ref(tag) + "\nRUN cat /other && sha256sum /app/lib/30\n"})
		wantContains(t, "output", res.Output(), "unlisted")
		if rep := reportOf(t, res); rep.Images[0].Lazy != n+2 {
			t.Errorf("%d lazy layers: %+v", rep.Images[0].Lazy, rep)
		}
		layer := layerDigests(t, img)[n]
		if sent, size := reg.Log.BlobBytes()[layer], len(layerBlob(t, img, hash(t, layer))); sent > int64(size)/2 {
			t.Errorf("reading one file fetched %d bytes of %d", sent, size)
		}
	}

	reg.Log.Reset()
	img := export(t, "app:1", ",estargz-external-toc=true")
	puts := reg.Log.Entries(func(e registry.Entry) bool { return e.Method == http.MethodPut && e.Manifest() && e.Status < 300 })
	if len(puts) != 2 || !strings.HasSuffix(puts[0].Path, "/manifests/1-esgztoc") || !strings.HasSuffix(puts[1].Path, "/manifests/1") {
		t.Errorf("pushed %+v", puts)
	}
	wantReadable(t, "app:1")
	wantLazy(t, "app:1")

	t.Run("with a list", func(t *testing.T) {
		export(t, "app:2", ",estargz-external-toc=true,lazy-prioritize=list")
		wantFirst(t, wantReadable(t, "app:2"), n, "app/lib/30", estargz.PrefetchLandmark)
	})
	t.Run("rewritten", func(t *testing.T) {
		epoch := time.Unix(1_600_000_000, 0)
		for _, tag := range []string{"app:6", "app:7"} { // the second one is known
			build(t, d, client.Solve{
				Dockerfile: prioritized(reg.Ref("base:estargz")), BuildArgs: []string{"SOURCE_DATE_EPOCH=1600000000"},
				Outputs: imageTo(reg, tag, ",estargz-external-toc=true,rewrite-timestamp=true"),
			})
			for _, h := range layerHeaders(t, wantReadable(t, tag), hash(t, layerDigests(t, pull(t, reg, tag))[n])) {
				if h.time.After(epoch) {
					t.Errorf("%s: %s is of %s", tag, h.name, h.time)
				}
			}
		}
		wantLazy(t, "app:6")
	})
	t.Run("inside again", func(t *testing.T) {
		inside := export(t, "app:3", "")
		wantEStargz(t, inside)
		if got, want := inOrder(t, inside, n), inOrder(t, img, n); !slices.Equal(got, want) {
			t.Errorf("files %q, want %q", got, want)
		}
	})
	t.Run("as gzip", func(t *testing.T) {
		build(t, d, client.Solve{Dockerfile: prioritized(reg.Ref("base:estargz")), Outputs: []string{"type=image,name=" + reg.Ref("app:4") + ",push=true,oci-mediatypes=true"}})
		m, err := pull(t, reg, "app:4").Manifest()
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range m.Layers[n:] {
			if toc, ok := l.Annotations[estargz.TOCJSONDigestAnnotation]; ok {
				t.Errorf("layer %d promises a table of contents, %s, which is nowhere", i, toc)
			}
		}
	})
	t.Run("on a base of ours, with an inline cache", func(t *testing.T) {
		build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN echo a > /a\nRUN echo b > /b\n", Outputs: imageTo(reg, "ours:1", "")})
		before := conversions(d)
		build(t, d, client.Solve{
			Dockerfile: "FROM " + reg.Ref("ours:1") + "\nRUN echo c > /c\n", Outputs: imageTo(reg, "ours:2", ",estargz-external-toc=true"), CacheTo: []string{"type=inline"},
		})
		kept, err := pull(t, reg, "ours:2-esgztoc").Manifest()
		if err != nil {
			t.Fatal(err)
		}
		if converted := conversions(d) - before; len(kept.Layers) != 1 || converted != 0 {
			t.Errorf("there are %d tables of contents, want 1, and %d layers were converted", len(kept.Layers), converted)
		}
	})
	t.Run("no place for it", func(t *testing.T) {
		got := buildFails(t, d, client.Solve{Dockerfile: "FROM scratch\n", Outputs: []string{"type=oci,dest=" + filepath.Join(dir, "x") + ",compression=estargz,estargz-external-toc=true"}})
		wantContains(t, "error", got, "estargz-external-toc is for the image exporter only", "oci exporter")
	})
	t.Run("after a restart", func(t *testing.T) {
		stopDaemon(t, d)
		d = startDaemon(t, daemon.Options{Config: plainHTTP(reg), Root: root})
		again := export(t, "app:5", ",estargz-external-toc=true")
		wantReadable(t, "app:5")
		if !slices.Equal(layerDigests(t, again), layerDigests(t, img)) {
			t.Errorf("layers %v, want %v", layerDigests(t, again), layerDigests(t, img))
		}
	})
}
