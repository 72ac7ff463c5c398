package exporter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/cache/remotecache"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
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

// configured is an image exporter that does nothing.
type configured struct{ bkexporter.ExporterInstance }

func (c configured) Resolve(context.Context, int, map[string]string) (bkexporter.ExporterInstance, error) {
	return c, nil
}

func (configured) Config() *bkexporter.Config {
	return bkexporter.NewConfigWithCompression(compression.New(compression.EStargz))
}

func (configured) Export(context.Context, *bkexporter.Source, bkexporter.ExportBuildInfo) (map[string]string, bkexporter.FinalizeFunc, bkexporter.DescriptorReference, error) {
	return nil, nil, nil, nil
}

// TestCacheLeavesTheBase exports caches on a base that this daemon has written with other options: its layers stay as they are, those of the build
// don't, and the tables of contents of an inline cache aren't the image's.
func TestCacheLeavesTheBase(t *testing.T) {
	cs := contentStore(t)
	var layers []ocispecs.Descriptor
	for _, name := range []string{"base", "own"} {
		desc, err := convert(t.Context(), cs, put(t, cs, layerTar(t, name)), ours(estargz.WriteOptions{}))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, *desc)
	}
	inline := func() compression.Config {
		attrs := map[string]string{"compression": "estargz", "estargz-external-toc": "true", "push": "true"}
		e, err := New("image", configured{}).Resolve(t.Context(), 0, attrs)
		if err != nil {
			t.Fatal(err)
		}
		config := fmt.Appendf(nil, `{"rootfs":{"diff_ids":[%q]}}`, layers[0].Annotations[labels.LabelUncompressed])
		src := &bkexporter.Source{Metadata: map[string][]byte{exptypes.ExporterImageBaseConfigKey: config}}
		if _, _, _, err := e.Export(t.Context(), src, bkexporter.ExportBuildInfo{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if n := len(e.(*instance).estargz.tocs.of); n > 0 {
				t.Errorf("the image has got %d tables of contents", n)
			}
		})
		return e.Config().Compression()
	}
	cache := func() compression.Config {
		resolve := func(context.Context, session.Group, map[string]string) (remotecache.Exporter, error) {
			return &cacheTo{comp: compression.New(compression.EStargz)}, nil
		}
		bases := func([]string) map[digest.Digest]bool { return map[digest.Digest]bool{layers[0].Digest: true} }
		e, err := Cache("local", resolve, nil, bases)(t.Context(), session.NewGroup("a"), map[string]string{"compression": "estargz"})
		if err != nil {
			t.Fatal(err)
		}
		e.(*cacheExporter).estargz.order = inOrderOf(t, t.TempDir(), "own").Type.(*converting).order
		return e.Config().Compression
	}
	for name, comp := range map[string]func() compression.Config{"inline": inline, "of its own": cache} {
		t.Run(name, func(t *testing.T) {
			got, err := GetRemotes(t.Context(), cs, nil, &convertedRef{cs: cs, descs: layers}, false, cacheconfig.RefConfig{Compression: comp()}, false, nil)
			if err != nil {
				t.Fatal(err)
			}
			if now := got[0].Descriptors; now[0].Digest != layers[0].Digest || now[1].Digest == layers[1].Digest {
				t.Errorf("layers were %s and %s, and are %s and %s", layers[0].Digest, layers[1].Digest, now[0].Digest, now[1].Digest)
			}
		})
	}
}
