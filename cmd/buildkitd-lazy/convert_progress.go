package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/console"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/convert"
)

// A conversionDisplay shows a conversion as builds are shown, each layer as a step.
type conversionDisplay struct {
	statuses chan *client.SolveStatus
	ended    chan struct{}

	mu    sync.Mutex
	begun map[digest.Digest]time.Time
}

func showConversion(out io.Writer, mode string) (*conversionDisplay, error) {
	modes := []progressui.DisplayMode{progressui.AutoMode, progressui.PlainMode, progressui.TtyMode, progressui.QuietMode, progressui.RawJSONMode}
	if !slices.Contains(modes, progressui.DisplayMode(mode)) {
		return nil, fmt.Errorf("--progress=%s: want one of %q", mode, modes)
	}
	to, ok := out.(console.File)
	if !ok {
		to = writerFile{Writer: out}
	}
	display, err := progressui.NewDisplay(to, progressui.DisplayMode(mode), progressui.WithPhase("Converting"))
	if err != nil {
		return nil, fmt.Errorf("--progress=%s: %w", mode, err)
	}
	d := &conversionDisplay{statuses: make(chan *client.SolveStatus), ended: make(chan struct{}), begun: map[digest.Digest]time.Time{}}
	go func() {
		defer close(d.ended)
		// It ends when there is nothing more to show, also after a signal: what was cancelled is to be seen.
		_, _ = display.UpdateFrom(context.Background(), d.statuses)
	}()
	return d, nil
}

// update shows how far a layer has come.
func (d *conversionDisplay) update(u convert.Update) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	begun, ok := d.begun[u.Layer.Digest]
	if !ok {
		begun = now
		d.begun[u.Layer.Digest] = now
	}
	v := &client.Vertex{
		Digest: u.Layer.Digest, Name: vertexName(u), Started: &begun,
		Cached: u.Action == convert.Reused || u.Action == convert.Present || u.Action == convert.Kept,
	}
	status := &client.VertexStatus{
		ID: string(u.Action), Vertex: u.Layer.Digest, Name: "reading " + u.Layer.Digest.String(),
		Current: u.Read, Total: u.Layer.Size, Timestamp: now, Started: &begun,
	}
	if u.Done {
		v.Completed, status.Completed = &now, &now
	}
	if u.Err != nil {
		v.Error, v.Completed = u.Err.Error(), &now
	}
	s := &client.SolveStatus{Vertexes: []*client.Vertex{v}}
	if u.Read > 0 {
		s.Statuses = []*client.VertexStatus{status}
	}
	d.statuses <- s
}

func vertexName(u convert.Update) string {
	of := u.Layer.Digest.String()
	if u.Layer.Platform != "" {
		of = "layer " + of + " of " + u.Layer.Platform
	} else {
		of = "blob " + of
	}
	if u.Action == convert.Converted || u.Action == convert.Reused {
		return "convert " + of
	}
	return "copy " + of
}

// end waits until all is shown.
func (d *conversionDisplay) end() {
	close(d.statuses)
	<-d.ended
}

// writerFile is a writer that is no terminal.
type writerFile struct {
	io.Writer
	*os.File
}

func (w writerFile) Write(p []byte) (int, error) { return w.Writer.Write(p) }

// Fd is of nothing.
func (writerFile) Fd() uintptr { return ^uintptr(0) }
