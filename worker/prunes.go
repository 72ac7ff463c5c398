package worker

import (
	"context"
	"errors"
	"sync"
	"time"
)

// prunes are those that are under way, garbage collections among them. BuildKit begins these a second after a build, if the daemon ends meanwhile as
// well, and waits for none of them: they would find the databases closed.
type prunes struct {
	mu      sync.Mutex
	ended   bool
	running map[*context.CancelCauseFunc]struct{}
	idle    chan struct{} // closed when the last one has returned after the end
}

var errStopping = errors.New("the daemon is being stopped")

// do prunes, unless the worker is being closed: what there is to free is left to the next daemon then, and that isn't an error.
func (p *prunes) do(ctx context.Context, prune func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return nil
	}
	if p.running == nil {
		p.running = map[*context.CancelCauseFunc]struct{}{}
	}
	p.running[&cancel] = struct{}{}
	p.mu.Unlock()
	err := prune(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.running, &cancel)
	if !p.ended {
		return err
	}
	if len(p.running) == 0 {
		close(p.idle)
	}
	return nil
}

// end breaks off what is under way, and lets nothing begin any more. It waits for what is under way, but not for longer than that.
func (p *prunes) end(atMost time.Duration) {
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	p.ended, p.idle = true, make(chan struct{})
	for cancel := range p.running {
		(*cancel)(errStopping)
	}
	if len(p.running) == 0 {
		close(p.idle)
	}
	p.mu.Unlock()
	select {
	case <-p.idle:
	case <-time.After(atMost):
	}
}
