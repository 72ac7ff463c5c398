package snapshot

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Labels of a layer. BuildKit hands them to Prepare as they are and once more
// with ".<id>" appended, and adds the ids of sessions which hold credentials.
const (
	// LabelRef is the image reference that a layer was resolved by.
	LabelRef = "containerd.io/snapshot/remote/stargz.reference"
	// LabelDigest is the digest of the layer's blob.
	LabelDigest = "containerd.io/snapshot/remote/stargz.digest"
	// LabelLayers lists, separated by commas, the digests of this layer's blob and
	// of those above it which can be mounted lazily.
	LabelLayers = "containerd.io/snapshot/remote/stargz.layers"
	// LabelSizes lists the blob sizes of LabelLayers in bytes, in that order.
	LabelSizes = "containerd.io/snapshot/remote/buildkitd-lazy.sizes"
	// LabelTOCs lists the TOC digests of LabelLayers, in that order.
	LabelTOCs = "containerd.io/snapshot/remote/buildkitd-lazy.tocs"
	// LabelFormats lists the formats of LabelLayers, in that order: FormatEStargz, or what FormatLabel returns. Without it, layers are
	// eStargz.
	LabelFormats = "containerd.io/snapshot/remote/buildkitd-lazy.formats"
	// LabelTarget names the snapshot that Prepare shall commit.
	LabelTarget = "containerd.io/snapshot.ref"

	labelSession = "containerd.io/snapshot/remote/stargz.session."
)

// layerSource is what labels say of where a layer's blob is.
type layerSource struct {
	ref      reference.Spec
	digest   digest.Digest
	sizes    map[digest.Digest]int64 // bytes; of this layer and those above
	formats  map[string]string       // of the same
	above    []store.Key             // the layers above, as far as they are known
	sessions []string
}

// of returns the source of a layer above.
func (s layerSource) of(dgst digest.Digest) layerSource {
	s.digest, s.above = dgst, nil
	return s
}

func parseLabels(labels map[string]string) (layerSource, error) {
	src := layerSource{sizes: map[digest.Digest]int64{}, sessions: Sessions(labels)}
	var err error
	if src.digest, err = digest.Parse(labels[LabelDigest]); err != nil {
		return src, fmt.Errorf("label %s: %w", LabelDigest, err)
	}
	now := present(labels)
	if src.ref, err = reference.Parse(labels[LabelRef+now]); err != nil {
		return src, fmt.Errorf("label %s: %w", LabelRef, err)
	}
	lists := now
	if labels[LabelLayers+now] == "" {
		lists = "" // the build would have pulled the layer: it only says where that is
	}
	src.formats = formatsOf(labels, lists)
	sizes, tocs := strings.Split(labels[LabelSizes+lists], ","), strings.Split(labels[LabelTOCs+lists], ",")
	for i, l := range strings.Split(labels[LabelLayers+lists], ",") {
		d, err := digest.Parse(l)
		if err != nil {
			continue // only hints
		}
		src.sizes[d] = 0
		if i < len(tocs) && d != src.digest && lists == now { // else they needn't be in that image
			if toc, err := digest.Parse(tocs[i]); err == nil {
				src.above = append(src.above, store.Key{Blob: d, TOC: toc})
			}
		}
		if i < len(sizes) {
			if n, err := strconv.ParseInt(sizes[i], 10, 64); err == nil && n > 0 {
				src.sizes[d] = n
			}
		}
	}
	if _, ok := src.sizes[src.digest]; !ok {
		src.sizes[src.digest] = 0
	}
	return src, nil
}

// present returns what is appended to the labels of an image that has the layer and that a build uses now, "" if there is none.
// They go before those of the image which it was mounted for: that may be of a registry that is no more.
func present(labels map[string]string) (suffix string) {
	for k, ref := range labels {
		id, ok := strings.CutPrefix(k, LabelRef)
		if !ok || id == "" || labels[LabelDigest+id] != labels[LabelDigest] {
			continue
		}
		if _, err := reference.Parse(ref); err != nil {
			continue
		}
		// Of several, the same image whoever asks.
		if suffix == "" || cmp.Or(cmp.Compare(ref, labels[LabelRef+suffix]), cmp.Compare(id, suffix)) < 0 {
			suffix = id
		}
	}
	return suffix
}

// Sessions returns the ids of the client sessions in the labels, sorted.
func Sessions(labels map[string]string) []string {
	var ids []string
	for k, v := range labels {
		if strings.HasPrefix(k, labelSession) && v != "" {
			ids = append(ids, v)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}
