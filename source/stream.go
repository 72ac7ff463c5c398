package source

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// Stream reads the blob of a lazy layer from the registry that has it, for whoever sends it elsewhere: nothing of it is kept. It is
// made for being read from the start to the end, and the last bytes then only come if all have the blob's digest. Requests that fail
// are made again, at other hosts if there are any, as package blob does.
//
// A blob that is in the content store, or of which nobody knows where it is, is ErrNotFound: BuildKit can provide those.
func (s *Snapshotter) Stream(ctx context.Context, desc ocispecs.Descriptor, g session.Group) (content.ReaderAt, error) {
	return s.stream(ctx, desc, g, "passing on")
}

// Convert is Stream for who makes another layer of the blob.
func (s *Snapshotter) Convert(ctx context.Context, desc ocispecs.Descriptor, g session.Group) (content.ReaderAt, error) {
	return s.stream(ctx, desc, g, "converting")
}

// stream is Stream. The user sees what is being done.
func (s *Snapshotter) stream(ctx context.Context, desc ocispecs.Descriptor, g session.Group, doing string) (content.ReaderAt, error) {
	if s.opt.Hosts == nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, cerrdefs.ErrNotFound)
	}
	if _, err := s.opt.ContentStore.Info(ctx, desc.Digest); err == nil {
		return nil, fmt.Errorf("blob %s is in the content store: remotely it is %w", desc.Digest, cerrdefs.ErrNotFound)
	} else if !cerrdefs.IsNotFound(err) {
		return nil, err
	}
	l := s.known(desc.Digest)
	if l.refused != nil {
		return nil, l.refused
	}
	ref, err := reference.Parse(l.ref)
	if err != nil || l.size <= 0 {
		return nil, fmt.Errorf("where blob %s comes from: %w", desc.Digest, cerrdefs.ErrNotFound)
	}
	sessions := session.AllSessionIDs(g)
	b := blob.New(ref, desc.Digest, l.size, func() ([]docker.RegistryHost, error) { return s.opt.Hosts(ref, sessions) }, s.opt.Blob)
	b.AcceptWhole()
	end := l.status(ctx, doing)
	return &stream{ctx: ctx, blob: b, size: l.size, corrupt: &s.corrupt, done: func() { end(nil) }}, nil
}

// knownLayer is what is known of a layer whose blob is in a registry.
type knownLayer struct {
	plan                *plan // whose user sees what is done with it, if there is one
	digest              digest.Digest
	ref                 string // of the image; "" if nothing is known
	size                int64  // of the blob, in bytes
	annotations, labels map[string]string
	refused             error
}

// known returns what the newest plan, or else BuildKit's records, say of a layer.
func (s *Snapshotter) known(dgst digest.Digest) knownLayer {
	if p, l := s.plans.registryLayer(dgst); l != nil {
		return knownLayer{p, dgst, l.handler.Ref, l.desc.Size, l.handler.Annotations, l.handler.SnapshotLabels, l.refused()}
	}
	from, _ := s.origins.get(dgst)
	return knownLayer{nil, dgst, from.Ref, from.Desc.Size, from.Annotations, from.Labels, nil}
}

// status tells the user what is done with the layer, until done is called.
func (l knownLayer) status(ctx context.Context, doing string) (done func(error)) {
	if l.plan == nil {
		return func(error) {}
	}
	return l.plan.status(ctx, fmt.Sprintf("%s layer %s from %s", doing, l.digest, locator(l.ref)))
}

// locator returns the repository of a reference.
func locator(ref string) string {
	spec, err := reference.Parse(ref)
	if err != nil {
		return ref
	}
	return spec.Locator
}

// registryLayer returns the layer with that blob of the newest plan whose image is in a registry, nil if there is none.
func (ps *plans) registryLayer(dgst digest.Digest) (*plan, *layer) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, id := range slices.Backward(ps.ids) {
		p := ps.byID[id]
		if n := p.find(dgst.String()); n >= 0 && p.registry && p.layers[n].handler != nil {
			return p, &p.layers[n]
		}
	}
	return nil, nil
}

