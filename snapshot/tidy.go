package snapshot

import (
	"context"
	"runtime/debug"
	"sync"
	"time"
)

// tidy gives memory back to the system after tables of contents were parsed: that takes many times what is kept of them. The
// runtime would collect it when as much again has been allocated, which a daemon that waits for its next build doesn't do, and
// then keep it.
type tidy struct {
	rest func() // gives back what isn't the runtime's

	mu      sync.Mutex
	entries int // parsed since the last time
	timer   *time.Timer
	closed  bool
}

const (
	// tidyFrom is the number of entries whose garbage is worth it: some 10 MB. A collection takes milliseconds.
	tidyFrom = 10_000
	// tidyAfter is for how long no table of contents must have been parsed: most cold steps are done by then.
	tidyAfter = 5 * time.Second
)

func (t *tidy) parsed(entries int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.entries += entries
	if t.closed || t.entries < tidyFrom {
		return
	}
	if t.timer == nil {
		t.timer = time.AfterFunc(tidyAfter, t.run)
	}
	t.timer.Reset(tidyAfter)
}

func (t *tidy) run() {
	t.mu.Lock()
	t.entries = 0
	t.mu.Unlock()
	t.rest()
	debug.FreeOSMemory()
}

func (t *tidy) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.timer != nil {
		t.timer.Stop()
	}
}

// A turn is one of as many places as there are processors, for whoever parses a table of contents and makes of it what a layer needs.
// More of them at a time would not be done earlier, but take more memory.
type turn struct {
	of   chan struct{}
	mine bool
}

// take waits for a place, unless ctx ends.
func (t *turn) take(ctx context.Context) {
	if t.mine {
		return
	}
	select {
	case t.of <- struct{}{}:
		t.mine = true
	case <-ctx.Done(): // what comes next finds out
	}
}

// pass gives the place back.
func (t *turn) pass() {
	if t.mine {
		<-t.of
		t.mine = false
	}
}
