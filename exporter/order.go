package exporter

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
)

// An ordering says which files of an export's layers come first.
type ordering struct {
	name string // of the list, for who wrote it
	list *order.List
	dir  string // for the tars of layers

	// first is how many files come first in the layers of the export.
	first atomic.Int64
}

// A converting compression type has all layers written with its options, but for some.
type converting struct {
	*eStargz
	stay map[digest.Digest]bool
}

// String implements compression.Type. BuildKit takes two conversions of a layer for one if the types have the same name.
func (o *converting) String() string { return o.Type.String() + " as " + o.label() }

// NeedsConversion implements compression.Type: BuildKit asks it of a layer, and of what that has been converted to before.
func (o *converting) NeedsConversion(ctx context.Context, cs content.Store, desc ocispecs.Descriptor) (bool, error) {
	if !images.IsLayerType(desc.MediaType) || o.stay[desc.Digest] {
		return false, nil
	}
	if err := convertible(desc); err != nil {
		return false, err
	}
	info, err := cs.Info(ctx, desc.Digest)
	if err != nil && !cerrdefs.IsNotFound(err) {
		return false, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	_, done := info.Labels[o.label()]
	return !done, nil
}

// GetRemotes returns the layers of a ref, those in order that are to be so. A worker has it for caches, whose exporters don't ask refs themselves.
//
// Without force, what BuildKit has made of a layer once is what it is exported as ever after. So the layers that this daemon has written
// in another order, or with a TOC elsewhere, are converted, as if force were on for them; others stay what they are, those of the base image among them.
//
// Forced, a layer that can't be converted, or whose DiffID isn't that of its tar, is an error that names it. Those that have been fetched are in cs;
// what becomes of lazy ones is for conversions to say, or for BuildKit, if they are nil.
func GetRemotes(ctx context.Context, cs content.Store, conversions *Conversions, ref cache.ImmutableRef, createIfNeeded bool, cfg cacheconfig.RefConfig, all bool, s session.Group) ([]*solver.Remote, error) {
	return getRemotes(ctx, cs, conversions.of(ref), createIfNeeded, cfg, all, s, nil)
}

// getRemotes is GetRemotes of an image on top of a base with these DiffIDs.
func getRemotes(
	ctx context.Context, cs content.Store, ref cache.ImmutableRef, createIfNeeded bool, cfg cacheconfig.RefConfig, all bool, s session.Group, base []digest.Digest,
) ([]*solver.Remote, error) {
	remotes, err := converted(ctx, ref, createIfNeeded, cfg, all, s, base)
	if !cfg.Compression.Force || cs == nil || !writesOurs(cfg.Compression.Type) {
		return remotes, err
	}
	if err != nil {
		if e, ok := cfg.Compression.Type.(*eStargz); ok && e.rewrites() {
			cfg.Compression.Type = &converting{eStargz: e}
		}
		return nil, blame(ctx, cs, ref, cfg, s, err)
	}
	return remotes, checkDiffIDs(ctx, cs, ref, cfg, s, remotes)
}

// converted returns the layers, those converted that are to be.
func converted(ctx context.Context, ref cache.ImmutableRef, createIfNeeded bool, cfg cacheconfig.RefConfig, all bool, s session.Group, base []digest.Digest) ([]*solver.Remote, error) {
	e, ok := cfg.Compression.Type.(*eStargz)
	if !ok || cfg.Compression.Force && !e.rewrites() {
		return ref.GetRemotes(ctx, createIfNeeded, cfg, all, s)
	}
	o := &converting{eStargz: e, stay: map[digest.Digest]bool{}}
	if !cfg.Compression.Force {
		remotes, err := ref.GetRemotes(ctx, createIfNeeded, cfg, all, s)
		if err != nil || len(remotes) == 0 {
			return nil, err
		}
		if convert, err := o.keep(ctx, remotes[0], base); err != nil || !convert {
			return remotes, err
		}
		cfg.Compression.Force = true
	}
	cfg.Compression.Type = o
	remotes, err := ref.GetRemotes(ctx, createIfNeeded, cfg, all, s)
	if err != nil || len(remotes) == 0 {
		return nil, err
	}
	return remotes, o.note(ctx, remotes[0])
}

// keep finds out which layers stay as they are, and reports whether any doesn't.
func (o *converting) keep(ctx context.Context, remote *solver.Remote, base []digest.Digest) (convert bool, err error) {
	below := baseLayers(remote.Descriptors, base)
	for i, desc := range remote.Descriptors {
		info, err := remote.Provider.Info(ctx, desc.Digest)
		if err != nil && !cerrdefs.IsNotFound(err) {
			return false, fmt.Errorf("layer %s: %w", desc.Digest, err)
		}
		// A TOC that is elsewhere isn't to be found by who doesn't export it, too.
		_, external := info.Labels[tocLabel]
		inBase := i < below || o.inBase != nil && o.inBase(desc)
		if inBase || !isOurs(info.Labels) || !o.rewrites() && !external {
			o.stay[desc.Digest] = true
		} else {
			convert = true
		}
	}
	return convert, nil
}

// note takes note of what has come of the layers.
func (o *converting) note(ctx context.Context, remote *solver.Remote) error {
	for i := range remote.Descriptors {
		desc := &remote.Descriptors[i]
		info, err := remote.Provider.Info(ctx, desc.Digest)
		if err != nil || o.stay[desc.Digest] {
			continue // what can't be had from the content store has no labels of ours
		}
		if o.order != nil {
			n, _ := strconv.Atoi(info.Labels[o.label()])
			o.order.first.Add(int64(n))
		}
		if o.opt.ExternalTOC {
			if err := o.tocs.annotate(desc, info); err != nil {
				return err
			}
		}
	}
	return nil
}

// baseOf returns the DiffIDs of the image that a platform's result is built on, if the frontend says which that is.
func baseOf(src *bkexporter.Source, platform string) []digest.Digest {
	key := exptypes.ExporterImageBaseConfigKey
	config, ok := src.Metadata[key+"/"+platform]
	if !ok {
		config = src.Metadata[key]
	}
	var base ocispecs.Image
	if json.Unmarshal(config, &base) != nil {
		return nil // none, or BuildKit's to complain of
	}
	return slices.Clip(base.RootFS.DiffIDs)
}

// baseLayers returns how many of an image's layers are those of its base, which has these DiffIDs.
func baseLayers(layers []ocispecs.Descriptor, base []digest.Digest) (n int) {
	for n < min(len(base), len(layers)) && base[n].String() == layers[n].Annotations[labels.LabelUncompressed] {
		n++
	}
	return n
}

// warn tells the user of a list that has done nothing.
func (o *ordering) warn(ctx context.Context) error {
	if o.first.Load() > 0 {
		return nil
	}
	return warn(ctx, fmt.Sprintf(
		"%s=%s: no file that it names is in a layer that this build has made; layers of the base image, and those that were exported in another format before, stay as they are without force-compression=true, and a directory stands for itself: DIR/** is what is in it",
		keyPrioritize, o.name))
}
