package source

import (
	"context"
	"maps"
	"testing"

	"github.com/moby/buildkit/cache"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// seen is a cache manager that tells what it was asked for.
type seen struct {
	cache.Manager
	desc ocispecs.Descriptor
}

func (s *seen) GetByBlob(_ context.Context, desc ocispecs.Descriptor, _ cache.ImmutableRef, _ ...cache.RefOption) (cache.ImmutableRef, error) {
	s.desc = desc
	return nil, nil
}

func TestBindTables(t *testing.T) {
	const zstd = ocispecs.MediaTypeImageLayerZstd
	for name, c := range map[string]struct {
		mediaType   string
		annotations map[string]string
		want        string
	}{
		"none":                   {zstd, nil, ""},
		"Podman's":               {zstd, map[string]string{zstdchunked.ChecksumAnnotation: toc.String()}, toc.String()},
		"Podman's, for Docker":   {"application/vnd.docker.image.rootfs.diff.tar.zstd", map[string]string{zstdchunked.ChecksumAnnotation: toc.String()}, toc.String()},
		"Podman's, no digest":    {zstd, map[string]string{zstdchunked.ChecksumAnnotation: "x"}, ""},
		"Podman's, but not zstd": {ocispecs.MediaTypeImageLayerGzip, map[string]string{zstdchunked.ChecksumAnnotation: toc.String()}, ""},
		"stargz-snapshotter's":   {zstd, map[string]string{tocAnnotation: toc.String()}, toc.String()},
	} {
		var s seen
		given := maps.Clone(c.annotations)
		if _, err := BindTables(&s).GetByBlob(t.Context(), ocispecs.Descriptor{MediaType: c.mediaType, Annotations: given}, nil); err != nil {
			t.Fatal(err)
		}
		if got := s.desc.Annotations[tocAnnotation]; got != c.want {
			t.Errorf("%s: bound to %q, want %q", name, got, c.want)
		}
		if !maps.Equal(given, c.annotations) {
			t.Errorf("%s: the descriptor's own annotations are %v now", name, given)
		}
	}
}

func TestFormatLabels(t *testing.T) {
	chunked := eager("zzz")
	chunked.MediaType = ocispecs.MediaTypeImageLayerZstd
	chunked.Annotations = map[string]string{zstdchunked.ChecksumAnnotation: toc.String(), zstdchunked.PositionAnnotation: "100:20:30:1"}
	p := planOf(lazy("a"), eager("bb"), chunked)
	for i, want := range []struct{ label, format string }{
		{"estargz,zstd:chunked@100:20", snapshot.FormatEStargz}, {"", snapshot.FormatEStargz}, {"zstd:chunked@100:20", snapshot.FormatZstdChunked},
	} {
		l := p.labels(i)
		if l[snapshot.LabelFormats] != want.label || snapshot.Format(l) != want.format {
			t.Errorf("layer %d: %q, %s; want %+v", i, l[snapshot.LabelFormats], snapshot.Format(l), want)
		}
	}
	if l := p.labels(2); l[tocAnnotation] != toc.String() || l[snapshot.LabelTOCs] != toc.String() {
		t.Errorf("labels %v", l)
	}
}
