package exporter

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// A convertedRef has its layers converted as BuildKit's refs do.
type convertedRef struct {
	cache.ImmutableRef
	cs    content.Store
	descs []ocispecs.Descriptor
}

func (r *convertedRef) GetRemotes(ctx context.Context, _ bool, cfg cacheconfig.RefConfig, _ bool, _ session.Group) ([]*solver.Remote, error) {
	descs := slices.Clone(r.descs)
	for i, d := range descs {
		if !cfg.Compression.Force {
			break
		}
		if _, err := r.cs.Info(ctx, d.Digest); err != nil {
			return nil, err
		}
		c, err := convert(ctx, r.cs, d, cfg.Compression)
		if err != nil {
			return nil, fmt.Errorf("failed to ensure compression type: failed to convert: %w", err)
		}
		descs[i] = *c
	}
	return []*solver.Remote{{Descriptors: descs, Provider: r.cs}}, nil
}

func (r *convertedRef) LayerChain() (chain cache.RefList) {
	for i := range r.descs {
		chain = append(chain, &convertedRef{cs: r.cs, descs: r.descs[:i+1]})
	}
	return chain
}

func (r *convertedRef) Release(context.Context) error { return nil }

// Of a forced export that fails, the error says by which layer.
func TestForcedNamesTheLayer(t *testing.T) {
	good, whole := layerTar(t, "good"), layerTar(t, "a", "b", "c")
	list, err := order.Parse([]byte("c\n"))
	if err != nil {
		t.Fatal(err)
	}
	inOrder := newEStargz(estargz.WriteOptions{})
	inOrder.order = &ordering{list: list, dir: t.TempDir()}
	gzipped := func(p []byte) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(p)
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	broken := gzipped(whole)
	broken[len(broken)-5] ^= 0xff
	garbled := slices.Clone(whole)
	copy(garbled[512+100_352:], "no header")
	for format, comp := range map[string]compression.Config{
		"estargz":     ours(estargz.WriteOptions{}),
		"in order":    inOrder.replace(compression.New(compression.EStargz)),
		"zstdchunked": oursChunked(zstdchunked.WriteOptions{}),
	} {
		for name, c := range map[string]struct {
			blob   []byte
			diffID digest.Digest
			want   []string // nothing if it isn't damaged
		}{
			"good":            {gzipped(whole), digest.FromBytes(whole), nil},
			"tar ends early":  {gzipped(whole[:50_000]), digest.FromBytes(whole[:50_000]), []string{"is damaged", "unexpected EOF"}},
			"garbage in it":   {gzipped(garbled), digest.FromBytes(garbled), []string{"is damaged", "invalid tar header"}},
			"gzip ends early": {gzipped(whole)[:50_000], digest.FromBytes(whole), []string{"is damaged", "decompress: unexpected EOF"}},
			"gzip is broken":  {broken, digest.FromBytes(whole), []string{"is damaged", "decompress: gzip: invalid checksum"}},
			"wrong DiffID":    {gzipped(whole), digest.FromBytes(good), []string{"is damaged", "its DiffID is " + digest.FromBytes(whole).String()}},
		} {
			t.Run(format+"/"+name, func(t *testing.T) {
				cs := contentStore(t)
				below := put(t, cs, good)
				below.Annotations = map[string]string{labels.LabelUncompressed: below.Digest.String()}
				desc := put(t, cs, c.blob)
				desc.MediaType = ocispecs.MediaTypeImageLayerGzip
				desc.Annotations = map[string]string{labels.LabelUncompressed: c.diffID.String()}
				above := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: digest.FromString("it isn't fetched"), Size: 1}
				descs := []ocispecs.Descriptor{below, desc}
				if c.want != nil && name != "wrong DiffID" {
					descs = append(descs, above)
				}
				for range 2 { // the second time finds what the first has made
					_, err := GetRemotes(t.Context(), cs, nil, &convertedRef{cs: cs, descs: descs}, true, cacheconfig.RefConfig{Compression: comp.SetForce(true)}, false, nil)
					if c.want == nil {
						if err != nil {
							t.Error(err)
						}
						continue
					}
					for _, want := range append([]string{"layer " + desc.Digest.String(), "without force-compression=true"}, c.want...) {
						if err == nil || !strings.Contains(err.Error(), want) {
							t.Errorf("error %v, want %q in it", err, want)
						}
					}
				}
			})
		}
	}
}

// Where no layer is to blame, the error stays what it is, and layers are read again only if it's a conversion that has failed.
func TestBlameNobody(t *testing.T) {
	cs := &counted{Store: contentStore(t)}
	descs := []ocispecs.Descriptor{put(t, cs, layerTar(t, "good"))}
	cfg := cacheconfig.RefConfig{Compression: oursChunked(zstdchunked.WriteOptions{}).SetForce(true)}
	for said, reads := range map[string]bool{"failed to convert: something else": true, "failed to copy: the registry is gone": false} {
		cs.reads = 0
		failed := errors.New(said)
		if err := blame(t.Context(), cs, &convertedRef{cs: cs, descs: descs}, cfg, nil, failed); !errors.Is(err, failed) {
			t.Errorf("error %v, want %v", err, failed)
		}
		if (cs.reads > 0) != reads {
			t.Errorf("%s: layers were read %d times", said, cs.reads)
		}
	}
}

// What is made of an eStargz layer is without its table of contents, and so of another DiffID.
func TestForcedTOCLeftOut(t *testing.T) {
	cs := contentStore(t)
	desc, err := convert(t.Context(), cs, put(t, cs, layerTar(t, "a", "b")), ours(estargz.WriteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]ocispecs.Descriptor{
		"annotated": *desc,
		"as seen":   {MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size, Annotations: map[string]string{labels.LabelUncompressed: desc.Annotations[labels.LabelUncompressed]}},
	} {
		ref := &convertedRef{cs: cs, descs: []ocispecs.Descriptor{from}}
		if _, err := GetRemotes(t.Context(), cs, nil, ref, true, cacheconfig.RefConfig{Compression: oursChunked(zstdchunked.WriteOptions{}).SetForce(true)}, false, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
