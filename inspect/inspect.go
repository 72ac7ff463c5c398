// Package inspect says which layers of an image are lazy, and of the others why they aren't.
//
// It asks what a build asks: [source.Table] says which layers are tried, and [snapshot.Peek] opens their tables of contents as a mount does. So
// a reason is the one that a build would show. What it can't know is what depends on the host that builds, and whether a directory that a lazy
// layer has no entry for is hidden by it if a layer that has to be unpacked has it.
//
// Of each layer little more than the table of contents is read, of several at the same time. Nothing is kept.
package inspect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
	"github.com/buildkitd-lazy/buildkitd-lazy/source"
)

// A Report is about what a reference names. Its JSON is the command's interface for programs.
type Report struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"`
	Images []Image       `json:"images"` // several if it is an index
}

// An Image is that of one platform.
type Image struct {
	Digest   digest.Digest `json:"digest"`
	Platform string        `json:"platform"` // e.g. "linux/amd64"
	Lazy     int           `json:"lazy"`     // number of lazy layers
	Size     int64         `json:"size"`     // bytes of all layers, compressed
	Layers   []Layer       `json:"layers"`   // bottom first
}

// A Layer is one that an image has. What stands in a table of contents is 0 or "" without one.
type Layer struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	Format    string        `json:"format"` // "estargz", "zstd:chunked", "gzip", "zstd", "tar", or what stands for it in the media type
	Size      int64         `json:"size"`   // bytes
	Lazy      bool          `json:"lazy"`
	Reason    string        `json:"reason,omitempty"` // why it isn't lazy

	TOCDigest digest.Digest `json:"tocDigest,omitempty"`
	TOCSize   int64         `json:"tocSize,omitempty"` // bytes, compressed
	Entries   int           `json:"entries,omitempty"` // files of all types, by name
	Chunks    int           `json:"chunks,omitempty"`
	Frames    int           `json:"frames,omitempty"`   // what is decompressed at once
	Landmark  string        `json:"landmark,omitempty"` // Prefetch, NoPrefetch or None
	Prefetch  int64         `json:"prefetch,omitempty"` // bytes in front of the landmark
}

// What a layer's maker says of fetching some of it ahead of use.
const (
	Prefetch   = "prefetch"    // that it should be, up to a landmark
	NoPrefetch = "no-prefetch" // that nothing is worth it
	None       = "none"        // nothing
)

// Options say what of an index is looked at.
type Options struct {
	// Platforms are the ones wanted. Nil is all.
	Platforms []ocispecs.Platform
}

const (
	atOnce    = 4        // tables of contents: one may take 100 MB while it is read
	maxConfig = 16 << 20 // bytes
	maxDepth  = 4        // of indexes in indexes
)

// Inspect looks at what the repository's reference names. An error means that the image can't be read; that a layer isn't lazy is
// none.
func Inspect(ctx context.Context, r repository.Repository, opt Options) (Report, error) {
	desc, err := r.Resolve(ctx)
	if err != nil {
		return Report{}, err
	}
	in := &inspection{r: r}
	if opt.Platforms != nil {
		in.wanted = platforms.Any(opt.Platforms...)
	}
	if err := in.walk(ctx, desc, maxDepth); err != nil {
		return Report{}, err
	}
	if len(in.images) == 0 {
		if len(in.others) > 0 {
			var wanted []string
			for _, p := range opt.Platforms {
				wanted = append(wanted, platforms.FormatAll(p))
			}
			return Report{}, fmt.Errorf("%s has no image for %s, but for %s", r, strings.Join(wanted, ", "), strings.Join(in.others, ", "))
		}
		return Report{}, fmt.Errorf("%s is no container image: %s", r, in.what(desc))
	}
	return Report{Ref: r.String(), Digest: desc.Digest, Images: in.images}, nil
}

// Eager names the layers that aren't lazy, with their reasons.
func (r *Report) Eager() []string {
	var eager []string
	for _, im := range r.Images {
		for _, l := range im.Layers {
			if !l.Lazy {
				eager = append(eager, fmt.Sprintf("%s of %s: %s", l.Digest, im.Platform, l.Reason))
			}
		}
	}
	return eager
}

// inspection is one call of Inspect.
type inspection struct {
	r      repository.Repository
	wanted platforms.Matcher // nil for all
	images []Image
	others []string // platforms that aren't wanted
	kinds  []string // of artifacts
}

// what says of something that isn't an image what it is.
func (in *inspection) what(desc ocispecs.Descriptor) string {
	if len(in.kinds) > 0 {
		return "it's " + strings.Join(in.kinds, ", ")
	}
	return desc.MediaType
}

func (in *inspection) walk(ctx context.Context, desc ocispecs.Descriptor, depth int) error {
	switch {
	case images.IsIndexType(desc.MediaType):
		return in.index(ctx, desc, depth)
	case images.IsManifestType(desc.MediaType):
		return in.manifest(ctx, desc)
	case desc.MediaType == images.MediaTypeDockerSchema1Manifest:
		return fmt.Errorf("%s has a manifest of schema 1, which registries stopped to take in 2024: push it anew", in.r)
	}
	return nil // of a kind that isn't an image
}

