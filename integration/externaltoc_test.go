package integration

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// withExternalTOCs converts an image as `ctr-remote convert --estargz --estargz-external-toc --estargz-keep-diff-id` does: into one
// whose layers have no table of contents, and one that has them.
func withExternalTOCs(t *testing.T, im baseimage.Image) (img, tocs v1.Image) {
	t.Helper()
	from, err := im.Build(t.Context(), baseimage.Gzip)
	if err != nil {
		t.Fatal(err)
	}
	config, err := from.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := from.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var converted, kept []mutate.Addendum
	for _, l := range layers {
		tar, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		var data, toc bytes.Buffer
		c := externaltoc.NewGzipCompressor()
		w := estargz.NewWriterWithCompressor(&data, c)
		if err := w.AppendTarLossLess(tar); err != nil {
			t.Fatal(err)
		}
		tocDigest, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := tar.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.WriteTOCTo(&toc); err != nil {
			t.Fatal(err)
		}
		diff, err := l.DiffID()
		if err != nil {
			t.Fatal(err)
		}
		converted = append(converted, mutate.Addendum{
			Layer:       gzipped{static.NewLayer(data.Bytes(), types.OCILayer), diff},
			Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: tocDigest.String()},
		})
		kept = append(kept, mutate.Addendum{
			Layer:       static.NewLayer(toc.Bytes(), types.OCILayer),
			Annotations: map[string]string{"containerd.io/snapshot/stargz/layer.digest": digest.FromBytes(data.Bytes()).String()},
		})
	}
	oci := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if tocs, err = mutate.Append(oci, kept...); err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.Append(oci, converted...); err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.ConfigFile(img, config); err != nil { // no DiffID has changed
		t.Fatal(err)
	}
	return img, tocs
}

// gzipped is a layer that knows its DiffID.
type gzipped struct {
	v1.Layer
	diff v1.Hash
}

func (g gzipped) DiffID() (v1.Hash, error)             { return g.diff, nil }
func (g gzipped) Uncompressed() (io.ReadCloser, error) { panic("not asked for by a push") }

// TestExternalTOC builds on an image whose tables of contents are in another one.
func TestExternalTOC(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, tocs := withExternalTOCs(t, busybox(t, bigLayer(t, 8<<20)))
	_, wrong := withExternalTOCs(t, busybox(t, bigLayer(t, 1<<20)))
	pushed := func(tag string, img v1.Image) string {
		t.Helper()
		dgst, err := baseimage.Push(t.Context(), reg, tag, img)
		if err != nil {
			t.Fatal(err)
		}
		return dgst.String()
	}
	dgst := pushed("base:there", img)
	pushed("base:there-esgztoc", tocs)
	pushed("base:missing", img)
	pushed("base:others", img)
	pushed("base:others-esgztoc", wrong)
	want := digest.FromString(noise(5, 1<<20)).Encoded()

	for name, image := range map[string]struct {
		ref   string
		eager string // why it is pulled
	}{
		"tag":                      {ref: reg.Ref("base:there")},
		"tag and digest":           {ref: reg.Ref("base:there") + "@" + dgst},
		"digest":                   {ref: reg.Ref("base") + "@" + dgst, eager: "which is found by a tag only"},
		"no image of them":         {ref: reg.Ref("base:missing"), eager: "base:missing-esgztoc: not found"},
		"an image of other layers": {ref: reg.Ref("base:others"), eager: "base:others-esgztoc: it has none for sha256:"},
	} {
		t.Run(name, func(t *testing.T) {
			reg.Log.Reset()
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			s := client.Solve{Dockerfile: "FROM " + image.ref + "\nRUN sha256sum /big/5\n", Plain: true}
			res := build(t, d, s)
			wantContains(t, "progress", res.Plain, want)
			read, size := blobsRead(t, reg, img), imageSize(t, img)
			if image.eager == "" && read > size/2 {
				t.Errorf("reading 1 MiB fetched %d bytes of %d:\n%s", read, size, res.Plain)
			}
			if image.eager != "" {
				wantContains(t, "progress", res.Plain, ": the table of contents is in another blob", image.eager)
			}
		})
	}
	t.Run("trouble", func(t *testing.T) {
		reg.Log.Reset()
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
		top := layerDigests(t, tocs)[1]
		defer reg.Faults.Add(registry.Fault{Kind: registry.Status, Code: http.StatusServiceUnavailable, Match: registry.MatchBlob(top), Count: 2})()
		defer reg.Faults.Add(registry.Fault{Kind: registry.ShortBody, Match: registry.MatchBlob(top), Skip: 2, Count: 1})()
		res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:there") + "\nRUN sha256sum /big/5\n", NoCache: true})
		wantContains(t, "output", res.Output(), want)
		if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
			t.Errorf("%d layers are lazy, want 2: a fault that passes is no reason to pull", rep.Images[0].Lazy)
		}
		if hits := reg.Faults.Hits(); hits != 3 {
			t.Errorf("%d requests failed, want 3", hits)
		}
	})
}
