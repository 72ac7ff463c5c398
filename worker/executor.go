package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	bkexecutor "github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// executor says why a step failed that could not read a lazy layer of its own: the
// step itself has only seen EIO. It also tells the reporter which steps run, and what
// layers they have, and has fetched what they run.
type executor struct {
	bkexecutor.Executor
	reporter *report.Reporter
	layerAt  layerAt
	expect   expect

	mu      sync.Mutex
	running map[string]*report.Step // by the id of the container, if it has one
}

// Run implements executor.Executor.
func (e *executor) Run(ctx context.Context, id string, rootfs bkexecutor.Mount, mounts []bkexecutor.Mount, process bkexecutor.ProcessInfo, started chan<- struct{}) (resourcestypes.Recorder, error) {
	step := e.reporter.BeginStep(ctx)
	defer step.End()
	defer e.runs(id, step)()
	rootfs, mounts = watchMounts(step, e.layerAt, func(dir string) { e.expect(dir, programsOf(process.Meta)) }, rootfs, mounts)
	rec, err := e.Executor.Run(ctx, id, rootfs, mounts, process, started)
	return rec, explain(err, step, time.Time{})
}

// Exec implements executor.Executor.
func (e *executor) Exec(ctx context.Context, id string, process bkexecutor.ProcessInfo) error {
	start := time.Now()
	e.mu.Lock()
	step := e.running[id]
	e.mu.Unlock()
	return explain(e.Executor.Exec(ctx, id, process), step, start)
}

// runs says that a step runs in a container where others may be executed, until over is called.
func (e *executor) runs(id string, step *report.Step) (over func()) {
	if id == "" {
		return func() {}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running == nil {
		e.running = map[string]*report.Step{}
	}
	e.running[id] = step
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.running, id)
	}
}

// explain adds to the error of what ran in a step's container why lazy layers could not be read there since then.
func explain(err error, step *report.Step, since time.Time) error {
	if err == nil || step == nil {
		return err
	}
	failed := step.Denied(since)
	if len(failed) == 0 {
		return err
	}
	return fmt.Errorf("%w; while it ran, lazy layers could not be read (a step sees an I/O error): %w", err, errors.Join(failed...))
}
