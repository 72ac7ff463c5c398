package worker

import (
	"context"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/source/containerimage"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// ResolveSourceMetadata implements worker.Worker. A frontend asks it for every base
// image of a build, also where another build's FROM step will serve this one: the
// reporter is told. Until the configuration is here, and the frontend has made the
// steps that run on it, what is to be read first of its layers can come.
func (w *Worker) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt, sm *session.Manager, jobCtx solver.JobContext) (*sourceresolver.MetaResponse, error) {
	if jobCtx == nil {
		return w.Worker.ResolveSourceMetadata(ctx, op, opt, sm, jobCtx)
	}
	platform := platforms.DefaultSpec()
	if opt.ImageOpt != nil && opt.ImageOpt.Platform != nil {
		platform = *opt.ImageOpt.Platform
	}
	id, err := w.ParseSource(op, nil)
	img, ok := id.(*containerimage.ImageIdentifier)
	if !ok || err != nil {
		return w.Worker.ResolveSourceMetadata(ctx, op, opt, sm, jobCtx)
	}
	sessions := session.AllSessionIDs(jobCtx.Session())
	ahead := arrived(func(ctx context.Context, manifest digest.Digest) {
		w.images.LookAhead(ctx, img, manifest, platform, sessions)
	})
	resp, err := w.Worker.ResolveSourceMetadata(context.WithValue(ctx, arrivedKey{}, ahead), op, opt, sm, jobCtx)
	if err == nil && resp.Image != nil && resp.Image.Digest != "" {
		// The frontend goes on with the digest it has learned.
		name, _, _ := strings.Cut(img.Reference.String(), "@")
		w.reporter.Expect(sessions, name+"@"+resp.Image.Digest.String(), platforms.Format(platforms.Normalize(platform)))
		ahead(ctx, resp.Image.Digest) // its manifest may have been here
	}
	return resp, err
}

// lookAhead is told of lazy layers that a build is likely to mount.
func (w *Worker) lookAhead(labels map[string]string, sessions []string) {
	if s, ok := w.snapshotter.(*snapshot.Snapshotter); ok {
		s.LookAhead(labels, sessions)
	}
}
