package exporter

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/contentutil"
	bkpush "github.com/moby/buildkit/util/push"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
)

// Where stargz-snapshotter looks for tables of contents that aren't in the layers: in an image of the same tag and this suffix, in a layer with an
// annotation that says whose it is. https://github.com/containerd/stargz-snapshotter/blob/main/docs/smaller-estargz.md
const (
	tocImageSuffix   = "-esgztoc"
	annotationTOCFor = "containerd.io/snapshot/stargz/layer.digest"
)

// The labels of a layer of ours whose TOC is in a blob of its own. BuildKit must not know the TOC's digest: it would be in the manifests of exports
// that leave the TOC out, for which the layer is one of gzip like any other.
const (
	tocLabel     = "buildkitd-lazy/external-toc"                     // a tocOf
	tocHeldLabel = "containerd.io/gc.ref.content.buildkitd-lazy-toc" // keeps the blob as long as the layer
)

// A tocOf is the TOC of a layer.
type tocOf struct {
	TOC  digest.Digest `json:"toc"` // of its JSON
	Blob digest.Digest `json:"blob"`
	Size int64         `json:"size"`
}

// storeTOC stores the external TOC of a layer, and returns the labels that the layer is to have.
func storeTOC(ctx context.Context, cs content.Store, w *estargz.Written) (map[string]string, error) {
	of := tocOf{TOC: w.TOCDigest, Blob: digest.FromBytes(w.TOC), Size: int64(len(w.TOC))}
	desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: of.Blob, Size: of.Size}
	if err := content.WriteBlob(ctx, cs, "external-toc-"+of.Blob.String(), bytes.NewReader(w.TOC), desc); err != nil {
		return nil, fmt.Errorf("store the table of contents of eStargz layer %s: %w", w.Digest, err)
	}
	said, err := json.Marshal(of)
	if err != nil {
		return nil, err
	}
	return map[string]string{tocLabel: string(said), tocHeldLabel: of.Blob.String()}, nil
}

// tocs are the external TOCs of an export, by the layers that they belong to.
type tocs struct {
	mu   sync.Mutex
	of   map[digest.Digest]tocOf
	uses map[digest.Digest]int // of a layer, by platforms
}

func newTOCs() *tocs { return &tocs{of: map[digest.Digest]tocOf{}, uses: map[digest.Digest]int{}} }

// annotate adds the annotation by which readers know that a layer has a TOC, if it has an external one, and takes note of it.
func (t *tocs) annotate(desc *ocispecs.Descriptor, info content.Info) error {
	said, ok := info.Labels[tocLabel]
	if !ok {
		return nil
	}
	var of tocOf
	if err := json.Unmarshal([]byte(said), &of); err != nil {
		return fmt.Errorf("label %s of layer %s: %w", tocLabel, desc.Digest, err)
	}
	desc.Annotations = maps.Clone(desc.Annotations)
	if desc.Annotations == nil {
		desc.Annotations = map[string]string{}
	}
	desc.Annotations[stargz.TOCJSONDigestAnnotation] = of.TOC.String()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.of[desc.Digest] = of
	t.uses[desc.Digest]++
	return nil
}

// drop forgets a layer that has become another one, unless it's also exported as it is.
func (t *tocs) drop(layer digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uses[layer]--; t.uses[layer] <= 0 {
		delete(t.of, layer)
		delete(t.uses, layer)
	}
}

// Registries are where images of TOCs are pushed to.
type Registries struct {
	Content  content.Store
	Sessions *session.Manager
	Hosts    docker.RegistryHosts
}

// A tocImage is ready to be pushed: it's in memory.
type tocImage struct {
	blobs    contentutil.Buffer
	manifest digest.Digest
}

// image makes the image of TOCs. There is none if no layer has one.
func (r *Registries) image(ctx context.Context, t *tocs) (*tocImage, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.of) == 0 {
		return nil, nil
	}
	img := &tocImage{blobs: contentutil.NewBuffer()}
	m := ocispecs.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest}
	for _, layer := range slices.Sorted(maps.Keys(t.of)) {
		of := t.of[layer]
		desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: of.Blob, Size: of.Size}
		b, err := content.ReadBlob(ctx, r.Content, desc)
		if err != nil {
			return nil, fmt.Errorf("read the table of contents of layer %s: %w", layer, err)
		}
		if err := img.add(ctx, desc, b); err != nil {
			return nil, err
		}
		desc.Annotations = map[string]string{annotationTOCFor: layer.String()}
		m.Layers = append(m.Layers, desc)
	}
	var err error
	if m.Config, err = img.addJSON(ctx, ocispecs.MediaTypeImageConfig, ocispecs.ImageConfig{}); err != nil {
		return nil, err
	}
	desc, err := img.addJSON(ctx, ocispecs.MediaTypeImageManifest, m)
	img.manifest = desc.Digest
	return img, err
}

func (i *tocImage) addJSON(ctx context.Context, mediaType string, v any) (desc ocispecs.Descriptor, err error) {
	b, err := json.Marshal(v)
	if err != nil {
		return desc, err
	}
	desc = ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return desc, i.add(ctx, desc, b)
}

func (i *tocImage) add(ctx context.Context, desc ocispecs.Descriptor, b []byte) error {
	if err := content.WriteBlob(ctx, i.blobs, desc.Digest.String(), bytes.NewReader(b), desc); err != nil {
		return fmt.Errorf("make the image of tables of contents: %w", err)
	}
	return nil
}

// push pushes the image of TOCs to where readers look for it, for each of the names that an image is pushed to, which are separated by commas.
func (r *Registries) push(ctx context.Context, img *tocImage, names string, insecure bool, session string) error {
	for name := range strings.SplitSeq(names, ",") {
		ref, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return err
		}
		tagged, ok := reference.TagNameOnly(ref).(reference.NamedTagged)
		if !ok {
			continue // a digest, by which nobody finds it
		}
		ref, err = reference.WithTag(reference.TrimNamed(ref), tagged.Tag()+tocImageSuffix)
		if err != nil {
			return fmt.Errorf("%s has no place for its tables of contents, %s is no tag: %w", name, tagged.Tag()+tocImageSuffix, err)
		}
		if err := bkpush.Push(ctx, r.Sessions, session, img.blobs, img.blobs, img.manifest, ref.String(), insecure, r.Hosts, false, nil); err != nil {
			return fmt.Errorf("failed to push the tables of contents to %s: %w", ref, err)
		}
	}
	return nil
}
