package exporter

import (
	"testing"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// Layers that this build has made, and that are in the cache in another format, are told of; the base image's aren't, nor are those that
// can't be lazy.
func TestStayed(t *testing.T) {
	cs := contentStore(t)
	base := put(t, cs, layerTar(t, "base"))
	base.Annotations = map[string]string{labels.LabelUncompressed: base.Digest.String()}
	plain := put(t, cs, layerTar(t, "a"))
	as := func(tar []byte, comp compression.Config) ocispecs.Descriptor {
		desc, err := convert(t.Context(), cs, put(t, cs, tar), comp)
		if err != nil {
			t.Fatal(err)
		}
		return *desc
	}
	stargz, chunked := ours(estargz.WriteOptions{}), oursChunked(zstdchunked.WriteOptions{})
	a, b, lossy := layerTar(t, "a"), layerTar(t, "b"), layerTar(t, "caf\xe9")
	for name, c := range map[string]struct {
		comp   compression.Config
		layers []ocispecs.Descriptor
		want   string
	}{
		"as wanted":             {stargz, []ocispecs.Descriptor{base, as(a, stargz), as(lossy, stargz)}, ""},
		"chunked as wanted":     {chunked, []ocispecs.Descriptor{base, as(a, chunked), as(lossy, chunked)}, ""},
		"not compressed":        {stargz, []ocispecs.Descriptor{base, plain}, "compression=estargz: a layer that this build has made stays uncompressed, as it is in the cache; with force-compression=true all layers are converted"},
		"gzip and zstd:chunked": {stargz, []ocispecs.Descriptor{base, as(a, compression.New(compression.Gzip)), as(b, chunked)}, "compression=estargz: 2 layers that this build has made stay gzip or zstdchunked, as they are in the cache; with force-compression=true all layers are converted"},
		"zstd":                  {chunked, []ocispecs.Descriptor{base, as(a, compression.New(compression.Zstd))}, "compression=zstdchunked: a layer that this build has made stays zstd, as it is in the cache; with force-compression=true all layers are converted"},
		"estargz":               {chunked, []ocispecs.Descriptor{as(a, stargz)}, "compression=zstdchunked: a layer that this build has made stays estargz, as it is in the cache; with force-compression=true all layers are converted"},
	} {
		t.Run(name, func(t *testing.T) {
			var s stayed
			s.note(t.Context(), &solver.Remote{Descriptors: c.layers, Provider: cs}, []digest.Digest{base.Digest}, c.comp.Type)
			if got := s.text(); got != c.want {
				t.Errorf("said %q, want %q", got, c.want)
			}
		})
	}
}
