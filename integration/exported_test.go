package integration

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// pull returns an image of a registry.
func pull(t *testing.T, reg *registry.Registry, tag string) v1.Image {
	t.Helper()
	ref, err := name.ParseReference(reg.Ref(tag))
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref, remote.WithContext(t.Context()), remote.WithTransport(reg.Transport()), remote.WithAuth(reg.Authenticator()))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// layerBlob returns the compressed bytes of a layer.
func layerBlob(t *testing.T, img v1.Image, d v1.Hash) []byte {
	t.Helper()
	l, err := img.LayerByDigest(d)
	if err != nil {
		t.Fatal(err)
	}
	return compressed(t, l)
}

// compressed returns a layer's blob.
func compressed(t *testing.T, l v1.Layer) []byte {
	t.Helper()
	rc, err := l.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	b, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wantEStargz checks an image with readers that others wrote: go-containerregistry's
// validation, stargz-snapshotter's TOC verification, and GNU tar. It returns the names in the layers' TOCs.
func wantEStargz(t *testing.T, img v1.Image) []string {
	t.Helper()
	if err := validate.Image(img); err != nil {
		t.Errorf("go-containerregistry: %v", err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) == 0 || len(cf.RootFS.DiffIDs) != len(m.Layers) {
		t.Fatalf("%d layers and %d diff IDs", len(m.Layers), len(cf.RootFS.DiffIDs))
	}
	var files []string
	for i, l := range m.Layers {
		if l.MediaType != types.OCILayer {
			t.Errorf("layer %d: media type %s", i, l.MediaType)
		}
		blob := layerBlob(t, img, l.Digest)
		toc, err := digest.Parse(l.Annotations[estargz.TOCJSONDigestAnnotation])
		if err != nil {
			t.Errorf("layer %d: annotations %v: no TOC digest: %v", i, l.Annotations, err)
			continue
		}
		r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
		if err != nil {
			t.Errorf("layer %d: estargz.Open: %v", i, err)
			continue
		}
		if got := r.TOCDigest(); got != toc {
			t.Errorf("layer %d: TOC %s, want %s", i, got, toc)
		}
		root, ok := r.Lookup("")
		if !ok {
			t.Errorf("layer %d: no root in its TOC", i)
			continue
		}
		names := tocNames(root, "")
		if shared := wantChunks(t, r, names); !shared {
			if _, err := r.VerifyTOC(toc); err != nil {
				t.Errorf("layer %d: VerifyTOC: %v", i, err)
			}
		}
		files = append(files, names...)

		rd := gunzip(t, blob)
		if got, want := l.Annotations[estargz.StoreUncompressedSizeAnnotation], strconv.Itoa(len(rd)); got != want {
			t.Errorf("layer %d: annotated uncompressed size %q, it is %s", i, got, want)
		}
		if got, want := digest.FromBytes(rd).String(), cf.RootFS.DiffIDs[i].String(); got != want {
			t.Errorf("layer %d: diff ID %s, want %s", i, got, want)
		}
		cmd := exec.CommandContext(t.Context(), "tar", "-tz")
		cmd.Stdin = bytes.NewReader(blob)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("layer %d: tar -tz: %v\n%s", i, err, out)
		}
	}
	return files
}

// wantChunks reads all files of a layer, and compares each chunk with its digest. It reports whether files share frames: those VerifyTOC
// takes for a mistake, also when stargz-snapshotter has written them itself, which reads them like others.
func wantChunks(t *testing.T, r *estargz.Reader, names []string) (shared bool) {
	t.Helper()
	seen := map[string]bool{} // a busybox has 300 names
	for _, name := range names {
		e, ok := r.Lookup(name)
		if !ok || e.Type != "reg" || seen[e.Name] {
			continue
		}
		seen[e.Name] = true
		f, err := r.OpenFile(e.Name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for off := int64(0); off < e.Size; {
			c, ok := r.ChunkEntryForOffset(e.Name, off)
			if !ok {
				t.Errorf("%s: no chunk at %d", name, off)
				break
			}
			shared = shared || c.InnerOffset > 0
			p := make([]byte, c.ChunkSize)
			if n, err := f.ReadAt(p, off); n < len(p) {
				t.Errorf("%s: chunk at %d: %v", name, off, err)
			}
			if got := digest.FromBytes(p).String(); got != c.ChunkDigest {
				t.Errorf("%s: chunk at %d has %s, want %s", name, off, got, c.ChunkDigest)
			}
			off += c.ChunkSize
		}
	}
	return shared
}

func gunzip(t *testing.T, blob []byte) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "gzip", "-dc")
	cmd.Stdin = bytes.NewReader(blob)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("gzip -d: %v", err)
	}
	return out
}

func tocNames(e *estargz.TOCEntry, dir string) []string {
	var out []string
	e.ForeachChild(func(base string, c *estargz.TOCEntry) bool {
		path := filepath.Join(dir, base)
		out = append(out, path)
		if c.Type == "dir" {
			out = append(out, tocNames(c, path)...)
		}
		return true
	})
	return out
}

func wantFile(t *testing.T, files []string, want string) {
	t.Helper()
	if slices.Contains(files, want) {
		return
	}
	t.Errorf("no layer's TOC has %q: %q", want, files)
}

func hash(t *testing.T, d digest.Digest) v1.Hash {
	t.Helper()
	h, err := v1.NewHash(d.String())
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// wantZstdDiffIDs checks that the zstd layers hold what the image's config promises.
func wantZstdDiffIDs(t *testing.T, img v1.Image) {
	t.Helper()
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if len(layers) != len(cf.RootFS.DiffIDs) {
		t.Fatalf("%d layers, %d DiffIDs", len(layers), len(cf.RootFS.DiffIDs))
	}
	for i, l := range layers {
		if got := zstdDiffID(t, l); got.String() != cf.RootFS.DiffIDs[i].String() {
			t.Errorf("layer %d: DiffID %s, the config says %s", i, got, cf.RootFS.DiffIDs[i])
		}
	}
}

func zstdDiffID(t *testing.T, l v1.Layer) digest.Digest {
	t.Helper()
	zr, err := zstd.NewReader(bytes.NewReader(compressed(t, l)))
	if err != nil {
		t.Fatal(err)
	}
	defer zr.Close()
	got, err := digest.FromReader(zr)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// wantLazyLayers checks that layers in the manifest or index of an exported cache carry TOC digests.
func wantLazyLayers(t *testing.T, raw []byte, want int) {
	t.Helper()
	var m struct {
		Manifests []v1.Descriptor `json:"manifests"`
		Layers    []v1.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range append(m.Manifests, m.Layers...) {
		if l.MediaType == types.OCILayer && l.Annotations[estargz.TOCJSONDigestAnnotation] != "" {
			n++
		}
	}
	if n != want {
		t.Errorf("%d layers of the cache have TOC digests, want %d:\n%s", n, want, raw)
	}
}
