package worker

import (
	"strings"

	bkexecutor "github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/source/containerimage"
	bkworker "github.com/moby/buildkit/worker"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// The first step on an image is known before the image is mounted, and between that and the step BuildKit makes snapshots and
// copies files: what the step runs can be fetched meanwhile. So can be what a step copies: to find out its digest BuildKit lists all of it first, and
// then reads one file after the other.

// ResolveOp implements worker.Worker. A solver asks for the op of a step before it has the step's inputs.
func (w *Worker) ResolveOp(v solver.Vertex, b frontend.FrontendLLBBridge, sm *session.Manager, proxy bkworker.ProxyOpt) (solver.Op, error) {
	if w.planner != nil {
		if meta, src, ok := firstStep(v); ok {
			w.expectOf(src, programsOf(meta))
		}
		for src, trees := range copiedFrom(v) {
			w.expectOf(src, trees)
		}
	}
	return w.Worker.ResolveOp(v, b, sm, proxy)
}

// expectOf says what will be read at first of an image, if that is where a source comes from.
func (w *Worker) expectOf(src *pb.Op, files []fill.Expected) {
	id, err := w.ParseSource(src.GetSource(), src.Platform)
	if image, ok := id.(*containerimage.ImageIdentifier); err == nil && ok {
		w.planner.Expect(image.Reference.String(), files)
	}
}

// copiedFrom returns what BuildKit is about to read of sources because a step copies it, or mounts it: all of a directory, of whose content
// the step's key is made. What patterns choose isn't known.
func copiedFrom(v solver.Vertex) map[*pb.Op][]fill.Expected {
	byInput := map[int64][]fill.Expected{}
	for _, action := range opOf(v).GetFile().GetActions() {
		c := action.GetCopy()
		if c == nil || c.AllowWildcard && strings.ContainsAny(c.Src, `*?[\`) || len(c.IncludePatterns)+len(c.ExcludePatterns) > 0 {
			continue
		}
		byInput[action.SecondaryInput] = append(byInput[action.SecondaryInput], at(inRoot(c.Src)+"/"))
	}
	keyed := map[int64]bool{} // by content; as BuildKit has it, the last mount of an input decides
	for _, m := range opOf(v).GetExec().GetMounts() {
		byInput[m.Input] = append(byInput[m.Input], at(inRoot(m.Selector)+"/"))
		keyed[m.Input] = m.MountType == pb.MountType_BIND && m.Dest != pb.RootMount && m.ContentCache != pb.MountContentCache_OFF &&
			(m.Readonly || m.Output == int64(pb.SkipOutput))
	}
	trees := map[*pb.Op][]fill.Expected{}
	for i, list := range byInput {
		e, ok := input(v, i)
		src := opOf(e.Vertex)
		if ok && src.GetSource() != nil && (opOf(v).GetExec() == nil || keyed[i]) {
			trees[src] = append(trees[src], list...)
		}
	}
	return trees
}

// expectIn is told what will be read at first of the images that have a layer.
func (w *Worker) expectIn(layer digest.Digest, files []fill.Expected) {
	if s, ok := w.snapshotter.(*snapshot.Snapshotter); ok {
		s.ExpectIn(layer, files)
	}
}

// firstStep returns what a step runs whose root no step has changed before, and the source that the root comes from.
func firstStep(v solver.Vertex) (meta bkexecutor.Meta, src *pb.Op, ok bool) {
	exec := opOf(v).GetExec()
	if exec == nil || exec.Meta == nil {
		return meta, nil, false
	}
	at := solver.Edge{}
	for _, m := range exec.Mounts {
		if m.Dest == pb.RootMount {
			at, ok = input(v, m.Input)
		}
	}
	for ; ok; at, ok = inputOfFile(at) {
		if op := opOf(at.Vertex); op.GetSource() != nil {
			return bkexecutor.Meta{Args: exec.Meta.Args, Env: exec.Meta.Env, Cwd: exec.Meta.Cwd}, op, true
		}
	}
	return meta, nil, false
}

// inputOfFile returns what the files of an edge were copied or made on.
func inputOfFile(e solver.Edge) (solver.Edge, bool) {
	actions := opOf(e.Vertex).GetFile().GetActions()
	inputs := int64(len(e.Vertex.Inputs()))
	for i := len(actions) - 1; i >= 0; i-- {
		if actions[i].Output != int64(e.Index) {
			continue
		}
		// An input that isn't one of the op is an action before this one.
		for actions[i].Input >= inputs {
			before := int(actions[i].Input - inputs)
			if before >= i {
				return solver.Edge{}, false
			}
			i = before
		}
		return input(e.Vertex, actions[i].Input)
	}
	return solver.Edge{}, false
}

func input(v solver.Vertex, i int64) (solver.Edge, bool) {
	if i < 0 || i >= int64(len(v.Inputs())) {
		return solver.Edge{}, false
	}
	return v.Inputs()[i], true
}

// opOf returns the op of a vertex, nil if it has none or there is none.
func opOf(v solver.Vertex) *pb.Op {
	if v == nil {
		return nil
	}
	op, _ := v.Sys().(*pb.Op)
	return op
}
