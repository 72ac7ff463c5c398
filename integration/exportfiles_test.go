package integration

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestExportOCITar writes OCI archives and directories.
func TestExportOCITar(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	out := filepath.Join(t.TempDir(), "image.tar")
	build(t, d, client.Solve{
		Dockerfile: exportDockerfile(reg.Ref("base:estargz")),
		Outputs:    []string{"type=oci,name=app:1,compression=estargz,dest=" + out},
	})
	dir := t.TempDir()
	if msg, err := exec.CommandContext(t.Context(), "tar", "-xf", out, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("tar -x: %v\n%s", err, msg)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	im, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(im.Manifests) != 1 {
		t.Fatalf("%d manifests in the layout", len(im.Manifests))
	}
	img, err := index.Image(im.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	files := wantEStargz(t, img)
	for _, f := range []string{"new/a", "big/3"} {
		wantFile(t, files, f)
	}

	t.Run("tar=false", func(t *testing.T) {
		dir := t.TempDir()
		build(t, d, client.Solve{
			Dockerfile: exportDockerfile(reg.Ref("base:estargz")),
			Outputs:    []string{"type=oci,tar=false,compression=estargz,dest=" + dir},
		})
		index, err := layout.ImageIndexFromPath(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Index(index); err != nil {
			t.Error(err)
		}
	})
}

// TestExportDocker writes an archive for docker load, which another reader opens.
func TestExportDocker(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 2<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	for _, compression := range []string{"", ",compression=gzip", ",compression=estargz"} {
		t.Run(strings.TrimPrefix(compression, ","), func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "image.tar")
			build(t, d, client.Solve{
				Dockerfile: exportDockerfile(reg.Ref("base:estargz")),
				Outputs:    []string{"type=docker,name=example.test/app:1,dest=" + out + compression},
			})
			tag, err := name.NewTag("example.test/app:1")
			if err != nil {
				t.Fatal(err)
			}
			img, err := tarball.ImageFromPath(out, &tag)
			if err != nil {
				t.Fatal(err)
			}
			// docker load reads the layers named in manifest.json and checks their diff IDs.
			cf, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			layers, err := img.Layers()
			if err != nil {
				t.Fatal(err)
			}
			if len(layers) != 4 || len(cf.RootFS.DiffIDs) != 4 {
				t.Fatalf("%d layers and %d diff IDs, want 4", len(layers), len(cf.RootFS.DiffIDs))
			}
			for i, l := range layers {
				rc, err := l.Uncompressed()
				if err != nil {
					t.Fatal(err)
				}
				got, err := digest.FromReader(rc)
				rc.Close()
				if err != nil {
					t.Fatal(err)
				}
				if got.String() != cf.RootFS.DiffIDs[i].String() {
					t.Errorf("layer %d: content %s, diff ID %s", i, got, cf.RootFS.DiffIDs[i])
				}
			}
		})
	}
}

// TestExportFiles exports trees by the local and tar exporters.
func TestExportFiles(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	dockerfile := exportDockerfile(reg.Ref("base:estargz"))
	dir := t.TempDir()
	build(t, d, client.Solve{Dockerfile: dockerfile, Outputs: []string{"type=local,dest=" + dir}})
	if got, err := os.ReadFile(filepath.Join(dir, "big/2")); err != nil || string(got) != noise(2, 1<<20) {
		t.Errorf("local: big/2 has %d bytes, or others than the layer (%v)", len(got), err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "new/b")); err != nil || string(got) != "from the second step\n" {
		t.Errorf("local: new/b is %q (%v)", got, err)
	}
	out := filepath.Join(t.TempDir(), "tree.tar")
	build(t, d, client.Solve{Dockerfile: dockerfile, Outputs: []string{"type=tar,dest=" + out}})
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tr := tar.NewReader(f)
	sum := map[string]digest.Digest{}
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		dg, err := digest.FromReader(tr)
		if err != nil {
			t.Fatal(err)
		}
		sum[h.Name] = dg
	}
	if want := digest.FromString(noise(1, 1<<20)); sum["big/1"] != want {
		t.Errorf("tar: big/1 is %s, want %s", sum["big/1"], want)
	}
}
