package convert

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
)

const (
	maxConfig = 16 << 20 // bytes
	maxDepth  = 4        // of indexes in indexes

	// How an index says that a manifest is about another one of it, as BuildKit writes attestations.
	annotationAttestation = "vnd.docker.reference.type"
	annotationReference   = "vnd.docker.reference.digest"
)

// A node is a manifest or an index of the source.
type node struct {
	desc     ocispecs.Descriptor
	manifest object
	raw      []byte
	subject  digest.Digest // "" if there is none

	// Of an index: the members that are wanted, in order, their descriptors, and the number of all.
	children []*node
	entries  []object
	all      int

	// Of a manifest.
	config *blobJob
	layers []*blobJob
	image  bool // whether its layers are an image's
	// Of an image: its configuration, and the tars that it is made of.
	settings object
	diffIDs  []digest.Digest

	now  ocispecs.Descriptor // what it has become
	done bool
}

// read reads a manifest or index and all below it that is wanted. It is nil if nothing is.
func (c *conversion) read(ctx context.Context, desc ocispecs.Descriptor, platform *ocispecs.Platform, depth int) (*node, error) {
	if n := c.nodes[desc.Digest]; n != nil {
		return n, nil
	}
	if desc.MediaType == images.MediaTypeDockerSchema1Manifest {
		return nil, fmt.Errorf("%s has a manifest of schema 1, which registries stopped to take in 2024: push it anew", c.src)
	}
	isIndex := images.IsIndexType(desc.MediaType)
	if !isIndex && !images.IsManifestType(desc.MediaType) {
		return nil, fmt.Errorf("%s refers to %s of the type %q, which is neither a manifest nor an index", c.src, desc.Digest, desc.MediaType)
	}
	if depth == 0 {
		return nil, fmt.Errorf("%s: indexes are nested deeper than %d", c.src, maxDepth)
	}
	raw, err := repository.ReadAll(ctx, c.src, desc, repository.MaxManifest)
	if err != nil {
		return nil, err
	}
	n := &node{desc: ocispecs.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}, raw: raw}
	if err := c.decode(desc, raw, &n.manifest); err != nil {
		return nil, err
	}
	if s := n.manifest.get("subject"); s != nil {
		var subject ocispecs.Descriptor
		if err := c.decode(desc, s, &subject); err != nil {
			return nil, err
		}
		n.subject = subject.Digest
	}
	if isIndex {
		err = c.readIndex(ctx, n, depth)
	} else if err = c.readManifest(ctx, n, platform); err == nil && n.layers == nil && n.config == nil {
		return nil, nil // of a platform that isn't wanted
	}
	if err != nil {
		return nil, err
	}
	c.nodes[desc.Digest] = n
	return n, nil
}

func (c *conversion) readIndex(ctx context.Context, n *node, depth int) error {
	var entries []object
	if err := c.decode(n.desc, n.manifest.get("manifests"), &entries); err != nil {
		return err
	}
	n.all = len(entries)
	descs, children := make([]ocispecs.Descriptor, n.all), make([]*node, n.all)
	var left []digest.Digest // out
	for i, entry := range entries {
		raw, err := entry.MarshalJSON()
		if err != nil {
			return err
		}
		if err := c.decode(n.desc, raw, &descs[i]); err != nil {
			return err
		}
		if descs[i].Annotations[annotationAttestation] != "" {
			continue
		}
		if p := descs[i].Platform; p == nil || c.wants(*p) {
			children[i], err = c.read(ctx, descs[i], p, depth-1)
			if errdefs.IsNotFound(err) && p != nil {
				err = fmt.Errorf("the image for %s is in the index, and not there: %w; convert the other platforms, or get the source whole", platforms.FormatAll(*p), err)
			}
			if err != nil {
				return err
			}
		}
		if children[i] == nil {
			left = append(left, descs[i].Digest)
		}
	}
	for i, desc := range descs {
		if desc.Annotations[annotationAttestation] != "" && !slices.Contains(left, digest.Digest(desc.Annotations[annotationReference])) {
			var err error
			if children[i], err = c.read(ctx, desc, nil, depth-1); err != nil {
				return err
			}
		}
		if children[i] != nil {
			n.children, n.entries = append(n.children, children[i]), append(n.entries, entries[i])
		}
	}
	return nil
}