func (in *inspection) index(ctx context.Context, desc ocispecs.Descriptor, depth int) error {
	if depth == 0 {
		return fmt.Errorf("%s: indexes are nested deeper than %d", in.r, maxDepth)
	}
	var index ocispecs.Index
	if err := in.read(ctx, desc, repository.MaxManifest, &index); err != nil {
		return err
	}
	for _, m := range index.Manifests {
		if m.Annotations["vnd.docker.reference.type"] != "" {
			continue // an attestation
		}
		if m.Platform != nil && !in.wants(*m.Platform) {
			continue
		}
		if err := in.walk(ctx, m, depth-1); err != nil {
			return err
		}
	}
	return nil
}

func (in *inspection) wants(p ocispecs.Platform) bool {
	if in.wanted == nil || in.wanted.Match(p) {
		return true
	}
	in.others = append(in.others, platforms.FormatAll(p))
	return false
}

func (in *inspection) manifest(ctx context.Context, desc ocispecs.Descriptor) error {
	var m ocispecs.Manifest
	if err := in.read(ctx, desc, repository.MaxManifest, &m); err != nil {
		return err
	}
	if !images.IsConfigType(m.Config.MediaType) {
		in.kinds = append(in.kinds, m.Config.MediaType)
		return nil // an artifact
	}
	var config ocispecs.Image
	if err := in.read(ctx, m.Config, maxConfig, &config); err != nil {
		return err
	}
	if !in.wants(config.Platform) {
		return nil
	}
	im := Image{Digest: desc.Digest, Platform: platforms.FormatAll(config.Platform), Layers: make([]Layer, len(m.Layers))}
	opened := make([]*layer.Layer, len(m.Layers))
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(atOnce)
	for i, l := range m.Layers {
		eg.Go(func() (err error) {
			im.Layers[i], opened[i], err = in.layer(ctx, l)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	var below []*layer.Layer // topmost first
	for i := range im.Layers {
		l := &im.Layers[i]
		if opened[i] != nil {
			if err := snapshot.PeekBelow(l.Digest, opened[i], below); err != nil {
				l.eager(err)
			}
			below = append([]*layer.Layer{opened[i]}, below...)
		}
		if l.Lazy {
			im.Lazy++
		}
		im.Size += l.Size
	}
	in.images = append(in.images, im)
	return nil
}

// layer returns what there is to say of a layer, and what it has, if it can be opened.
func (in *inspection) layer(ctx context.Context, desc ocispecs.Descriptor) (Layer, *layer.Layer, error) {
	toc, format, reason := source.Table(desc)
	l := Layer{Digest: desc.Digest, MediaType: desc.MediaType, Format: formatOf(desc), Size: desc.Size, Reason: reason}
	if reason != "" {
		return l, nil, nil
	}
	l.Format, _, _ = strings.Cut(format, "@")
	from, err := in.r.ReaderAt(ctx, desc)
	if err != nil {
		return l, nil, err
	}
	defer from.Close()
	ref, hostsOf, remote := repository.Spec(in.r)
	var hosts blob.Hosts
	if remote {
		hosts = func() ([]docker.RegistryHost, error) { return hostsOf(ref.Hostname()) }
	}
	c, err := snapshot.Peek(ctx, from, desc, toc, format, ref, hosts)
	if err != nil {
		if ctx.Err() != nil {
			return l, nil, context.Cause(ctx)
		}
		l.eager(err)
		return l, nil, nil
	}
	l.Lazy = true
	l.TOCDigest, l.TOCSize = toc, c.Size
	l.Chunks, l.Frames = len(c.Layer.Chunks), len(c.Layer.Frames)
	l.Entries = entriesOf(c.Layer)
	switch c.Prefetch {
	case estargz.NoLandmark:
		l.Landmark = None
	case 0:
		l.Landmark = NoPrefetch
	default:
		l.Landmark, l.Prefetch = Prefetch, c.Prefetch
	}
	return l, c.Layer, nil
}

// eager notes why a layer is pulled, in the words of builds.
func (l *Layer) eager(err error) {
	l.Lazy, l.Reason = false, err.Error()
	if m, ok := errors.AsType[*snapshot.MountError](err); ok {
		l.Reason = m.Reason()
	}
}

// entriesOf counts the names in a layer that its table of contents has.
func entriesOf(l *layer.Layer) int {
	n := 0
	for _, in := range l.All() {
		for _, e := range in.Entries {
			if child := l.Inode(e.Inode); !child.Implied {
				n++
			}
		}
	}
	return n
}

// formatOf names the format of a layer that isn't lazy.
func formatOf(desc ocispecs.Descriptor) string {
	compression, err := images.DiffCompression(context.Background(), desc.MediaType)
	switch {
	case strings.HasSuffix(desc.MediaType, "+encrypted"):
		return "encrypted"
	case err != nil:
		return desc.MediaType
	case images.IsNonDistributable(desc.MediaType):
		return "foreign"
	case compression == "":
		return "tar"
	case compression == "unknown": // Docker's media type of tars is mostly a gzip'ed one's
		return "gzip"
	}
	return compression
}

// read decodes content that is small.
func (in *inspection) read(ctx context.Context, desc ocispecs.Descriptor, limit int64, to any) error {
	p, err := repository.ReadAll(ctx, in.r, desc, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(p, to); err != nil {
		return fmt.Errorf("%s of %s, %s: %w", desc.Digest, in.r, desc.MediaType, err)
	}
	return nil
}
