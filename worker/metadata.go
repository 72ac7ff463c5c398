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
)

// ResolveSourceMetadata implements worker.Worker. A frontend asks it for every base
// image of a build, also where another build's FROM step will serve this one: the
// reporter is told.
func (w *Worker) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt, sm *session.Manager, jobCtx solver.JobContext) (*sourceresolver.MetaResponse, error) {
	resp, err := w.Worker.ResolveSourceMetadata(ctx, op, opt, sm, jobCtx)
	if err != nil || resp.Image == nil || resp.Image.Digest == "" || jobCtx == nil {
		return resp, err
	}
	platform := platforms.DefaultSpec()
	if opt.ImageOpt != nil && opt.ImageOpt.Platform != nil {
		platform = *opt.ImageOpt.Platform
	}
	id, err := w.ParseSource(op, nil)
	if img, ok := id.(*containerimage.ImageIdentifier); ok && err == nil {
		// The frontend goes on with the digest it has learned.
		name, _, _ := strings.Cut(img.Reference.String(), "@")
		w.reporter.Expect(session.AllSessionIDs(jobCtx.Session()), name+"@"+resp.Image.Digest.String(),
			platforms.Format(platforms.Normalize(platform)))
	}
	return resp, nil
}
