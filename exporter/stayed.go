package exporter

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/progress"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// stayed are layers above the base that an export leaves in another format than it was asked for, as that is what BuildKit has made of them before.
type stayed struct {
	mu     sync.Mutex
	wanted string
	layers map[digest.Digest]string // their formats
}

// note takes note of the layers of a remote that aren't of the type.
func (s *stayed) note(ctx context.Context, remote *solver.Remote, base []digest.Digest, t compression.Type) {
	below := true // whether all layers so far are the base's
	for i, desc := range remote.Descriptors {
		below = below && i < len(base) && base[i].String() == desc.Annotations[labels.LabelUncompressed]
		if below || !images.IsLayerType(desc.MediaType) {
			continue
		}
		format := formatOf(desc)
		if format == t.String() {
			continue
		}
		// One that can't be lazy is of the format all the same, and so is one whose TOC is elsewhere.
		if info, err := remote.Provider.Info(ctx, desc.Digest); err == nil && (isOurs(info.Labels) && t.String() == nameEStargz || info.Labels[lossyLabel] != "") {
			continue
		}
		s.mu.Lock()
		if s.layers == nil {
			s.wanted = t.String()
			s.layers = map[digest.Digest]string{}
		}
		s.layers[desc.Digest] = format
		s.mu.Unlock()
	}
}

// formatOf names a layer's format as a user does.
func formatOf(desc ocispecs.Descriptor) string {
	if desc.Annotations[stargz.TOCJSONDigestAnnotation] != "" {
		return nameEStargz
	}
	if toc, _, err := zstdchunked.Find(desc.Annotations); err == nil && toc != "" {
		return nameZstdChunked
	}
	t, err := compression.FromMediaType(desc.MediaType)
	if err != nil {
		return desc.MediaType
	}
	return t.String()
}

// warn tells the user of them.
func (s *stayed) warn(ctx context.Context) error {
	if text := s.text(); text != "" {
		return warn(ctx, text)
	}
	return nil
}

func (s *stayed) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	what, stay := "a layer that this build has made stays", "it is"
	switch n := len(s.layers); {
	case n == 0:
		return ""
	case n > 1:
		what, stay = fmt.Sprintf("%d layers that this build has made stay", n), "they are"
	}
	formats := slices.Compact(slices.Sorted(maps.Values(s.layers)))
	return fmt.Sprintf("compression=%s: %s %s, as %s in the cache; with force-compression=true all layers are converted", s.wanted, what, strings.Join(formats, " or "), stay)
}

// warn shows the user a warning.
func warn(ctx context.Context, text string) error {
	pw, ok, _ := progress.NewFromContext(ctx)
	if !ok {
		return nil
	}
	if err := pw.Write(identity.NewID(), client.VertexWarning{Level: 1, Short: []byte(text)}); err != nil {
		return err
	}
	return pw.Close()
}
