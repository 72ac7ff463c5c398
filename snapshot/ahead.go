package snapshot

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Where a layer's table of contents begins, its last bytes say. Between the moment when a build knows its image and the one when it
// mounts that, the solver has to think: time enough to ask for them. Then the table is read in one request of the right size, on a
// connection that is there already. If they haven't come by then nobody waits for them, and the size is guessed.

const (
	// endSize is how much of a blob's end is read: what a registry sends at once on a new connection, ten segments of TCP (RFC 6928), less what
	// its headers take. All of the table, if there are some dozen files.
	endSize = 12 << 10
	// endWithin is how long that may take.
	endWithin = 10 * time.Second
	// keepEnds bounds the ends that are kept for layers which are never mounted, as those of images whose steps are all in the cache.
	keepEnds = 256
)

// ends are those of layers that nobody has opened yet. They are guarded by engine.mu.
type ends struct {
	of   map[store.Key]*end
	come []store.Key // oldest first; some aren't in of any more
}

// An end is the last bytes of a blob. It has none while they are on their way.
type end struct {
	tail
	fetched int64  // bytes that came over the link
	source  string // who sent them
}

// LookAhead says that a build is likely to mount a layer and those above it soon, with the credentials of these sessions: labels are
// those that Prepare would get. It doesn't wait, and costs a small request for each layer that isn't known yet.
func (s *Snapshotter) LookAhead(labels map[string]string, sessions []string) {
	src, err := parseLabels(labels)
	if err != nil {
		return // Prepare says so, if it comes to that
	}
	toc, err := digest.Parse(labels[estargz.TOCJSONDigestAnnotation])
	if err != nil {
		return
	}
	src.sessions = sessions
	for _, key := range append([]store.Key{{Blob: src.digest, TOC: toc}}, src.above...) {
		s.door.lookAhead(src.of(key.Blob), key)
	}
}

func (e *engine) lookAhead(src layerSource, key store.Key) {
	size := src.sizes[key.Blob]
	f, err := parseFormat(src.formats[key.Blob.String()])
	if err != nil || f.name == FormatZstdChunked || size == 0 || e.store.Has(key) {
		return // of zstd:chunked, the image says where the table is
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || e.layers[key] != nil || e.ends.of[key] != nil {
		return
	}
	if e.ends.of == nil {
		e.ends.of = map[store.Key]*end{}
	}
	e.ends.of[key] = &end{}
	e.wg.Go(func() { e.keepEnd(key, e.readEnd(src, key, size)) })
}

// readEnd returns the end of a layer, without bytes if it can't be had: who mounts the layer will find out why.
func (e *engine) readEnd(src layerSource, key store.Key, size int64) *end {
	ctx, cancel := context.WithTimeoutCause(e.ctx, endWithin, fmt.Errorf("no end of the blob within %s", endWithin))
	defer cancel()
	x := &end{}
	hosts := func() ([]docker.RegistryHost, error) { return e.opt.Hosts(src.ref, src.sessions) }
	from := blob.New(src.ref, key.Blob, size, hosts, blob.Options{
		RetryFor: endWithin,
		Fetched:  func(_ digest.Digest, n int64, _ time.Duration) { x.fetched += n },
	})
	off := max(size-endSize, 0)
	body, err := localFirst{from, key.Blob, e.opt.Local}.Fetch(ctx, off, size-off)
	if err != nil {
		return x
	}
	defer body.Close()
	x.source = fill.SourceOf(body)
	p := make([]byte, size-off)
	if _, err := io.ReadFull(body, p); err == nil {
		x.tail = tail{off, p}
	}
	return x
}

// keepEnd keeps the end of a layer until that is opened. For one that is being opened already it's too late.
func (e *engine) keepEnd(key store.Key, x *end) {
	e.totals.fetched.Add(x.fetched)
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.layers[key]
	if s != nil {
		s.credit(x)
	}
	if s != nil || len(x.p) == 0 {
		delete(e.ends.of, key)
		return
	}
	e.ends.of[key] = x
	e.ends.come = append(e.ends.come, key)
	if len(e.ends.come) > keepEnds {
		delete(e.ends.of, e.ends.come[0])
		e.ends.come = e.ends.come[1:]
	}
}

// takeEnd returns the end of the layer, without bytes if it hasn't come.
func (s *served) takeEnd() tail {
	e := s.engine
	e.mu.Lock()
	x := e.ends.of[s.key]
	if x == nil || len(x.p) == 0 {
		e.mu.Unlock()
		return tail{}
	}
	delete(e.ends.of, s.key)
	e.mu.Unlock()
	s.credit(x)
	return x.tail
}

// credit counts what was fetched as the layer's, which wasn't there yet.
func (s *served) credit(x *end) {
	if x.fetched == 0 {
		return
	}
	s.counts.fetched.Add(x.fetched)
	if x.source != "" {
		s.counts.source.CompareAndSwap(nil, &x.source)
	}
	if told := s.engine.opt.Blob.Fetched; told != nil {
		told(s.key.Blob, x.fetched, 0)
	}
}
