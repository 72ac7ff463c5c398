package exporter

import (
	"context"
	"sync"

	"github.com/moby/buildkit/cache/remotecache"
	"github.com/moby/buildkit/session"
)

// sessions are those whose builds export caches. They want the layers that a push wants, at the same time: so that these are fetched once,
// they all have them from the content store then, as with stock BuildKit.
type sessions struct {
	mu sync.Mutex
	n  map[string]int
}

var withCache sessions

// add counts until ctx ends, which is that of the build.
func (s *sessions) add(ctx context.Context, g session.Group) {
	ids := session.AllSessionIDs(g)
	s.count(ids, 1)
	context.AfterFunc(ctx, func() { s.count(ids, -1) })
}

func (s *sessions) count(ids []string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n == nil {
		s.n = map[string]int{}
	}
	for _, id := range ids {
		if s.n[id] += n; s.n[id] <= 0 {
			delete(s.n, id)
		}
	}
}

func (s *sessions) has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n[id] > 0
}

// Shared has pushes know that the same build exports a cache. [Cache] does so by itself.
func Shared(resolve remotecache.ResolveCacheExporterFunc) remotecache.ResolveCacheExporterFunc {
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Exporter, error) {
		e, err := resolve(ctx, g, attrs)
		if err == nil && e != nil {
			withCache.add(ctx, g)
		}
		return e, err
	}
}
