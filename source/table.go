package source

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/moby/buildkit/cache"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// A tableOfContents is what a descriptor says of a layer's.
type tableOfContents struct {
	digest digest.Digest
	format string // as reports have it
	label  string // as snapshot.LabelFormats has it
}

// tableOf returns the table of contents of a layer, or why it can't be lazy.
func tableOf(desc ocispecs.Descriptor) (_ tableOfContents, reason string) {
	if strings.HasSuffix(desc.MediaType, "+encrypted") {
		return tableOfContents{}, reasonEncrypted
	}
	if isZstd(desc.MediaType) {
		dgst, at, err := zstdchunked.Find(desc.Annotations)
		switch {
		case err != nil:
			return tableOfContents{}, "its table of contents can't be found: " + err.Error()
		case dgst == "":
			return tableOfContents{}, reasonNoTOC
		}
		return tableOfContents{dgst, snapshot.FormatZstdChunked, snapshot.FormatLabel(at)}, ""
	}
	toc, ok := desc.Annotations[tocAnnotation]
	if !ok {
		return tableOfContents{}, reasonNoTOC
	}
	dgst, err := digest.Parse(toc)
	if err != nil {
		return tableOfContents{}, fmt.Sprintf("its TOC digest annotation %q is no digest", toc)
	}
	return tableOfContents{dgst, snapshot.FormatEStargz, snapshot.FormatEStargz}, ""
}

// Table returns the digest of a layer's table of contents and its format as snapshot.LabelFormats has it, or the reason why a build pulls
// the layer without an attempt at one.
func Table(desc ocispecs.Descriptor) (toc digest.Digest, format, reason string) {
	t, reason := tableOf(desc)
	return t.digest, t.label, reason
}

// isZstd reports whether a media type is one of the two for zstd.
func isZstd(mediaType string) bool {
	return strings.HasSuffix(mediaType, "+zstd") || strings.HasSuffix(mediaType, ".zstd")
}

// lazyAnnotations are those of a layer that it takes to be lazy.
var lazyAnnotations = []string{
	tocAnnotation, zstdchunked.ChecksumAnnotation, zstdchunked.PositionAnnotation, zstdchunked.TarSplitAnnotation,
	zstdchunked.StargzPositionAnnotation,
}

// BindTables returns a cache manager that binds what it makes of a blob to the blob's table of contents also where that is Podman's.
//
// BuildKit does so for eStargz: the files of a lazy layer are those of its table of contents, and nobody has compared them with the
// DiffID. So what it keeps them by is made of both digests, or an image with a table of its own would change what others read that have the
// same DiffID. It knows one annotation. To let it see that in the descriptor would write it into the manifests that are exported, where
// Podman refuses a layer that has both.
func BindTables(m cache.Manager) cache.Manager { return bound{m} }

type bound struct{ cache.Manager }

// GetByBlob implements cache.Accessor.
func (b bound) GetByBlob(ctx context.Context, desc ocispecs.Descriptor, parent cache.ImmutableRef, opts ...cache.RefOption) (cache.ImmutableRef, error) {
	if _, ok := desc.Annotations[tocAnnotation]; !ok {
		if t, _ := tableOf(desc); t.digest != "" {
			desc.Annotations = maps.Clone(desc.Annotations)
			desc.Annotations[tocAnnotation] = t.digest.String()
		}
	}
	return b.Manager.GetByBlob(ctx, desc, parent, opts...)
}
