package report

import (
	"context"
	"time"

	"github.com/moby/buildkit/util/progress"
)

// Line is a line in the progress of a build, about something that goes on.
type Line interface {
	// Set shows the line, with how long it has been going on; the client counts on. Called again, it shows the new
	// text, or the same with the time that has passed.
	Set(text string)
	// Close says that it's over.
	Close()
}

// NewLine returns a line below the vertex whose progress ctx carries. What it's about began at since. Line's methods
// must not be called concurrently.
func NewLine(ctx context.Context, since time.Time) Line {
	w, _, _ := progress.NewFromContext(ctx)
	return &line{w: w, since: since}
}

// hasVertex reports whether the progress that ctx carries is a vertex's. That of a whole build is of another type, and what BuildKit finds in it
// without a vertex it logs as an error.
func hasVertex(ctx context.Context) bool {
	w, _, _ := progress.NewFromContext(ctx)
	_, ok := w.(*progress.MultiWriter)
	_ = w.Close()
	return ok
}

type line struct {
	w     progress.Writer
	since time.Time
	text  string // which is the status' id: clients show that
}

func (l *line) Set(text string) {
	if text != l.text {
		l.end()
	}
	l.text = text
	_ = l.w.Write(text, progress.Status{Started: &l.since}) // nobody watches any more
}

func (l *line) end() {
	if l.text == "" {
		return
	}
	now := time.Now()
	_ = l.w.Write(l.text, progress.Status{Started: &l.since, Completed: &now})
	l.text = ""
}

func (l *line) Close() {
	l.end()
	_ = l.w.Close()
}
