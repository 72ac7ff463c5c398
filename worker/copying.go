package worker

import (
	"context"

	"github.com/moby/buildkit/cache"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	bkworker "github.com/moby/buildkit/worker"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// copying is the op of COPY, ADD and the like. They read in the daemon's own process, where nobody could tell for which build: so the
// reporter is told.
type copying struct {
	solver.Op
	reporter *report.Reporter
}

// CacheMap implements solver.Op. What is copied is read for the first time to find out its digest.
func (c *copying) CacheMap(ctx context.Context, jobCtx solver.JobContext, index int) (*solver.CacheMap, bool, error) {
	m, done, err := c.Op.CacheMap(ctx, jobCtx, index)
	if m == nil {
		return m, done, err
	}
	for i := range m.Deps {
		if compute := m.Deps[i].ComputeDigestFunc; compute != nil {
			m.Deps[i].ComputeDigestFunc = func(ctx context.Context, res solver.Result, g session.Group) (digest.Digest, error) {
				defer c.read(g, res)()
				return compute(ctx, res, g)
			}
		}
	}
	return m, done, err
}

// Exec implements solver.Op.
func (c *copying) Exec(ctx context.Context, jobCtx solver.JobContext, inputs []solver.Result) ([]solver.Result, error) {
	defer c.read(jobCtx.Session(), inputs...)()
	return c.Op.Exec(ctx, jobCtx, inputs)
}

// read tells the reporter that the layers of results are read, until over is called.
func (c *copying) read(g session.Group, from ...solver.Result) (over func()) {
	var layers []digest.Digest
	for _, res := range from {
		if of, ok := res.Sys().(*bkworker.WorkerRef); ok {
			layers = append(layers, layersOf(of.ImmutableRef)...)
		}
	}
	return c.reporter.Copies(session.AllSessionIDs(g), layers)
}

// exporting is an exporter of files, to the client: they are read as those of a COPY.
type exporting struct {
	bkexporter.Exporter
	reporter *report.Reporter
}

// Resolve implements exporter.Exporter.
func (e *exporting) Resolve(ctx context.Context, id int, attrs map[string]string) (bkexporter.ExporterInstance, error) {
	inst, err := e.Exporter.Resolve(ctx, id, attrs)
	if err != nil {
		return nil, err
	}
	return &export{inst, e.reporter}, nil
}

type export struct {
	bkexporter.ExporterInstance
	reporter *report.Reporter
}

// Export implements exporter.ExporterInstance.
func (e *export) Export(ctx context.Context, src *bkexporter.Source, info bkexporter.ExportBuildInfo) (
	map[string]string, bkexporter.FinalizeFunc, bkexporter.DescriptorReference, error,
) {
	layers := layersOf(src.Ref)
	for _, ref := range src.Refs {
		layers = append(layers, layersOf(ref)...)
	}
	defer e.reporter.Copies([]string{info.SessionID}, layers)()
	return e.ExporterInstance.Export(ctx, src, info)
}

// layersOf returns the blobs that a ref was made of, as far as it has some.
func layersOf(ref cache.ImmutableRef) (layers []digest.Digest) {
	if ref == nil {
		return nil
	}
	chain := ref.LayerChain()
	defer func() { _ = chain.Release(context.Background()) }()
	for _, ref := range chain {
		if blob := digest.Digest(ref.GetString(recordBlob)); blob != "" {
			layers = append(layers, blob)
		}
	}
	return layers
}
