package exporter

import (
	"context"
	"runtime"
	"sync"

	"github.com/moby/buildkit/cache/remotecache"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/session"
)

// A reader wants the layers of a build.
type reader int

const (
	aPush reader = iota
	aCache
	// aSeekingCache reads blobs by parts, at the same time: what it gets can't be verified while it is passed on.
	aSeekingCache
)

// readers are who wants the layers of the builds of a session at the same time. To one alone those of a lazy base are passed on. Several have
// them from the content store, so that these are fetched once, as with stock BuildKit.
type readers struct {
	mu sync.Mutex
	n  map[string]map[reader]int
}

var wanted readers

// add counts until ctx ends, which is that of the build.
func (r *readers) add(ctx context.Context, g session.Group, who reader) {
	ids := session.AllSessionIDs(g)
	r.count(ids, who, 1)
	context.AfterFunc(ctx, func() { r.count(ids, who, -1) })
}

// addPush counts until done is called, or nobody knows any more what was to be pushed.
func (r *readers) addPush(id string, src *bkexporter.Source) (done func()) {
	ids := []string{id}
	r.count(ids, aPush, 1)
	done = sync.OnceFunc(func() { r.count(ids, aPush, -1) })
	runtime.AddCleanup(src, func(done func()) { done() }, done)
	return done
}

func (r *readers) count(ids []string, who reader, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n == nil {
		r.n = map[string]map[reader]int{}
	}
	for _, id := range ids {
		if r.n[id] == nil {
			r.n[id] = map[reader]int{}
		}
		if r.n[id][who] += n; r.n[id][who] <= 0 {
			delete(r.n[id], who)
		}
		if len(r.n[id]) == 0 {
			delete(r.n, id)
		}
	}
}

// alone reports whether there is one such reader in the session, and no other one.
func (r *readers) alone(id string, who reader) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.n[id]) == 1 && r.n[id][who] == 1
}

// Shared has pushes know that the same build exports a cache, which reads blobs by parts. [Cache] does so for one that doesn't.
func Shared(resolve remotecache.ResolveCacheExporterFunc) remotecache.ResolveCacheExporterFunc {
	return reading(aSeekingCache, resolve)
}

func reading(who reader, resolve remotecache.ResolveCacheExporterFunc) remotecache.ResolveCacheExporterFunc {
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Exporter, error) {
		e, err := resolve(ctx, g, attrs)
		if err == nil && e != nil {
			wanted.add(ctx, g, who)
		}
		return e, err
	}
}
