package exporter

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/exporter/util/epoch"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/converter"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// A rewriting says what rewrite-timestamp=true does to the layers of one platform.
//
// BuildKit does it after it has asked for them, and with its own writer. Done here, before it gets them, it's done by ours, a failure isn't
// only logged, and what was rewritten before is found again: BuildKit then finds that nothing is left to do. A second pass it is all the
// same. The layer as it is belongs to the cache, which later steps and exports take it from, and what makes a layer writes one blob: the tar
// that both could be made of is gone when the second is asked for.
type rewriting struct {
	epoch time.Time
	base  []digest.Digest // DiffIDs of the base image, whose layers stay as they are
	store content.Store
}

// rewritings returns what is to be done by platform, of which "" is the only one's; nothing if timestamps aren't rewritten.
func (e *Exporter) rewritings(attrs map[string]string, src *exporter.Source) (map[string]*rewriting, error) {
	key := string(exptypes.OptKeyRewriteTimestamp)
	if v, given := attrs[key]; !given || e.Content == nil {
		return nil, nil
	} else if on, err := strconv.ParseBool(v); v != "" && (err != nil || !on) {
		return nil, nil // BuildKit says what's wrong with it
	}
	ps, err := exptypes.ParsePlatforms(src.Metadata)
	if err != nil {
		return nil, err
	}
	given, _, err := epoch.ParseExporterAttrs(attrs)
	if err != nil {
		return nil, err
	}
	found := map[string]*rewriting{}
	add := func(id string, p *exptypes.Platform) error {
		var at *time.Time
		if given != nil {
			at = given.Value
		} else if at, err = epoch.ParseSource(src, nil); err != nil {
			return err
		} else if at == nil {
			if at, err = epoch.ParseSource(src, p); err != nil {
				return err
			}
		}
		if at == nil {
			return nil // BuildKit warns
		}
		r := &rewriting{epoch: *at, store: e.Content}
		if dt := exptypes.ParseKey(src.Metadata, exptypes.ExporterImageBaseConfigKey, p); len(dt) > 0 {
			var img ocispecs.Image
			if err := json.Unmarshal(dt, &img); err != nil {
				return fmt.Errorf("configuration of the base image: %w", err)
			}
			r.base = img.RootFS.DiffIDs
		}
		found[id] = r
		return nil
	}
	if len(src.Refs) == 0 {
		var p *exptypes.Platform
		if len(ps.Platforms) > 0 {
			p = &ps.Platforms[0]
		}
		if err := add("", p); err != nil {
			return nil, err
		}
		return found, nil
	}
	for i := range ps.Platforms {
		if err := add(ps.Platforms[i].ID, &ps.Platforms[i]); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// do rewrites the layers of a remote, all at once. Before are these as they were if they have been converted: by their DiffIDs the base's are known.
func (r *rewriting) do(ctx context.Context, remote *solver.Remote, before []ocispecs.Descriptor, comp compression.Config) (*solver.Remote, error) {
	descs := slices.Clone(remote.Descriptors)
	cs := contentutil.NewStoreWithProvider(r.store, remote.Provider)
	eg, ctx := errgroup.WithContext(ctx)
	inBase := baseLayers(before, r.base)
	for i, desc := range descs {
		if i < inBase {
			descs[i] = r.unchanged(desc, r.base[i])
			continue
		}
		eg.Go(func() error {
			rewritten, err := r.layer(ctx, cs, desc, comp)
			if err != nil {
				return fmt.Errorf("rewrite the timestamps of layer %s: %w", desc.Digest, err)
			}
			if rewritten != nil {
				descs[i] = *rewritten
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	return &solver.Remote{Descriptors: descs, Provider: cs}, nil
}

// rewrittenAnnotation says to BuildKit that nothing is left to do, of the time that it has.
const rewrittenAnnotation = "buildkit/rewritten-timestamp"

// unchanged returns a layer of the base. BuildKit takes one that was converted, and so has got another DiffID, for one above the base.
func (r *rewriting) unchanged(desc ocispecs.Descriptor, diffID digest.Digest) ocispecs.Descriptor {
	if desc.Annotations[labels.LabelUncompressed] != diffID.String() {
		desc.Annotations = maps.Clone(desc.Annotations)
		desc.Annotations[rewrittenAnnotation] = strconv.FormatInt(r.epoch.UTC().Unix(), 10)
	}
	return desc
}

// layer rewrites one layer, unless it has been rewritten before; nil means that it's right as it is.
func (r *rewriting) layer(ctx context.Context, cs content.Store, desc ocispecs.Descriptor, comp compression.Config) (*ocispecs.Descriptor, error) {
	key := r.key(comp)
	if known := r.known(ctx, cs, desc.Digest, key); known != nil {
		return known, r.external(ctx, cs, desc.Digest, known, comp)
	}
	convert, err := converter.NewWithRewriteTimestamp(ctx, cs, desc, comp, &r.epoch, nil)
	if err != nil || convert == nil {
		return nil, err
	}
	rewritten, err := convert(ctx, cs, desc)
	if err != nil {
		return nil, err
	}
	if err := r.remember(ctx, cs, desc.Digest, key, *rewritten); err != nil {
		bklog.G(ctx).WithError(err).WithField("layer", desc.Digest).Warn("a layer that was rewritten for its timestamps isn't kept")
	}
	return rewritten, r.external(ctx, cs, desc.Digest, rewritten, comp)
}

// isEStargzLabel says to BuildKit whether a blob is eStargz. It doesn't know external TOCs, and would write the layer once more.
const isEStargzLabel = "buildkit.io/compression/estargz"

// external has the TOC of a layer that was rewritten exported in the place of that of the layer it was made of, if they are external.
func (r *rewriting) external(ctx context.Context, cs content.Store, from digest.Digest, desc *ocispecs.Descriptor, comp compression.Config) error {
	e, ok := comp.Type.(*eStargz)
	if !ok || !e.opt.ExternalTOC {
		return nil
	}
	info, err := cs.Update(ctx, content.Info{Digest: desc.Digest, Labels: map[string]string{isEStargzLabel: "true"}}, "labels."+isEStargzLabel)
	if err != nil {
		return err
	}
	e.tocs.drop(from)
	return e.tocs.annotate(desc, info)
}

// A blob that was rewritten has a label with the descriptor of what it has become, and another one that keeps that as long as itself.
const (
	rewrittenLabel = "buildkitd-lazy/rewritten."
	rewrittenGC    = "containerd.io/gc.ref.content.rewritten-"
)

// key names the time and what writes the layer.
func (r *rewriting) key(comp compression.Config) string {
	return digest.FromString(fmt.Sprintf("%d %s", r.epoch.UTC().Unix(), writtenBy(comp))).Encoded()[:16]
}

// writtenBy names what writes a layer, with the options that make a difference.
func writtenBy(comp compression.Config) string {
	switch t := comp.Type.(type) {
	case *eStargz:
		return t.label()
	case *converting:
		return t.label()
	case *zstdChunked:
		return zstdLabel(t.opt)
	}
	if comp.Level != nil {
		return fmt.Sprintf("%s %d", comp.Type, *comp.Level)
	}
	return comp.Type.String()
}

func (r *rewriting) known(ctx context.Context, cs content.Store, of digest.Digest, key string) *ocispecs.Descriptor {
	info, err := cs.Info(ctx, of)
	if err != nil {
		return nil
	}
	var desc ocispecs.Descriptor
	if json.Unmarshal([]byte(info.Labels[rewrittenLabel+key]), &desc) != nil {
		return nil
	}
	if _, err := cs.Info(ctx, desc.Digest); err != nil {
		return nil
	}
	return &desc
}

func (r *rewriting) remember(ctx context.Context, cs content.Store, of digest.Digest, key string, desc ocispecs.Descriptor) error {
	dt, err := json.Marshal(desc)
	if err != nil {
		return err
	}
	info := content.Info{Digest: of, Labels: map[string]string{rewrittenLabel + key: string(dt), rewrittenGC + key: desc.Digest.String()}}
	_, err = cs.Update(ctx, info, "labels."+rewrittenLabel+key, "labels."+rewrittenGC+key)
	return err
}
