package source

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	ctdlabels "github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

var toc = digest.FromString("table of contents")

// lazy and eager are layers with and without a table of contents.
func lazy(name string) ocispecs.Descriptor {
	d := eager(name)
	d.Annotations = map[string]string{tocAnnotation: toc.String()}
	return d
}

func eager(name string) ocispecs.Descriptor {
	return ocispecs.Descriptor{Digest: digest.FromString(name), Size: int64(len(name)) * 1000}
}

func planOf(layers ...ocispecs.Descriptor) *plan {
	p := newPlan("registry.test/image:v1", digest.FromString("manifest"), layers, map[digest.Digest]*cache.DescHandler{}, "")
	p.registry = true
	return p
}

func TestReasons(t *testing.T) {
	broken := eager("x")
	broken.Annotations = map[string]string{tocAnnotation: "sha256:beef"}
	const position = "100:20:30:1"
	zstd := func(annotations ...string) ocispecs.Descriptor {
		d := eager("z")
		d.MediaType, d.Annotations = ocispecs.MediaTypeImageLayerZstd, map[string]string{}
		for _, k := range annotations {
			d.Annotations[k] = toc.String()
		}
		return d
	}
	secret := lazy("s") // whatever its annotations were before
	secret.MediaType = ocispecs.MediaTypeImageLayerGzip + "+encrypted"
	nowhere := zstd(zstdchunked.ChecksumAnnotation)
	nowhere.Annotations[zstdchunked.PositionAnnotation] = "everywhere"
	found := zstd(zstdchunked.ChecksumAnnotation)
	found.Annotations[zstdchunked.PositionAnnotation] = position
	for name, c := range map[string]struct {
		layer ocispecs.Descriptor
		eager string // of the source
		want  string
	}{
		"lazy":                   {lazy("a"), "", ""},
		"no table of contents":   {eager("a"), "", "no table of contents"},
		"annotation is nonsense": {broken, "", `its TOC digest annotation "sha256:beef" is no digest`},
		"encrypted":              {secret, "", "it is encrypted"},
		"zstd:chunked":           {found, "", ""},
		"zstd:chunked, footer":   {zstd(zstdchunked.ChecksumAnnotation), "", ""},
		"zstd:chunked, stargz's": {zstd(tocAnnotation), "", ""},
		"zstd":                   {zstd(), "", "no table of contents"},
		"zstd:chunked, twice": {
			zstd(tocAnnotation, zstdchunked.ChecksumAnnotation), "",
			"its table of contents can't be found: annotations io.github.containers.zstd-chunked.manifest-checksum and containerd.io/snapshot/stargz/toc.digest, of which a layer can have one",
		},
		"zstd:chunked, nowhere": {
			nowhere, "",
			"its table of contents can't be found: annotation io.github.containers.zstd-chunked.manifest-position: position \"everywhere\", want OFFSET:SIZE",
		},
		"OCI layout": {lazy("a"), reasonLayout, "its OCI layout is read through the client"},
	} {
		p := newPlan("registry.test/image:v1", digest.FromString("manifest"), []ocispecs.Descriptor{c.layer}, nil, c.eager)
		if got := p.layers[0].eager(); got != c.want {
			t.Errorf("%s: reason %q, want %q", name, got, c.want)
		}
		if _, ok := p.labels(0)[tocAnnotation]; ok != (c.want == "") {
			t.Errorf("%s: labels %v", name, p.labels(0))
		}
	}
}

func TestLabels(t *testing.T) {
	p := planOf(eager("a"), lazy("bb"), eager("ccc"), lazy("dddd"), lazy("bb"))
	b, d := digest.FromString("bb").String(), digest.FromString("dddd").String()
	for i, want := range []struct{ layers, sizes string }{
		{"", ""}, {b + "," + d, "2000,4000"}, {"", ""}, {d + "," + b, "4000,2000"}, {b, "2000"},
	} {
		l := p.labels(i)
		if l[labelPlan] != p.id || l[snapshot.LabelRef] != "registry.test/image:v1" || l[snapshot.LabelDigest] != p.layers[i].desc.Digest.String() {
			t.Errorf("layer %d: labels %v", i, l)
		}
		if l[snapshot.LabelLayers] != want.layers || l[snapshot.LabelSizes] != want.sizes {
			t.Errorf("layer %d: layers %q, sizes %q; want %+v", i, l[snapshot.LabelLayers], l[snapshot.LabelSizes], want)
		}
	}
	// What turned out not to be lazy is no longer hinted at.
	p.layers[3].pullBecause("it broke")
	if got := p.labels(1)[snapshot.LabelLayers]; got != b {
		t.Errorf("layers %q", got)
	}
	// A client's layout is nowhere to read from.
	p.registry = false
	if l := p.labels(1); l[snapshot.LabelRef] != "" || l[snapshot.LabelDigest] != b {
		t.Errorf("of a layout: labels %v", l)
	}
}

