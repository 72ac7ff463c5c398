package convert

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

// An image that is lazy already keeps its digest.
func TestAlreadyLazy(t *testing.T) {
	reg, elsewhere := repositorytest.New(t), repositorytest.New(t)
	desc := put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest, lazy(t, "one"))
	for _, tt := range []struct {
		to   *repositorytest.Registry
		want Action
	}{{reg, Present}, {elsewhere, Copied}, {elsewhere, Present}} {
		dst := repo(t, tt.to, "dst:1")
		r := must(t, repo(t, reg, "src:1"), dst, options())
		if r.Digest != desc.Digest || !slices.Equal(actions(r), []Action{tt.want}) || r.Layers[0].Reason != reasonLazy {
			t.Errorf("%+v, want %s of %s", r, tt.want, desc.Digest)
		}
		wantLazy(t, dst)
	}
	// What a table of contents is, is looked at once.
	elsewhere.Reset()
	reg.Reset()
	must(t, repo(t, reg, "src:1"), repo(t, elsewhere, "dst:1"), options())
	if read, written := reg.Moved(0); read > 1000 || written > 0 {
		t.Errorf("%d bytes were read and %d written", read, written)
	}
}

// What claims to be lazy and isn't is converted; what was changed since is refused.
func TestFalseClaims(t *testing.T) {
	reg := repositorytest.New(t)
	wrong := plain(t, "one")
	wrong.mediaType, wrong.annotations = ocispecs.MediaTypeImageLayerGzip, map[string]string{stargz.TOCJSONDigestAnnotation: digest.FromString("x").String()}
	put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest, wrong)
	dst := repo(t, reg, "dst:1")
	if got := actions(must(t, repo(t, reg, "src:1"), dst, options())); !slices.Equal(got, []Action{Converted}) {
		t.Errorf("layers were %v", got)
	}
	wantLazy(t, dst)

	changed := lazy(t, "two")
	changed.annotations = wrong.annotations
	put(t, reg, "2", "linux/amd64", ocispecs.MediaTypeImageManifest, changed)
	_, err := Convert(t.Context(), repo(t, reg, "src:2"), repo(t, reg, "dst:2"), options())
	if err == nil || !strings.Contains(err.Error(), "isn't the one that the manifest promises") {
		t.Errorf("error %v", err)
	}
}

// TestLazyAsClaimed converts a lazy layer that the destination or a state directory remembers: by an image that says of it what it said then, it is lazy
// still; where a tool has dropped the annotations, as stock BuildKit does with Podman's, it's converted, and one whose annotation is another one is refused.
func TestLazyAsClaimed(t *testing.T) {
	chunked := plain(t, "one")
	var blob bytes.Buffer
	made, err := zstdchunked.Write(t.Context(), &blob, bytes.NewReader(chunked.tar), zstdchunked.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	chunked = piece{tar: chunked.tar, blob: blob.Bytes(), mediaType: ocispecs.MediaTypeImageLayerZstd, annotations: made.Annotations}
	level := 10
	for name, c := range map[string]struct {
		layer  piece
		format Format
	}{
		"estargz":              {lazy(t, "one"), NewEStargz(estargz.WriteOptions{})},
		"zstdchunked":          {chunked, NewZstdChunked(zstdchunked.WriteOptions{Level: &level})},
		"zstdchunked, as ours": {chunked, NewZstdChunked(zstdchunked.WriteOptions{})}, // converted, it is the same blob
	} {
		for by, stateful := range map[string]bool{"state": true, "the former image": false} {
			t.Run(name+" by "+by, func(t *testing.T) {
				reg, opt, dst := repositorytest.New(t), Options{Format: c.format}, "dst:1"
				if stateful {
					opt.State = state(t, t.TempDir())
				}
				convert := func(tag string, layer piece) (Result, error) {
					if stateful {
						dst = "dst:" + tag
					}
					put(t, reg, tag, "linux/amd64", ocispecs.MediaTypeImageManifest, layer)
					return Convert(t.Context(), repo(t, reg, "src:"+tag), repo(t, reg, dst), opt)
				}
				dropped, changed := c.layer, c.layer
				dropped.annotations = map[string]string{"org.example.kept": "yes"}
				changed.annotations = maps.Clone(c.layer.annotations)
				for k, v := range changed.annotations {
					if _, err := digest.Parse(v); err == nil {
						changed.annotations[k] = digest.FromString("x").String()
					}
				}
				first, err := convert("first", c.layer)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := convert("changed", changed); err == nil || !strings.Contains(err.Error(), "isn't the one that the manifest promises") {
					t.Errorf("error %v", err)
				}
				r, err := convert("dropped", dropped)
				if err != nil {
					t.Fatal(err)
				}
				if l := r.Layers[0]; !l.Lazy || l.Action != Converted {
					t.Errorf("without its annotations the layer is %+v", l)
				}
				wantLazy(t, repo(t, reg, dst))
				if again, err := convert("again", c.layer); err != nil || again.Digest != first.Digest || again.Layers[0].Reason != reasonLazy {
					t.Errorf("again it's %+v (%v), and was %s", again, err, first.Digest)
				}
			})
		}
	}
}

// TestClaimedByOne converts an index of which one image says that a layer is lazy, and another one doesn't say it of the same.
func TestClaimedByOne(t *testing.T) {
	reg := repositorytest.New(t)
	claimed := lazy(t, "one")
	silent := claimed
	silent.annotations = nil
	for name, layers := range map[string][]piece{"first": {claimed, silent}, "second": {silent, claimed}} {
		var images []ocispecs.Descriptor
		for i, l := range layers {
			images = append(images, put(t, reg, "", []string{"linux/amd64", "linux/arm64"}[i], ocispecs.MediaTypeImageManifest, l))
		}
		reg.PutManifest("src", name, ocispecs.MediaTypeImageIndex, map[string]any{"schemaVersion": 2, "mediaType": ocispecs.MediaTypeImageIndex, "manifests": images})
		dst := repo(t, reg, "dst:"+name)
		r := must(t, repo(t, reg, "src:"+name), dst, options())
		if len(r.Layers) != 2 || !r.Layers[0].Lazy || !r.Layers[1].Lazy {
			t.Errorf("%s: layers are %+v", name, r.Layers)
		}
		wantLazy(t, dst)
	}
}
