package exporter

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/client"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Exporter is one of BuildKit's exporters behind a check of its attributes.
type Exporter struct {
	bkexporter.Exporter
	// Blobs are where lazy layers are pushed from. Nil has them fetched into the content store for that.
	Blobs Blobs
	// Content is where blobs are written. Nil leaves the rewriting of timestamps to BuildKit, and errors of conversions without a layer's name.
	Content content.Store
	// Conversions convert lazy layers. Nil leaves them to BuildKit, which fetches them into the content store for that.
	Conversions *Conversions
	// Lists reads the lists of files that come first. Required.
	Lists *Lists
	// Registries are where images of tables of contents are pushed to. Required.
	Registries *Registries

	kind string
}

var _ bkexporter.Exporter = (*Exporter)(nil)

// New wraps BuildKit's exporter of the given type: "image", "oci", "docker",
// "local" or "tar".
func New(kind string, next bkexporter.Exporter) *Exporter {
	return &Exporter{Exporter: next, kind: kind}
}

// Resolve implements exporter.Exporter.
func (e *Exporter) Resolve(ctx context.Context, id int, attrs map[string]string) (bkexporter.ExporterInstance, error) {
	attrs = maps.Clone(attrs)
	chunked, err := takeZstdChunked(e.kind+" exporter", writesLayers(e.kind), attrs)
	if err != nil {
		return nil, err
	}
	if key := string(exptypes.OptKeyOCITypes); chunked != nil && attrs[key] == "" {
		attrs[key] = "true" // the docker exporter's default has no place for a layer's annotations
	}
	if err := check(e.kind, attrs); err != nil {
		return nil, err
	}
	inst, err := e.Exporter.Resolve(ctx, id, attrs)
	if err != nil {
		return nil, err
	}
	i := &instance{ExporterInstance: inst, exporter: e, attrs: attrs, chunked: chunked}
	if e.kind == client.ExporterImage {
		i.blobs = e.Blobs
	}
	if isEStargz(attrs) {
		opt, err := writeOptions(attrs)
		if err != nil {
			return nil, err
		}
		i.estargz = newEStargz(opt)
	}
	if !writesLayers(e.kind) {
		return inst, nil
	}
	return i, nil
}

// An instance is an exporter of layers.
type instance struct {
	bkexporter.ExporterInstance
	exporter *Exporter
	attrs    map[string]string
	estargz  *eStargz     // nil for other compressions
	chunked  *zstdChunked // the same
	blobs    Blobs        // nil if it doesn't push

	bases []digest.Digest // DiffIDs of those of all platforms, once it exports
}

// Config implements exporter.ExporterInstance. The inline cache looks for layers by it.
func (i *instance) Config() *bkexporter.Config {
	inBase := func(desc ocispecs.Descriptor) bool {
		return slices.Contains(i.bases, digest.Digest(desc.Annotations[labels.LabelUncompressed]))
	}
	return bkexporter.NewConfigWithCompression(i.chunked.replace(i.estargz.forCache(inBase).replace(i.ExporterInstance.Config().Compression())))
}

// Export implements exporter.ExporterInstance.
func (i *instance) Export(ctx context.Context, src *bkexporter.Source, info bkexporter.ExportBuildInfo) (
	map[string]string, bkexporter.FinalizeFunc, bkexporter.DescriptorReference, error,
) {
	rewritings, err := i.exporter.rewritings(i.attrs, src)
	if err != nil {
		return nil, nil, nil, err
	}
	if list, given := i.attrs[keyPrioritize]; given {
		if i.estargz.order, err = i.exporter.Lists.read(ctx, session.NewGroup(info.SessionID), list); err != nil {
			return nil, nil, nil, err
		}
	}
	left := &stayed{}
	wrapped := src.Clone()
	wrap := func(r cache.ImmutableRef, platform string) cache.ImmutableRef {
		base := baseOf(src, platform)
		i.bases = append(i.bases, base...)
		return i.wrap(r, base, rewritings[platform], left)
	}
	wrapped.Ref = wrap(src.Ref, "")
	for k, r := range src.Refs {
		wrapped.Refs[k] = wrap(r, k)
	}
	resp, finalize, desc, err := i.ExporterInstance.Export(ctx, wrapped, info)
	if err != nil {
		return resp, finalize, desc, err
	}
	finalize = i.pushing(finalize, src, nameOf(resp), info.SessionID)
	if err = left.warn(ctx); err == nil {
		finalize, err = i.finish(ctx, finalize, nameOf(resp), info.SessionID)
	}
	if err != nil {
		if desc != nil {
			err = errors.Join(err, desc.Release())
		}
		return nil, nil, nil, err
	}
	return resp, finalize, desc, nil
}

