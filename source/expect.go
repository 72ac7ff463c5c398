package source

import (
	"sync"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// expectations are files that the first steps on an image will read, by the image's reference, from when a build asks for
// such a step until the image is mounted.
type expectations struct {
	mu    sync.Mutex
	byRef map[string]expectation
}

type expectation struct {
	files []fill.Expected
	since time.Time
}

const (
	// expectFor is how long an image may take to be mounted. A step that is cached needs none.
	expectFor = time.Minute
	// keepExpectations bounds the images, maxExpected the files of one.
	keepExpectations = 64
	maxExpected      = 256
)

// Expect says which files of an image a step will read first that a build is about to run on it. When all that is lazy of the
// image has been mounted, SnapshotterOptions.Expect is told.
func (s *Snapshotter) Expect(ref string, files []fill.Expected) {
	e := &s.expected
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	for old, x := range e.byRef {
		if now.Sub(x.since) > expectFor {
			delete(e.byRef, old)
		}
	}
	x, known := e.byRef[ref]
	if !known && len(e.byRef) >= keepExpectations {
		return
	}
	if e.byRef == nil {
		e.byRef = map[string]expectation{}
	}
	x.since = now
	x.files = append(x.files, files[:min(len(files), maxExpected-len(x.files))]...)
	e.byRef[ref] = x
}

// mounted is called when layer i of an image has been mounted.
func (s *Snapshotter) mounted(p *plan, i int) {
	if s.opt.Expect == nil || p.lazyAbove(i) {
		return
	}
	e := &s.expected
	e.mu.Lock()
	x := e.byRef[p.ref]
	delete(e.byRef, p.ref)
	e.mu.Unlock()
	if len(x.files) > 0 && time.Since(x.since) <= expectFor {
		s.opt.Expect(p.layers[i].desc.Digest, x.files)
	}
}
