package integration

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// chunksOf counts the chunks of a file in a blob: 0 if that isn't an eStargz layer which has it.
func chunksOf(blob []byte, name string) (n int) {
	sr := io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob)))
	offset, _, err := estargz.OpenFooter(sr)
	if err != nil {
		return 0
	}
	toc, _, err := new(estargz.GzipDecompressor).ParseTOC(io.NewSectionReader(sr, offset, sr.Size()-offset))
	if err != nil {
		return 0
	}
	for _, e := range toc.Entries {
		if e.Name == name && e.ChunkDigest != "" {
			n++
		}
	}
	return n
}

// TestChunkSizesEverywhere asks each exporter of layers that isn't the image exporter for small chunks, and exporters of caches.
func TestChunkSizesEverywhere(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:gzip", busybox(t), baseimage.Gzip)
	// unpacked returns the directory with the files of a tar.
	unpacked := func(t *testing.T, path string) string {
		dir := t.TempDir()
		if msg, err := exec.CommandContext(t.Context(), "tar", "-xf", path, "-C", dir).CombinedOutput(); err != nil {
			t.Fatalf("tar -x: %v\n%s", err, msg)
		}
		return dir
	}
	const attrs = "compression=estargz,estargz-chunk-size=64k"
	for name, export := range map[string]func(t *testing.T, s *client.Solve) (blobs func() string){
		"oci": func(t *testing.T, s *client.Solve) func() string {
			out := filepath.Join(t.TempDir(), "image.tar")
			s.Outputs = []string{"type=oci,dest=" + out + "," + attrs}
			return func() string { return unpacked(t, out) }
		},
		"oci directory": func(t *testing.T, s *client.Solve) func() string {
			out := t.TempDir()
			s.Outputs = []string{"type=oci,tar=false,dest=" + out + "," + attrs}
			return func() string { return out }
		},
		"docker": func(t *testing.T, s *client.Solve) func() string {
			out := filepath.Join(t.TempDir(), "image.tar")
			s.Outputs = []string{"type=docker,name=app:1,dest=" + out + "," + attrs}
			return func() string { return unpacked(t, out) }
		},
		"local cache": func(t *testing.T, s *client.Solve) func() string {
			out := t.TempDir()
			s.CacheTo = []string{"type=local,mode=max,dest=" + out + "," + attrs}
			return func() string { return out }
		},
		"registry's cache": func(t *testing.T, s *client.Solve) func() string {
			s.CacheTo = []string{"type=registry,mode=max,ref=" + reg.Ref("cache:1") + "," + attrs}
			return func() string {
				img := pull(t, reg, "cache:1")
				raw, err := img.RawManifest()
				if err != nil {
					t.Fatal(err)
				}
				var m v1.Manifest
				if err := json.Unmarshal(raw, &m); err != nil {
					t.Fatal(err)
				}
				dir := t.TempDir()
				for _, l := range m.Layers {
					writeFile(t, dir, l.Digest.Hex, string(layerBlob(t, img, l.Digest)))
				}
				return dir
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)}) // what another export has written would be taken as it is
			s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:gzip") + "\nRUN head -c 300000 /dev/urandom > /random\n"}
			blobs := export(t, &s)
			build(t, d, s)
			found := 0
			err := filepath.WalkDir(blobs(), func(path string, e os.DirEntry, err error) error {
				if err != nil || !e.Type().IsRegular() {
					return err
				}
				blob, err := os.ReadFile(path)
				found += chunksOf(blob, "random")
				return err
			})
			if err != nil || found != 5 {
				t.Errorf("%d chunks, want 5: %v", found, err)
			}
		})
	}
}
