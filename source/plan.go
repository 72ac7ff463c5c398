package source

import (
	"slices"
	"strconv"
	"strings"
	"sync"

	ctdlabels "github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/util/progress"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// labelPlan names the plan that a layer's snapshot belongs to.
const labelPlan = "containerd.io/snapshot/remote/buildkitd-lazy.plan"

// tocAnnotation carries the digest of an eStargz layer's table of contents, and is the label that of any lazy layer has.
const tocAnnotation = estargz.TOCJSONDigestAnnotation

// Why a layer without any attempt is pulled.
const (
	reasonNoTOC     = "no table of contents"
	reasonEncrypted = "it is encrypted"
	reasonLayout    = "its OCI layout is read through the client"
	reasonCache     = "its cache isn't in a registry"
	// reasonFrontend: BuildKit ends one that hasn't answered by then, and most of its program is read before it does.
	reasonFrontend = "a frontend has to answer within 10 s of its start"
)

// plan is what is to become of the layers of an image.
type plan struct {
	id       string
	ref      string
	digest   digest.Digest
	platform string // e.g. "linux/amd64"
	registry bool   // whether its blobs come from a registry, not from a client
	layers   []layer
	progress progress.Controller // of the FROM step; nil for a build nobody watches

	mu        sync.Mutex
	announced bool
}

// layer is one layer of a plan, bottom first.
type layer struct {
	desc    ocispecs.Descriptor
	handler *cache.DescHandler
	table   tableOfContents // if the layer has one that could be used

	mu     sync.Mutex
	reason string // why it is pulled; "" while it can be lazy
	err    error  // why it must not be used
	told   bool   // whether the user knows the reason
}

func newPlan(ref string, dgst digest.Digest, layers []ocispecs.Descriptor, handlers map[digest.Digest]*cache.DescHandler, eager string) *plan {
	p := &plan{id: identity.NewID(), ref: ref, digest: dgst, layers: make([]layer, len(layers))}
	for i, desc := range layers {
		l := &p.layers[i]
		l.desc, l.handler = desc, handlers[desc.Digest]
		if l.table, l.reason = tableOf(desc); eager != "" {
			l.reason = eager
		}
	}
	return p
}

// labels are the snapshot labels of the layer i: what the snapshotter needs to
// mount it without asking anybody.
func (p *plan) labels(i int) map[string]string {
	l := &p.layers[i]
	labels := map[string]string{
		labelPlan:            p.id,
		snapshot.LabelDigest: l.desc.Digest.String(),
	}
	if p.registry {
		// What BuildKit calls an OCI layout looks like an image of Docker Hub's: a layer that is mounted from a registry would be read there.
		labels[snapshot.LabelRef] = p.ref
	}
	if l.eager() != "" {
		return labels
	}
	labels[tocAnnotation] = l.table.digest.String()

	// The layers above are hints: their tables of contents are read in parallel
	// with this one's. A label's length is limited, so there may be fewer of them.
	var digests, sizes, tocs, formats []string
	for j := i; j < len(p.layers); j++ {
		above := &p.layers[j]
		if above.eager() != "" || slices.Contains(digests, above.desc.Digest.String()) {
			continue
		}
		next := append(slices.Clone(digests), above.desc.Digest.String())
		// BuildKit appends an id of its own to the key.
		if ctdlabels.Validate(snapshot.LabelLayers+strings.Repeat("x", 32), strings.Join(next, ",")) != nil {
			break
		}
		digests, sizes = next, append(sizes, strconv.FormatInt(above.desc.Size, 10))
		tocs, formats = append(tocs, above.table.digest.String()), append(formats, above.table.label)
	}
	labels[snapshot.LabelLayers] = strings.Join(digests, ",")
	labels[snapshot.LabelSizes] = strings.Join(sizes, ",")
	labels[snapshot.LabelTOCs] = strings.Join(tocs, ",")
	labels[snapshot.LabelFormats] = strings.Join(formats, ",")
	return labels
}

// find returns the index of the layer with that blob, -1 if there is none.
func (p *plan) find(dgst string) int {
	return slices.IndexFunc(p.descriptors(), func(d report.Descriptor) bool { return d.Digest.String() == dgst })
}

// lazyAbove reports whether a layer above i can be lazy.
func (p *plan) lazyAbove(i int) bool {
	for j := i + 1; j < len(p.layers); j++ {
		if p.layers[j].eager() == "" {
			return true
		}
	}
	return false
}

// base is the image as reports know it.
func (p *plan) base() report.Base {
	return report.Base{Ref: p.ref, Digest: p.digest, Platform: p.platform, Layers: p.descriptors()}
}

func (p *plan) descriptors() []report.Descriptor {
	ds := make([]report.Descriptor, len(p.layers))
	for i := range p.layers {
		ds[i] = report.Descriptor{Digest: p.layers[i].desc.Digest, Size: p.layers[i].desc.Size}
	}
	return ds
}

// eager returns why the layer is pulled, "" if it can be lazy.
func (l *layer) eager() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reason
}

// pullBecause makes the layer an eager one.
func (l *layer) pullBecause(reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reason = reason
}

// refuse makes every use of the layer fail.
func (l *layer) refuse(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reason, l.err = "refused", err
}

// tell reports whether it is for the caller to tell the user the reason.
func (l *layer) tell() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	told := l.told
	l.told = true
	return !told
}

func (l *layer) refused() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// plans holds the plans that snapshots may still refer to, the oldest of which
// are forgotten: a snapshot without its plan is made lazily from its labels, or
// pulled, only without a word to the user.
type plans struct {
	mu   sync.Mutex
	byID map[string]*plan
	ids  []string // oldest first
}

// keepPlans is far more than the images which builds resolve at the same time.
const keepPlans = 512

func (ps *plans) add(p *plan) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.byID == nil {
		ps.byID = map[string]*plan{}
	}
	ps.byID[p.id] = p
	ps.ids = append(ps.ids, p.id)
	if len(ps.ids) > keepPlans {
		delete(ps.byID, ps.ids[0])
		ps.ids = ps.ids[1:]
	}
}

func (ps *plans) get(id string) *plan {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.byID[id]
}

// handlers returns the newest known handlers of the blobs, as far as there are any: those that read a registry, and those that read through a client.
func (ps *plans) handlers(blobs []digest.Digest) (registry, client cache.DescHandlers) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	registry, client = cache.DescHandlers{}, cache.DescHandlers{}
	for _, id := range slices.Backward(ps.ids) {
		p := ps.byID[id]
		found := client
		if p.registry {
			found = registry
		}
		for i := range p.layers {
			l := &p.layers[i]
			if _, ok := found[l.desc.Digest]; !ok && l.handler != nil && slices.Contains(blobs, l.desc.Digest) {
				found[l.desc.Digest] = l.handler
			}
		}
		if len(registry) == len(blobs) {
			break
		}
	}
	return registry, client
}
