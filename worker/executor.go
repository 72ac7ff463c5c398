package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	bkexecutor "github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// executor says why a step failed that could not read a lazy layer: the step
// itself has only seen EIO. It also tells the reporter which steps run, and what
// layers they have, and has fetched what they run.
type executor struct {
	bkexecutor.Executor
	reporter *report.Reporter
	layerAt  layerAt
	expect   expect
}

// Run implements executor.Executor.
func (e *executor) Run(ctx context.Context, id string, rootfs bkexecutor.Mount, mounts []bkexecutor.Mount, process bkexecutor.ProcessInfo, started chan<- struct{}) (resourcestypes.Recorder, error) {
	start := time.Now()
	step := e.reporter.BeginStep(ctx)
	defer step.End()
	rootfs, mounts = watchMounts(step, e.layerAt, func(dir string) { e.expect(dir, programsOf(process.Meta)) }, rootfs, mounts)
	rec, err := e.Executor.Run(ctx, id, rootfs, mounts, process, started)
	return rec, e.explain(start, err)
}

// Exec implements executor.Executor.
func (e *executor) Exec(ctx context.Context, id string, process bkexecutor.ProcessInfo) error {
	start := time.Now()
	return e.explain(start, e.Executor.Exec(ctx, id, process))
}

func (e *executor) explain(start time.Time, err error) error {
	if err == nil {
		return nil
	}
	failed := e.reporter.FailedSince(start)
	if len(failed) == 0 {
		return err
	}
	return fmt.Errorf("%w; while it ran, lazy layers could not be read (a step sees an I/O error): %w", err, errors.Join(failed...))
}
