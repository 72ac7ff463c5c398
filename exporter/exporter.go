package exporter

import (
	"context"
	"maps"

	bkexporter "github.com/moby/buildkit/exporter"
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
	return e.Exporter.Resolve(ctx, id, attrs)
}
