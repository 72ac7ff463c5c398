// Package retain makes BuildKit keep the annotations of zstd:chunked layers, without which they are layers like others to whoever pulls
// what is exported.
//
// BuildKit's cache keeps those annotations of a layer that it knows, and copies the list of them when it is initialized, from one that others
// can change. This package adds to that before: Go initializes a package as soon as all that it imports is, and of several the
// first by its path. So it imports next to nothing. That it works is what integration tests see, in manifests.
package retain

import (
	"github.com/moby/buildkit/util/compression"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// Annotations are those that BuildKit keeps.
var Annotations = add(
	zstdchunked.ChecksumAnnotation, zstdchunked.PositionAnnotation, zstdchunked.TarSplitAnnotation, zstdchunked.StargzPositionAnnotation)

func add(annotations ...string) []string {
	compression.EStargzAnnotations = append(compression.EStargzAnnotations, annotations...)
	return annotations
}