func (c *conversion) wants(p ocispecs.Platform) bool {
	if c.wanted == nil || c.wanted.Match(p) {
		return true
	}
	c.others = append(c.others, platforms.FormatAll(p))
	return false
}

// readManifest reads a manifest; platform is what an index says of it, and nil otherwise.
func (c *conversion) readManifest(ctx context.Context, n *node, platform *ocispecs.Platform) error {
	var m struct {
		Config ocispecs.Descriptor
		Layers []ocispecs.Descriptor
	}
	if err := c.decode(n.desc, n.raw, &m); err != nil {
		return err
	}
	isLayer := func(l ocispecs.Descriptor) bool { return images.IsLayerType(l.MediaType) }
	if !images.IsConfigType(m.Config.MediaType) || len(m.Layers) > 0 && !slices.ContainsFunc(m.Layers, isLayer) {
		// An artifact; an attestation of BuildKit's has an image's configuration and layers of its own types.
		return c.readArtifact(n, m.Config, m.Layers)
	}
	p, err := repository.ReadAll(ctx, c.src, m.Config, maxConfig)
	if err != nil {
		return err
	}
	var config ocispecs.Image
	if err := c.decode(m.Config, p, &config); err != nil {
		return err
	}
	if platform == nil {
		if !c.wants(config.Platform) {
			return nil
		}
		platform = &config.Platform
	}
	if err := c.decode(m.Config, p, &n.settings); err != nil {
		return err
	}
	n.diffIDs = config.RootFS.DiffIDs
	if len(n.diffIDs) != len(m.Layers) {
		return fmt.Errorf("image %s of %s has %d layers, and DiffIDs of %d", n.desc.Digest, c.src, len(m.Layers), len(n.diffIDs))
	}
	n.image = true
	c.found++
	n.config = &blobJob{desc: m.Config, content: p} // not one to move: it's written anew
	for i, l := range m.Layers {
		b := c.blob(l, roleLayer, platforms.FormatAll(*platform))
		if err := b.plan(c.opt.Format, n.diffIDs[i], config.OS); err != nil {
			return fmt.Errorf("image %s of %s: %w", n.desc.Digest, c.src, err)
		}
		n.layers = append(n.layers, b)
	}
	return nil
}

// readArtifact notes the blobs of what isn't an image. It is copied.
func (c *conversion) readArtifact(n *node, config ocispecs.Descriptor, layers []ocispecs.Descriptor) error {
	n.config, c.artifact = c.blob(config, roleOther, ""), config.MediaType
	for _, l := range layers {
		n.layers = append(n.layers, c.blob(l, roleOther, ""))
	}
	for _, b := range append(slices.Clone(n.layers), n.config) {
		if err := b.desc.Digest.Validate(); err != nil {
			return fmt.Errorf("manifest %s of %s: digest %q: %w", n.desc.Digest, c.src, b.desc.Digest, err)
		}
	}
	return nil
}

// finish writes what a manifest or index has become, after all that it refers to. tag, if not empty, names it.
func (c *conversion) finish(ctx context.Context, n *node, tag string) error {
	if n.done {
		return nil
	}
	n.done = true // also for what refers to itself, which no digest can
	for _, child := range n.children {
		if err := c.finish(ctx, child, ""); err != nil {
			return err
		}
	}
	raw, mediaType := n.raw, n.desc.MediaType
	changed, err := c.rewrite(ctx, n)
	if err != nil {
		return fmt.Errorf("%s of %s: %w", n.desc.Digest, c.src, err)
	}
	if changed {
		if mediaType = oci(mediaType); n.manifest.get("mediaType") != nil {
			if err := n.manifest.set("mediaType", mediaType); err != nil {
				return err
			}
		}
		if raw, err = n.manifest.MarshalJSON(); err != nil {
			return err
		}
	}
	n.now = ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if n.desc.Digest.Algorithm() != digest.SHA256 && !changed {
		n.now.Digest = n.desc.Digest
	}
	return c.dst.PutManifest(ctx, n.now, raw, tag)
}

