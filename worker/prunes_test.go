package worker

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/worker/base"
)

// storeManager is a cache manager that looks for what there is to prune.
type storeManager struct {
	cache.Manager
	records *metadata.Store
	begun   chan struct{} // if not nil, a prune goes on for a while
	found   error
}

func (m *storeManager) Prune(ctx context.Context, _ chan client.UsageInfo, _ ...client.PruneInfo) error {
	if m.begun != nil {
		m.begun <- struct{}{}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	_, m.found = m.records.All()
	return errors.Join(m.found, context.Cause(ctx))
}

// unmounted is a snapshotter that has nothing mounted.
type unmounted struct{ snapshots.Snapshotter }

func (unmounted) Close() error { return nil }

// A garbage collection of BuildKit's that goes on when the worker is closed ends before the databases are closed, and one that comes later is none.
func TestPruneWhileClosing(t *testing.T) {
	records, err := metadata.NewStore(filepath.Join(t.TempDir(), "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	m := &storeManager{records: records, begun: make(chan struct{})}
	w := &Worker{Worker: &base.Worker{CacheMgr: m, WorkerOpt: base.WorkerOpt{MetadataStore: records}}, passwords: newPasswords(nil), snapshotter: unmounted{}}
	running := make(chan error)
	go func() { running <- w.Prune(t.Context(), nil) }()
	<-m.begun
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if err := <-running; err != nil || m.found != nil {
		t.Errorf("the collection that was under way: %v, and it found %v", err, m.found)
	}
	m.begun = nil
	if err := w.Prune(t.Context(), nil); err != nil {
		t.Errorf("a collection that came later: %v", err)
	}
}

func TestPrunes(t *testing.T) {
	failed := errors.New("failed")
	synctest.Test(t, func(t *testing.T) {
		var p prunes
		if err := p.do(t.Context(), func(context.Context) error { return failed }); !errors.Is(err, failed) {
			t.Errorf("while nothing ends: %v", err)
		}
		stuck, done := make(chan struct{}), make(chan error)
		for range 2 {
			go func() {
				done <- p.do(t.Context(), func(ctx context.Context) error {
					<-ctx.Done()
					if !errors.Is(context.Cause(ctx), errStopping) {
						t.Errorf("cause: %v", context.Cause(ctx))
					}
					<-stuck // it doesn't look at its context
					return failed
				})
			}()
		}
		synctest.Wait()
		begun := time.Now()
		p.end(3 * time.Second)
		if waited := time.Since(begun); waited != 3*time.Second {
			t.Errorf("waited %v for what doesn't end", waited)
		}
		p.end(time.Hour) // again
		close(stuck)
		for range 2 {
			if err := <-done; err != nil {
				t.Errorf("after the end: %v", err)
			}
		}
	})
}
