package exporter

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
)

// inOrderOf is a compression that puts files first.
func inOrderOf(t *testing.T, dir, list string) compression.Config {
	t.Helper()
	l, err := order.Parse([]byte(list))
	if err != nil {
		t.Fatal(err)
	}
	e := newEStargz(estargz.WriteOptions{})
	e.order = &ordering{name: "list", list: l, dir: dir}
	c := e.replace(compression.New(compression.EStargz))
	c.Type = &converting{eStargz: c.Type.(*eStargz)}
	return c
}

// firstOf are the files of a layer up to the landmark, by their offsets.
func firstOf(t *testing.T, cs content.Store, desc ocispecs.Descriptor) (names []string) {
	t.Helper()
	ra, err := cs.ReaderAt(t.Context(), desc)
	if err != nil {
		t.Fatal(err)
	}
	defer ra.Close()
	b, err := estargz.Open(ra, desc.Size, estargz.Options{TOCDigest: digest.Digest(desc.Annotations[stargz.TOCJSONDigestAnnotation])})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range b.Layer.Frames {
		if f.Offset < b.Prefetch {
			inode, _ := b.Layer.FileAt(int(f.FirstChunk))
			path, _ := b.Layer.Path(inode)
			names = append(names, path)
		}
	}
	return slices.Compact(names)
}

// A layer that was converted by one list is converted again by another, to what the other one makes of the tar itself.
func TestOrdered(t *testing.T) {
	cs, dir := contentStore(t), t.TempDir()
	plain := put(t, cs, layerTar(t, "a", "b", "c", "d"))
	one, err := convert(t.Context(), cs, plain, inOrderOf(t, dir, "c\nb"))
	if err != nil {
		t.Fatal(err)
	}
	if got := firstOf(t, cs, *one); !slices.Equal(got, []string{"c", "b"}) {
		t.Errorf("first are %q", got)
	}
	two, err := convert(t.Context(), cs, *one, inOrderOf(t, dir, "d"))
	if err != nil {
		t.Fatal(err)
	}
	direct, err := convert(t.Context(), cs, plain, inOrderOf(t, dir, "d"))
	if err != nil {
		t.Fatal(err)
	}
	if two.Digest != direct.Digest || two.Digest == one.Digest {
		t.Errorf("%s, %s, and directly %s", one.Digest, two.Digest, direct.Digest)
	}
	// Each is known for what it is, and is not converted to it again.
	for list, c := range map[string]struct {
		desc ocispecs.Descriptor
		want bool
	}{"c\nb": {*one, false}, "d": {*two, false}, "b\nc": {*one, true}, "c": {*two, true}} {
		needs, err := inOrderOf(t, dir, list).Type.NeedsConversion(t.Context(), cs, c.desc)
		if err != nil || needs != c.want {
			t.Errorf("by %q: needs conversion %v, %v", list, needs, err)
		}
	}
	comp := inOrderOf(t, dir, "a").Type.(*converting)
	comp.stay = map[digest.Digest]bool{one.Digest: true}
	if needs, err := comp.NeedsConversion(t.Context(), cs, *one); needs || err != nil {
		t.Errorf("a layer that is to stay needs conversion: %v, %v", needs, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("there is %v, %v", left, err)
	}
}

func TestOrderedFails(t *testing.T) {
	cs := contentStore(t)
	plain := put(t, cs, layerTar(t, "a", "b"))
	_, err := convert(t.Context(), cs, plain, inOrderOf(t, filepath.Join(t.TempDir(), "x"), "b"))
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "keep a layer's tar") {
		t.Errorf("got %v", err)
	}
}

func TestBaseOf(t *testing.T) {
	src := &bkexporter.Source{Metadata: map[string][]byte{
		"containerimage.base.config":             []byte(`{"rootfs":{"diff_ids":["sha256:1"]}}`),
		"containerimage.base.config/linux/arm64": []byte(`{"rootfs":{"diff_ids":["sha256:2","sha256:3"]}}`),
		"containerimage.base.config/linux/s390x": []byte(`{`),
	}}
	for platform, want := range map[string]int{"": 1, "linux/amd64": 1, "linux/arm64": 2, "linux/s390x": 0} {
		if got := baseOf(src, platform); len(got) != want {
			t.Errorf("%s: %v", platform, got)
		}
	}
	if got := baseOf(&bkexporter.Source{}, ""); got != nil {
		t.Errorf("of scratch: %v", got)
	}
}
