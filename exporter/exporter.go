package exporter

import (
	"context"
	"maps"

	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
)

// Exporter is one of BuildKit's exporters behind a check of its attributes.
type Exporter struct {
	bkexporter.Exporter
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
	if err := check(e.kind, attrs); err != nil {
		return nil, err
	}
	inst, err := e.Exporter.Resolve(ctx, id, attrs)
	if err != nil || !isEStargz(attrs) {
		return inst, err
	}
	opt, err := writeOptions(attrs)
	if err != nil {
		return nil, err
	}
	return &instance{inst, newEStargz(opt)}, nil
}

// An instance is an exporter of eStargz layers.
type instance struct {
	bkexporter.ExporterInstance
	estargz *eStargz
}

// Config implements exporter.ExporterInstance. The inline cache looks for layers by it.
func (i *instance) Config() *bkexporter.Config {
	return bkexporter.NewConfigWithCompression(i.estargz.replace(i.ExporterInstance.Config().Compression()))
}

// Export implements exporter.ExporterInstance.
func (i *instance) Export(ctx context.Context, src *bkexporter.Source, info bkexporter.ExportBuildInfo) (
	map[string]string, bkexporter.FinalizeFunc, bkexporter.DescriptorReference, error,
) {
	src = src.Clone()
	src.Ref = i.wrap(src.Ref)
	for k, r := range src.Refs {
		src.Refs[k] = i.wrap(r)
	}
	return i.ExporterInstance.Export(ctx, src, info)
}

func (i *instance) wrap(r cache.ImmutableRef) cache.ImmutableRef {
	if r == nil {
		return nil
	}
	return &ref{r, i.estargz}
}

// A ref has its layers written by us: the exporter can't be told so, but asks the refs for them.
type ref struct {
	cache.ImmutableRef
	estargz *eStargz
}

// GetRemotes implements cache.ImmutableRef.
func (r *ref) GetRemotes(ctx context.Context, createIfNeeded bool, cfg cacheconfig.RefConfig, all bool, s session.Group) ([]*solver.Remote, error) {
	cfg.Compression = r.estargz.replace(cfg.Compression)
	return r.ImmutableRef.GetRemotes(ctx, createIfNeeded, cfg, all, s)
}

// Clone implements cache.ImmutableRef.
func (r *ref) Clone() cache.ImmutableRef { return &ref{r.ImmutableRef.Clone(), r.estargz} }
