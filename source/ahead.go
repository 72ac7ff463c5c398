package source

import (
	"context"

	"github.com/moby/buildkit/source/containerimage"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// LookAhead says that a build has found out what an image is and is likely to mount it soon: SnapshotterOptions.LookAhead is told, if a layer
// of it can be lazy. root is the manifest, or the index of manifests, that BuildKit has just resolved.
func (s *Source) LookAhead(ctx context.Context, id *containerimage.ImageIdentifier, root digest.Digest, platform ocispecs.Platform, sessions []string) {
	sn := s.opt.Snapshotter
	if sn == nil || sn.opt.LookAhead == nil || s.opt.Eager != "" {
		return
	}
	i := &instance{src: s, platform: platform, limit: id.LayerLimit}
	layers, err := i.layers(ctx, root)
	if err != nil {
		return // there may be none; the build will say so
	}
	p := newPlan(id.Reference.String(), root, layers, nil, "")
	p.registry = true
	for n := range p.layers {
		if p.layers[n].eager() == "" {
			sn.opt.LookAhead(p.labels(n), sessions)
			return
		}
	}
}
