package exporter

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
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

// stayed are layers of an export that aren't in the format it was asked for: those above the base that BuildKit has made in another one before, and
// those that can't have a table of contents.
type stayed struct {
	of string // what is exported, as in "the registry cache"; "" is the image

	mu     sync.Mutex
	wanted string
	layers map[digest.Digest]string // their formats
	lossy  map[digest.Digest]string // the files because of which
}

// noteImage takes note of the layers of an image that aren't of the type. Its base has these DiffIDs.
func (s *stayed) noteImage(ctx context.Context, remote *solver.Remote, base []digest.Digest, comp compression.Config) {
	n := baseLayers(remote.Descriptors, base)
	s.note(ctx, remote, comp, func(i int) bool { return i < n })
}

// note takes note of the layers of a remote that aren't of the type. What isn't to be converted is no matter unless that is forced.
func (s *stayed) note(ctx context.Context, remote *solver.Remote, comp compression.Config, isBase func(i int) bool) {
	wanted := comp.Type.String()
	for i, desc := range remote.Descriptors {
		if !comp.Force && isBase(i) || !images.IsLayerType(desc.MediaType) {
			continue
		}
		format := formatOf(desc)
		if format == wanted {
			continue
		}
		info, err := remote.Provider.Info(ctx, desc.Digest)
		label, ours := lossyLabel, false
		if wanted == nameEStargz {
			label, ours = estargzLossyLabel, isOurs(info.Labels) // one whose TOC is elsewhere is of the format all the same
		}
		file := info.Labels[label]
		switch {
		case err == nil && file != "":
			if file != noFile {
				s.add(&s.lossy, wanted, desc.Digest, file)
			}
		case comp.Force, err == nil && ours:
		default:
			s.add(&s.layers, wanted, desc.Digest, format)
		}
	}
}

func (s *stayed) add(to *map[digest.Digest]string, wanted string, layer digest.Digest, what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if *to == nil {
		*to = map[digest.Digest]string{}
	}
	s.wanted, (*to)[layer] = wanted, what
}

// quoted is a file's name as a label can have it.
func quoted(file string) string { return fmt.Sprintf("%.200q", file) }

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
	for _, text := range s.texts() {
		if err := warn(ctx, text); err != nil {
			return err
		}
	}
	return nil
}

func (s *stayed) texts() (texts []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := s.wanted
	if s.of != "" {
		wanted += " of " + s.of
	}
	if n := len(s.layers); n > 0 {
		what, stay := "a layer that this build has made stays", "it is"
		if n > 1 {
			what, stay = fmt.Sprintf("%d layers that this build has made stay", n), "they are"
		}
		texts = append(texts, fmt.Sprintf("compression=%s: %s %s, as %s in the cache; with force-compression=true all layers are converted", wanted, what, these(s.layers, " or "), stay))
	}
	if n := len(s.lossy); n > 0 {
		what, tars := "a layer is", "its tar says"
		if n > 1 {
			what, tars = fmt.Sprintf("%d layers are", n), "their tars say"
		}
		texts = append(texts, fmt.Sprintf("compression=%s: %s not lazy, as a table of contents can't say what %s of %s", wanted, what, tars, these(s.lossy, " and ")))
	}
	return texts
}

// these are the values, each once.
func these(of map[digest.Digest]string, and string) string {
	return strings.Join(slices.Compact(slices.Sorted(maps.Values(of))), and)
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
