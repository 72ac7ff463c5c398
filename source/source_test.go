package source

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// put stores v as a blob of the given type.
func put(t *testing.T, cs content.Store, mediaType string, v any) ocispecs.Descriptor {
	t.Helper()
	dt, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(dt), Size: int64(len(dt))}
	if err := content.WriteBlob(t.Context(), cs, desc.Digest.String(), bytes.NewReader(dt), desc); err != nil {
		t.Fatal(err)
	}
	return desc
}

// The plan is made from the manifest which BuildKit resolved, behind an index or
// not, and reaches the cache manager by its descriptor handlers.
func TestPlanOfManifest(t *testing.T) {
	cs, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	broken := eager("ccc")
	broken.Annotations = map[string]string{tocAnnotation: "sha256:beef"}
	layers := []ocispecs.Descriptor{eager("a"), lazy("bb"), broken}
	for i := range layers {
		layers[i].MediaType = ocispecs.MediaTypeImageLayerGzip
	}
	image := func(layers []ocispecs.Descriptor, arch string) ocispecs.Descriptor {
		config := put(t, cs, ocispecs.MediaTypeImageConfig, ocispecs.Image{Platform: ocispecs.Platform{OS: "linux", Architecture: arch}})
		d := put(t, cs, ocispecs.MediaTypeImageManifest, ocispecs.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest, Config: config, Layers: layers,
		})
		d.Platform = &ocispecs.Platform{OS: "linux", Architecture: arch}
		return d
	}
	manifest := image(layers, "amd64")
	index := put(t, cs, ocispecs.MediaTypeImageIndex, ocispecs.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageIndex,
		Manifests: []ocispecs.Descriptor{image([]ocispecs.Descriptor{eager("other")}, "s390x"), manifest},
	})
	two := 2
	for name, c := range map[string]struct {
		root  digest.Digest
		limit *int
		eager string
		want  []string // reasons
	}{
		"manifest":    {manifest.Digest, nil, "", []string{reasonNoTOC, "", `its TOC digest annotation "sha256:beef" is no digest`}},
		"index":       {index.Digest, nil, "", []string{reasonNoTOC, "", `its TOC digest annotation "sha256:beef" is no digest`}},
		"layer limit": {manifest.Digest, &two, "", []string{reasonNoTOC, ""}},
		"OCI layout":  {manifest.Digest, nil, reasonLayout, []string{reasonLayout, reasonLayout, reasonLayout}},
	} {
		t.Run(name, func(t *testing.T) {
			opts := solver.CacheOpts{}
			handlers := map[digest.Digest]*cache.DescHandler{}
			for _, l := range layers {
				h := &cache.DescHandler{
					Annotations: map[string]string{labels.LabelUncompressed: "sha256:x"},
					Provider:    func(session.Group) content.Provider { return cs },
				}
				if toc, ok := l.Annotations[tocAnnotation]; ok {
					h.Annotations[tocAnnotation] = toc
				}
				handlers[l.Digest] = h
				opts[cache.DescHandlerKey(l.Digest)] = h
			}
			i := &instance{
				src:      &Source{opt: Options{Snapshotter: &Snapshotter{}, ContentStore: cs, Reporter: &report.Reporter{}}},
				ref:      "registry.test/image:v1",
				platform: ocispecs.Platform{OS: "linux", Architecture: "amd64"},
				limit:    c.limit,
				eager:    c.eager,
			}
			p, err := i.newPlan(t.Context(), c.root, opts)
			if err != nil {
				t.Fatal(err)
			}
			if len(p.layers) != len(c.want) || p.digest != c.root {
				t.Fatalf("plan of %d layers for %s", len(p.layers), p.digest)
			}
			for n, want := range c.want {
				l := &p.layers[n]
				if got := l.eager(); got != want {
					t.Errorf("layer %d: reason %q, want %q", n, got, want)
				}
				h := handlers[l.desc.Digest]
				if h.SnapshotLabels[labelPlan] != p.id || h.SnapshotLabels[snapshot.LabelDigest] != l.desc.Digest.String() {
					t.Errorf("layer %d: labels %v", n, h.SnapshotLabels)
				}
				if _, ok := h.Provider(nil).(countingProvider); !ok {
					t.Errorf("layer %d: pulling it isn't counted", n)
				}
			}
			// BuildKit fails on an annotation which is no digest; the good one stays.
			if toc, ok := handlers[layers[2].Digest].Annotations[tocAnnotation]; ok && len(c.want) > 2 {
				t.Errorf("annotation %q reaches BuildKit", toc)
			}
			if handlers[layers[1].Digest].Annotations[tocAnnotation] != toc.String() {
				t.Error("the good annotation is gone")
			}
		})
	}
	i := &instance{src: &Source{opt: Options{Snapshotter: &Snapshotter{}, ContentStore: cs}}, ref: "x", platform: ocispecs.Platform{OS: "linux", Architecture: "riscv64"}}
	if _, err := i.newPlan(t.Context(), index.Digest, nil); err == nil {
		t.Error("a plan for a platform that the index doesn't have")
	}
	if _, err := i.newPlan(t.Context(), digest.FromString("nowhere"), nil); err == nil {
		t.Error("a plan without a manifest")
	}
}
