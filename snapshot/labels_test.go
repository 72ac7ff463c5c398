package snapshot

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestParseLabels(t *testing.T) {
	a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	list := func(ds ...digest.Digest) string {
		var s []string
		for _, d := range ds {
			s = append(s, d.String())
		}
		return strings.Join(s, ",")
	}
	base := map[string]string{LabelRef: "registry.test/a/b:v1", LabelDigest: a.String()}
	for name, tc := range map[string]struct {
		labels map[string]string
		sizes  map[digest.Digest]int64
		err    string
	}{
		"only the layer":      {nil, map[digest.Digest]int64{a: 0}, ""},
		"layers above":        {map[string]string{LabelLayers: list(a, b), LabelSizes: "10,20"}, map[digest.Digest]int64{a: 10, b: 20}, ""},
		"fewer sizes":         {map[string]string{LabelLayers: list(a, b, c), LabelSizes: "10"}, map[digest.Digest]int64{a: 10, b: 0, c: 0}, ""},
		"no sizes":            {map[string]string{LabelLayers: list(a, b)}, map[digest.Digest]int64{a: 0, b: 0}, ""},
		"nonsense":            {map[string]string{LabelLayers: "x," + list(b), LabelSizes: "10,-3"}, map[digest.Digest]int64{a: 0, b: 0}, ""},
		"layer not in list":   {map[string]string{LabelLayers: list(b), LabelSizes: "7"}, map[digest.Digest]int64{a: 0, b: 7}, ""},
		"no reference":        {map[string]string{LabelRef: ""}, nil, LabelRef},
		"reference no name":   {map[string]string{LabelRef: "not a reference"}, nil, LabelRef},
		"no digest":           {map[string]string{LabelDigest: ""}, nil, LabelDigest},
		"digest is no digest": {map[string]string{LabelDigest: "sha256:12"}, nil, LabelDigest},
	} {
		t.Run(name, func(t *testing.T) {
			labels := maps.Clone(base)
			maps.Copy(labels, tc.labels)
			src, err := parseLabels(labels)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want one which names %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if src.ref.Locator != "registry.test/a/b" || src.digest != a || !maps.Equal(src.sizes, tc.sizes) {
				t.Errorf("got %+v", src)
			}
		})
	}
}

// The labels of an image that a build uses now go before those of the image which the layer was mounted for.
func TestPresentImage(t *testing.T) {
	a, above, other := digest.FromString("a").String(), digest.FromString("above"), digest.FromString("other")
	image := func(id, ref, layer string, above digest.Digest) map[string]string {
		return map[string]string{
			LabelRef + id: ref, LabelDigest + id: layer,
			LabelLayers + id: a + "," + above.String(), LabelSizes + id: "1,2", LabelTOCs + id: a + "," + a,
		}
	}
	for name, tc := range map[string]struct {
		now   []map[string]string
		want  string
		above digest.Digest
	}{
		"nobody uses it":           {nil, "first.test/image", above},
		"another":                  {[]map[string]string{image(".x", "second.test/image:v1", a, other)}, "second.test/image", other},
		"two, one the same":        {[]map[string]string{image(".x", "second.test/image:v1", a, other), image(".y", "first.test/image:v1", a, above)}, "first.test/image", above},
		"of another layer":         {[]map[string]string{image(".x", "second.test/image:v1", other.String(), other)}, "first.test/image", above},
		"removed by BuildKit":      {[]map[string]string{{LabelRef + ".x": "", LabelDigest + ".x": ""}}, "first.test/image", above},
		"no reference":             {[]map[string]string{image(".x", "not a reference", a, other)}, "first.test/image", above},
		"no reference and another": {[]map[string]string{image(".x", "not a reference", a, above), image(".y", "second.test/image:v1", a, other)}, "second.test/image", other},
	} {
		labels := image("", "first.test/image:v1", a, above)
		for _, l := range tc.now {
			maps.Copy(labels, l)
		}
		src, err := parseLabels(labels)
		if err != nil || src.ref.Locator != tc.want || len(src.above) != 1 || src.above[0].Blob != tc.above || src.sizes[tc.above] != 2 {
			t.Errorf("%s: %+v, %v, want %s with %s above", name, src, err, tc.want, tc.above)
		}
	}

	// An image whose layers are pulled says where the layer is, and nothing of those above it.
	labels := image("", "first.test/image:v1", a, above)
	labels[LabelFormats] = FormatZstdChunked + "," + FormatZstdChunked
	labels[LabelRef+".x"], labels[LabelDigest+".x"] = "second.test/image:v1", a
	src, err := parseLabels(labels)
	if err != nil || src.ref.Locator != "second.test/image" || len(src.above) > 0 || src.sizes[digest.Digest(a)] != 1 || src.formats[a] != FormatZstdChunked {
		t.Errorf("an image that is pulled: %+v, %v", src, err)
	}
}

func TestSessions(t *testing.T) {
	got := Sessions(map[string]string{
		labelSession + "1.x": "two", labelSession + "0.x": "one", labelSession + "2.y": "one", labelSession + "3.y": "",
		LabelRef: "registry.test/a:v1",
	})
	if want := []string{"one", "two"}; !slices.Equal(got, want) {
		t.Errorf("sessions %q, want %q", got, want)
	}
	if got := Sessions(nil); len(got) != 0 {
		t.Errorf("sessions %q of no labels", got)
	}
}
