package source

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/moby/buildkit/source/containerimage"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// Of an image that a build has found out about, the lowest lazy layer is told, with those above it.
func TestLookAhead(t *testing.T) {
	cs, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	image := func(layers ...ocispecs.Descriptor) digest.Digest {
		for i := range layers {
			layers[i].MediaType = ocispecs.MediaTypeImageLayerGzip
		}
		config := put(t, cs, ocispecs.MediaTypeImageConfig, ocispecs.Image{Platform: ocispecs.Platform{OS: "linux", Architecture: "amd64"}})
		return put(t, cs, ocispecs.MediaTypeImageManifest, ocispecs.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest, Config: config, Layers: layers,
		}).Digest
	}
	ref, err := reference.Parse("registry.test/team/image:v1")
	if err != nil {
		t.Fatal(err)
	}
	one := 1
	for name, c := range map[string]struct {
		root  digest.Digest
		limit *int
		eager string
		want  string // the layer that is told
	}{
		"lazy above eager": {root: image(eager("a"), lazy("b"), lazy("c")), want: "b"},
		"all are eager":    {root: image(eager("a"), eager("b"))},
		"layer limit":      {root: image(eager("a"), lazy("b")), limit: &one},
		"no door":          {root: image(lazy("a")), eager: "there is none"},
		"no manifest":      {root: digest.FromString("nowhere")},
	} {
		t.Run(name, func(t *testing.T) {
			told := 0
			sn := &Snapshotter{opt: SnapshotterOptions{LookAhead: func(labels map[string]string, sessions []string) {
				told++
				if got := labels[snapshot.LabelDigest]; got != digest.FromString(c.want).String() || labels[snapshot.LabelRef] != ref.String() {
					t.Errorf("layer %s of %s", got, labels[snapshot.LabelRef])
				}
				if want := digest.FromString("b").String() + "," + digest.FromString("c").String(); labels[snapshot.LabelLayers] != want {
					t.Errorf("layers %s, want %s", labels[snapshot.LabelLayers], want)
				}
				if !slices.Equal(sessions, []string{"session"}) {
					t.Errorf("sessions %q", sessions)
				}
			}}}
			s := &Source{opt: Options{Snapshotter: sn, ContentStore: cs, Reporter: &report.Reporter{}, Eager: c.eager}}
			id := &containerimage.ImageIdentifier{Reference: ref, LayerLimit: c.limit}
			s.LookAhead(t.Context(), id, c.root, ocispecs.Platform{OS: "linux", Architecture: "amd64"}, []string{"session"})
			if (told == 1) != (c.want != "") {
				t.Errorf("told %d times", told)
			}
			if len(sn.plans.ids) > 0 {
				t.Error("it's a plan that is carried out")
			}
		})
	}
}