// However many layers there are, containerd takes the labels, and the same number
// of digests and sizes is in them.
func TestLabelsOfManyLayers(t *testing.T) {
	var layers []ocispecs.Descriptor
	for i := range 200 {
		layers = append(layers, lazy(fmt.Sprint("layer ", i)))
	}
	p := planOf(layers...)
	for i := range layers {
		l := p.labels(i)
		for k, v := range l {
			if err := ctdlabels.Validate(k+"."+strings.Repeat("x", 25), v); err != nil {
				t.Errorf("layer %d: %v", i, err)
			}
		}
		digests, sizes := strings.Split(l[snapshot.LabelLayers], ","), strings.Split(l[snapshot.LabelSizes], ",")
		if len(digests) != len(sizes) || digests[0] != layers[i].Digest.String() {
			t.Errorf("layer %d: %d digests, %d sizes, first %s", i, len(digests), len(sizes), digests[0])
		}
		if n := min(200-i, 40); len(digests) < n {
			t.Errorf("layer %d: only %d hints", i, len(digests))
		}
	}
}

func TestFindAndLazyAbove(t *testing.T) {
	p := planOf(eager("a"), lazy("b"), eager("c"), lazy("d"), eager("e"))
	var above []bool
	for i := range p.layers {
		above = append(above, p.lazyAbove(i))
		if got := p.find(p.layers[i].desc.Digest.String()); got != i {
			t.Errorf("layer %d is found at %d", i, got)
		}
	}
	if !slices.Equal(above, []bool{true, true, true, false, false}) {
		t.Errorf("lazyAbove: %v", above)
	}
	if got := p.find(digest.FromString("z").String()); got != -1 {
		t.Errorf("a stranger is found at %d", got)
	}
}

func TestPlansForgetTheOldest(t *testing.T) {
	var ps plans
	var ids []string
	for range keepPlans + 3 {
		p := planOf()
		ps.add(p)
		ids = append(ids, p.id)
	}
	for i, id := range ids {
		if known := ps.get(id) != nil; known != (i >= 3) {
			t.Errorf("plan %d of %d known: %t", i, len(ids), known)
		}
	}
	if len(ps.byID) != keepPlans || ps.get("") != nil {
		t.Errorf("%d plans are kept", len(ps.byID))
	}
}

// Handlers of all images that are remembered are found, the newest first, those of registries before those of clients; all or none.
func TestHandlers(t *testing.T) {
	var ps plans
	of := func(ref string, registry bool, names ...string) {
		handlers := map[digest.Digest]*cache.DescHandler{}
		var layers []ocispecs.Descriptor
		for _, n := range names {
			layers = append(layers, lazy(n))
			handlers[digest.FromString(n)] = &cache.DescHandler{Ref: ref}
		}
		p := newPlan(ref, digest.FromString(ref), layers, handlers, "")
		p.registry = registry
		ps.add(p)
	}
	of("one", true, "a", "b")
	of("two", true, "b", "c")
	of("layout", false, "c", "d", "e")
	a, b, c, d, e := digest.FromString("a"), digest.FromString("b"), digest.FromString("c"), digest.FromString("d"), digest.FromString("e")
	s := &Snapshotter{opt: SnapshotterOptions{Registry: func(string) func(session.Group) content.Provider { return nil }}}
	s.plans.byID, s.plans.ids = ps.byID, ps.ids
	s.origins.add(origin{Ref: "earlier", Desc: lazy("d")})
	got, ok := s.Handlers([]digest.Digest{a, b, c, d, e})
	if !ok || got[a].Ref != "one" || got[b].Ref != "two" || got[c].Ref != "two" || got[d].Ref != "earlier" || got[e].Ref != "layout" {
		t.Errorf("handlers %v, %t", got, ok)
	}
	if got, ok := s.Handlers([]digest.Digest{a, digest.FromString("z")}); ok {
		t.Errorf("a stranger among them: %v", got)
	}
}