// rewrite makes a manifest or index say what has become of that which it refers to, and reports whether that is something else.
func (c *conversion) rewrite(ctx context.Context, n *node) (changed bool, err error) {
	if about := c.nodes[n.subject]; n.subject != "" && about != nil {
		if err := c.finish(ctx, about, ""); err != nil {
			return false, err
		}
		if about.now.Digest != about.desc.Digest {
			if err := n.refer("subject", about.now); err != nil {
				return false, err
			}
			changed = true
		}
	}
	var further bool
	switch {
	case n.image:
		further, err = c.rewriteImage(ctx, n)
	case images.IsIndexType(n.desc.MediaType):
		further, err = c.rewriteIndex(n)
	}
	return changed || further, err
}

// refer makes a member of a manifest describe something else.
func (n *node) refer(key string, to ocispecs.Descriptor) error {
	var o object
	if err := o.UnmarshalJSON(n.manifest.get(key)); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if err := o.describe(to); err != nil {
		return err
	}
	return n.manifest.set(key, o)
}

// describe makes a descriptor one of something else; its annotations and all other members stay, but for a copy of the content.
func (o *object) describe(to ocispecs.Descriptor) error {
	for _, m := range []struct {
		key string
		v   any
	}{{"mediaType", to.MediaType}, {"digest", to.Digest}, {"size", to.Size}} {
		if err := o.set(m.key, m.v); err != nil {
			return err
		}
	}
	o.remove("data")
	return nil
}

func (c *conversion) rewriteImage(ctx context.Context, n *node) (bool, error) {
	diffIDs := slices.Clone(n.diffIDs)
	var layers []object
	if err := c.decode(n.desc, n.manifest.get("layers"), &layers); err != nil {
		return false, err
	}
	changed := n.desc.MediaType != oci(n.desc.MediaType) || n.config.desc.MediaType != oci(n.config.desc.MediaType)
	for i, b := range n.layers {
		diffIDs[i] = b.diffID
		to := b.now
		if to.Digest == b.desc.Digest && to.MediaType == b.desc.MediaType && b.was == nil {
			continue
		}
		changed = true
		if err := layers[i].describe(to); err != nil {
			return false, err
		}
		if b.was == nil {
			continue
		}
		layers[i].remove("urls") // they lead to the one before
		if err := layers[i].annotate(func(a map[string]string) {
			maps.DeleteFunc(a, func(k, _ string) bool { return ofFormat(k) })
			maps.Copy(a, b.was.Annotations)
			a[annotationFrom], a[annotationBy] = b.was.From.String(), b.was.By
		}); err != nil {
			return false, err
		}
	}
	if !changed {
		return false, c.putConfig(ctx, n.config.desc, n.config.content)
	}
	config := ocispecs.Descriptor{MediaType: oci(n.config.desc.MediaType), Digest: n.config.desc.Digest, Size: n.config.desc.Size}
	content := n.config.content
	if !slices.Equal(diffIDs, n.diffIDs) {
		var rootfs object
		if err := rootfs.UnmarshalJSON(n.settings.get("rootfs")); err != nil {
			return false, fmt.Errorf("configuration %s: rootfs: %w", config.Digest, err)
		}
		if err := rootfs.set("diff_ids", diffIDs); err != nil {
			return false, err
		}
		if err := n.settings.set("rootfs", rootfs); err != nil {
			return false, err
		}
		var err error
		if content, err = n.settings.MarshalJSON(); err != nil {
			return false, err
		}
		config.Digest, config.Size = digest.FromBytes(content), int64(len(content))
	}
	if err := c.putConfig(ctx, config, content); err != nil {
		return false, err
	}
	if err := n.refer("config", config); err != nil {
		return false, err
	}
	return true, n.manifest.set("layers", layers)
}