// A stream is a blob that is read while it arrives.
type stream struct {
	ctx     context.Context //nolint:containedctx // an io.ReaderAt has no other way to be cancelled
	blob    *blob.Reader
	size    int64
	corrupt *corrupt
	done    func()

	mu     sync.Mutex
	body   io.ReadCloser
	off    int64           // of the body
	sum    digest.Digester // of what is in front of off, if that was read from the start; else nil
	closed bool
}

// Size implements content.ReaderAt.
func (s *stream) Size() int64 { return s.size }

// ReadAt implements io.ReaderAt. Reads that don't follow each other are a request each.
func (s *stream) ReadAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, io.ErrClosedPipe
	}
	if off < 0 {
		return 0, fmt.Errorf("read blob %s: negative offset %d", s.blob.Digest(), off)
	}
	if off >= s.size {
		return 0, io.EOF
	}
	if s.body == nil || s.off != off {
		if err := s.open(off); err != nil {
			return 0, err
		}
	}
	atEnd := int64(len(p)) >= s.size-off
	p = p[:min(int64(len(p)), s.size-off)]
	n, err := io.ReadFull(s.body, p)
	if s.sum != nil {
		s.sum.Hash().Write(p[:n])
	}
	s.off += int64(n)
	if err != nil {
		s.hangUp()
		return n, err
	}
	if s.off == s.size {
		err := s.verify()
		s.hangUp()
		if err != nil {
			return 0, err
		}
	}
	if atEnd && len(p) == n {
		return n, io.EOF
	}
	return n, nil
}

func (s *stream) open(off int64) (err error) {
	s.hangUp()
	s.sum = nil
	if off == 0 {
		s.sum = s.blob.Digest().Algorithm().Digester()
	}
	if from, ok := s.corrupt.from(s.blob.Digest()); ok {
		s.body, err = s.blob.Refetch(s.ctx, off, s.size-off, from)
	} else {
		s.body, err = s.blob.Fetch(s.ctx, off, s.size-off)
	}
	s.off = off
	return err
}

func (s *stream) hangUp() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
}

// verify says whether the bytes are the blob's. It can't of a part, which is left to the receiver.
func (s *stream) verify() error {
	if s.sum == nil {
		return nil
	}
	want, got := s.blob.Digest(), s.sum.Digest()
	if got == want {
		s.corrupt.remove(want)
		return nil
	}
	return &corruptError{
		err:   fmt.Errorf("blob %s of %s: what the registry has sent has the digest %s", want, s.blob.Repository(), got),
		again: s.corrupt.add(want, fill.SourceOf(s.body)),
	}
}

// Close implements io.Closer.
func (s *stream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hangUp()
	if !s.closed {
		s.closed = true
		s.done()
	}
	return nil
}

// corrupt are the blobs of which other bytes have arrived than they should, and the hosts that have sent them.
type corrupt struct {
	mu    sync.Mutex
	blobs map[digest.Digest]string
}

// add reports whether the blob wasn't among them. If it was, it isn't any more: the next one to try has its own second chance.
func (c *corrupt) add(d digest.Digest, from string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.blobs[d]; ok {
		delete(c.blobs, d)
		return false
	}
	if c.blobs == nil {
		c.blobs = map[digest.Digest]string{}
	}
	c.blobs[d] = from
	return true
}

func (c *corrupt) from(d digest.Digest) (host string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	host, ok = c.blobs[d]
	return host, ok
}

func (c *corrupt) remove(d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.blobs, d)
}

// A corruptError is temporary, as a net.Error, the first time: BuildKit then sends the blob again, and it is fetched from elsewhere.
type corruptError struct {
	err   error
	again bool
}

func (e *corruptError) Error() string   { return e.err.Error() }
func (e *corruptError) Unwrap() error   { return e.err }
func (e *corruptError) Temporary() bool { return e.again }
func (e *corruptError) Timeout() bool   { return false }
