package snapshot

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

const (
	// keepRepositories and keepSessions bound what is remembered of the builds that use a layer for as long as it's mounted.
	keepRepositories = 4
	keepSessions     = 32
)

// repositories are those that a layer's blob can be read from: that of the image which a build has used last, and, as builds that came before may still
// run, those of earlier images. One that can't be read from is asked last, until a build uses it again.
type repositories struct {
	hosts func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error)
	opt   blob.Options // Failed is told of reads that all have failed

	mu    sync.Mutex
	list  []repository // in the order in which they are asked; there is one before anything is read
	whole bool         // see blob.Reader.AcceptWhole
}

type repository struct {
	src  layerSource // named last, with the sessions of those before
	blob *blob.Reader
}

// name puts the repository of src first, and its sessions before those that were named for it earlier: these may outlive them.
func (r *repositories) name(src layerSource) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.list, func(o repository) bool { return o.src.ref.Locator == src.ref.Locator })
	if i >= 0 {
		src.sessions = newest(src.sessions, r.list[i].src.sessions)
	}
	hosts := func() ([]docker.RegistryHost, error) { return r.hosts(src.ref, src.sessions) }
	if i >= 0 {
		b := r.list[i].blob
		b.SetHosts(hosts)
		r.list = slices.Insert(slices.Delete(r.list, i, i+1), 0, repository{src, b})
		return
	}
	opt := r.opt
	opt.Failed = nil
	b := blob.New(src.ref, src.digest, src.sizes[src.digest], hosts, opt)
	if r.whole {
		b.AcceptWhole()
	}
	r.list = slices.Insert(r.list, 0, repository{src, b})
	r.list = r.list[:min(len(r.list), keepRepositories)]
}

// newest returns sessions and those named before that aren't among them, as many as are kept.
func newest(sessions, before []string) []string {
	all := slices.Clone(sessions)
	for _, id := range before {
		if !slices.Contains(sessions, id) {
			all = append(all, id)
		}
	}
	return all[:min(len(all), keepSessions)]
}

// use says that the layer is mounted: from now on it's read at any cost.
func (r *repositories) use() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.whole = true
	for _, o := range r.list {
		o.blob.AcceptWhole()
	}
}

// all returns the repositories in the order in which they are asked.
func (r *repositories) all() []repository {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

// first returns the repository that is read from now.
func (r *repositories) first() repository { return r.all()[0] }

// last has a repository asked after the others.
func (r *repositories) last(failed repository) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.IndexFunc(r.list, func(o repository) bool { return o.blob == failed.blob }); i >= 0 {
		o := r.list[i]
		r.list = append(slices.Delete(r.list, i, i+1), o)
	}
}

// Fetch implements fill.Fetcher.
func (r *repositories) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return r.open(&relay{ctx: ctx, of: r, fetch: (*blob.Reader).Fetch, from: r.all(), off: off, end: off + n})
}

// Refetch implements fill.Refetcher. The first repository has most likely sent what is corrupt.
func (r *repositories) Refetch(ctx context.Context, off, n int64, from string) (io.ReadCloser, error) {
	fetch := func(b *blob.Reader, ctx context.Context, off, n int64) (io.ReadCloser, error) {
		return b.Refetch(ctx, off, n, from)
	}
	all := r.all()
	return r.open(&relay{ctx: ctx, of: r, fetch: fetch, from: append(all[1:], all[0]), off: off, end: off + n})
}

func (r *repositories) open(b *relay) (io.ReadCloser, error) {
	if err := b.open(); err != nil {
		return nil, err
	}
	return b, nil
}

// relay is the body of a range request that goes on in the next repository when one can't be read from.
type relay struct {
	io.ReadCloser // of from[0]

	ctx   context.Context //nolint:containedctx // an io.Reader has no other way to be cancelled
	of    *repositories
	fetch func(r *blob.Reader, ctx context.Context, off, n int64) (io.ReadCloser, error)

	from     []repository // those that haven't failed
	off, end int64        // what is still to come
	err      error        // of those that have
}

// open asks one repository after the other.
func (b *relay) open() error {
	for {
		body, err := b.fetch(b.from[0].blob, b.ctx, b.off, b.end-b.off)
		if err == nil {
			b.ReadCloser = body
			return nil
		}
		if err := b.next(err); err != nil {
			return err
		}
	}
}

// next leaves the present repository to the others. The error says that there are none.
func (b *relay) next(err error) error {
	if context.Cause(b.ctx) != nil {
		return err
	}
	failed := b.from[0]
	b.of.last(failed)
	if b.err != nil {
		err = fmt.Errorf("%w; %w", b.err, err)
	}
	b.err, b.from = err, b.from[1:]
	told := b.of.opt.Failed
	if len(b.from) > 0 {
		told, err = b.of.opt.Retrying, nil
	}
	if told != nil {
		told(failed.src.digest, b.err)
	}
	return err
}

// Read implements io.Reader.
func (b *relay) Read(p []byte) (int, error) {
	if len(b.from) == 0 {
		return 0, b.err
	}
	n, err := b.ReadCloser.Read(p)
	b.off += int64(n)
	if err == nil || b.off == b.end {
		return n, err
	}
	if err := b.next(err); err != nil {
		return n, err
	}
	b.Close()
	return n, b.open()
}

// Source tells package fill.
func (b *relay) Source() string { return fill.SourceOf(b.ReadCloser) }

// Whole tells package fill.
func (b *relay) Whole() bool { return fill.IsWhole(b.ReadCloser) }