// finish does what is to be done when BuildKit's exporter has made the image, and before it is pushed.
func (i *instance) finish(ctx context.Context, finalize bkexporter.FinalizeFunc, names, session string) (bkexporter.FinalizeFunc, error) {
	if i.estargz == nil {
		return finalize, nil
	}
	if i.estargz.order != nil {
		if err := i.estargz.order.warn(ctx); err != nil {
			return nil, err
		}
	}
	if !i.estargz.opt.ExternalTOC || finalize == nil {
		return finalize, nil
	}
	insecure, err := boolean(i.attrs, string(exptypes.OptKeyInsecure))
	if err != nil {
		return nil, err
	}
	img, err := i.exporter.Registries.image(ctx, i.estargz.tocs)
	if err != nil || img == nil {
		return finalize, err
	}
	return func(ctx context.Context) error {
		// First, as who pulls the image looks for them at once.
		if err := i.exporter.Registries.push(ctx, img, names, insecure, session); err != nil {
			return refused(err, names)
		}
		return finalize(ctx)
	}, nil
}

func (i *instance) wrap(r cache.ImmutableRef, base []digest.Digest, rewriting *rewriting, left *stayed) cache.ImmutableRef {
	if r == nil {
		return nil
	}
	return &ref{r, i.exporter.Content, i.exporter.Conversions, i.estargz, i.chunked, base, i.blobs, rewriting, left}
}

// A ref has its layers written by us: the exporter can't be told so, but asks the refs for them. Those that it pushes it has from
// where they are.
type ref struct {
	cache.ImmutableRef
	content     content.Store
	conversions *Conversions
	estargz     *eStargz
	chunked     *zstdChunked
	base        []digest.Digest // DiffIDs of the base image
	blobs       Blobs
	rewriting   *rewriting
	stayed      *stayed
}

// GetRemotes implements cache.ImmutableRef.
func (r *ref) GetRemotes(ctx context.Context, createIfNeeded bool, cfg cacheconfig.RefConfig, all bool, s session.Group) ([]*solver.Remote, error) {
	cfg.Compression = r.chunked.replace(r.estargz.replace(cfg.Compression))
	remotes, err := getRemotes(ctx, r.content, r.conversions.of(r.ImmutableRef), createIfNeeded, cfg, all, s, r.base)
	if err != nil {
		return nil, err
	}
	for i := range remotes {
		remotes[i] = r.toPush(ctx, remotes[i], s)
		if createIfNeeded {
			if writesOurs(cfg.Compression.Type) {
				r.stayed.noteImage(ctx, remotes[i], r.base, cfg.Compression)
			}
			if remotes[i], err = r.rewritten(ctx, remotes[i], cfg, s); err != nil {
				return nil, err
			}
		}
	}
	return remotes, nil
}

// rewritten returns the layers with the timestamps that they are to have.
func (r *ref) rewritten(ctx context.Context, remote *solver.Remote, cfg cacheconfig.RefConfig, s session.Group) (*solver.Remote, error) {
	if r.rewriting == nil {
		return remote, nil
	}
	before, comp := remote, cfg.Compression
	if cfg.Compression.Force {
		cfg.Compression.Force = false
		plain, err := r.ImmutableRef.GetRemotes(ctx, false, cfg, false, s)
		if err != nil {
			return nil, err
		}
		if len(plain) > 0 {
			before = plain[0]
		}
	}
	return r.rewriting.do(ctx, remote, before.Descriptors, comp)
}

// Clone implements cache.ImmutableRef.
func (r *ref) Clone() cache.ImmutableRef {
	return &ref{r.ImmutableRef.Clone(), r.content, r.conversions, r.estargz, r.chunked, r.base, r.blobs, r.rewriting, r.stayed}
}