func (c *conversion) putConfig(ctx context.Context, desc ocispecs.Descriptor, content []byte) error {
	if ok, err := c.dst.Has(ctx, desc); ok || err != nil {
		return err
	}
	if ok, err := c.dst.Mount(ctx, desc, c.src); ok || err != nil { // if it's the source's
		return err
	}
	return repository.Put(ctx, c.dst, desc, content)
}

func (c *conversion) rewriteIndex(n *node) (bool, error) {
	changed := n.all != len(n.children) || n.desc.MediaType != oci(n.desc.MediaType)
	for i, child := range n.children {
		entry := &n.entries[i]
		if child.now.Digest != child.desc.Digest {
			changed = true
			if err := entry.describe(child.now); err != nil {
				return false, err
			}
		}
		var desc ocispecs.Descriptor
		raw, err := entry.MarshalJSON()
		if err == nil {
			err = c.decode(n.desc, raw, &desc)
		}
		if err != nil {
			return false, err
		}
		about := c.nodes[digest.Digest(desc.Annotations[annotationReference])]
		if about == nil || about.now.Digest == about.desc.Digest {
			continue
		}
		changed = true
		if err := entry.annotate(func(a map[string]string) { a[annotationReference] = about.now.Digest.String() }); err != nil {
			return false, err
		}
	}
	if !changed {
		return false, nil
	}
	return true, n.manifest.set("manifests", n.entries)
}

// annotate changes a descriptor's annotations. They are sorted then, as their order means nothing.
func (o *object) annotate(change func(map[string]string)) error {
	annotations := map[string]string{}
	if p := o.get("annotations"); p != nil {
		if err := json.Unmarshal(p, &annotations); err != nil {
			return fmt.Errorf("annotations: %w", err)
		}
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	change(annotations)
	if len(annotations) == 0 {
		o.remove("annotations")
		return nil
	}
	return o.set("annotations", annotations)
}

// ofFormat reports whether an annotation says what a layer's blob is like, so that it isn't true of another blob with the same files.
func ofFormat(annotation string) bool {
	for _, prefix := range []string{
		"containerd.io/snapshot/stargz/", "io.containers.estargz.", "io.containers.zstd-chunked.", "io.github.containers.zstd-chunked.",
		"containerd.io/uncompressed", annotationFrom, annotationBy,
	} {
		if strings.HasPrefix(annotation, prefix) {
			return true
		}
	}
	return false
}

// oci returns the media type that stands for one of Docker's.
func oci(mediaType string) string {
	switch mediaType {
	case images.MediaTypeDockerSchema2Manifest:
		return ocispecs.MediaTypeImageManifest
	case images.MediaTypeDockerSchema2ManifestList:
		return ocispecs.MediaTypeImageIndex
	case images.MediaTypeDockerSchema2Config:
		return ocispecs.MediaTypeImageConfig
	case images.MediaTypeDockerSchema2Layer:
		return ocispecs.MediaTypeImageLayer
	case images.MediaTypeDockerSchema2LayerGzip:
		return ocispecs.MediaTypeImageLayerGzip
	case images.MediaTypeDockerSchema2LayerZstd:
		return ocispecs.MediaTypeImageLayerZstd
	case images.MediaTypeDockerSchema2LayerForeign:
		return ocispecs.MediaTypeImageLayerNonDistributable //nolint:staticcheck // deprecated, but in people's images
	case images.MediaTypeDockerSchema2LayerForeignGzip:
		return ocispecs.MediaTypeImageLayerNonDistributableGzip //nolint:staticcheck // deprecated, but in people's images
	}
	return mediaType
}
