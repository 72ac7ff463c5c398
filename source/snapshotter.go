package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/reference"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	bksnapshot "github.com/moby/buildkit/snapshot"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/progress/logs"
	"github.com/moby/buildkit/util/pull/pullprogress"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// SnapshotterOptions are the parts of a worker that a Snapshotter works with.
type SnapshotterOptions struct {
	// Required.
	ContentStore content.Store
	Applier      diff.Applier // whose errors name the layer
	LeaseManager leases.Manager
	Reporter     *report.Reporter
	// Registry returns how to fetch blobs of an image's repository with the credentials of a build. Without it, layers
	// are forgotten at a restart.
	Registry func(ref string) func(session.Group) content.Provider
	// Expect, if not nil, is told what was expected of an image when its topmost lazy layer, which it names, has been mounted. It must
	// not wait.
	Expect func(layer digest.Digest, files []fill.Expected)
	// LookAhead, if not nil, is told the labels of an image's lowest lazy layer, and the sessions that may read it, when a build is likely to
	// mount it soon. It must not wait.
	LookAhead func(labels map[string]string, sessions []string)
	// Hosts returns the hosts that serve a repository, with the credentials of these sessions. Without it, nothing can be passed on from
	// one registry to another.
	Hosts func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error)
	// Tar returns the tar of a layer out of what has arrived of that, as [snapshot.Snapshotter.Tar] does. Without it, layers are read whole.
	Tar func(ctx context.Context, labels map[string]string, sessions []string, headers zstdchunked.Position) (tar io.ReadCloser, toc []byte, err error)
	// Blob tunes the reads of what is passed on.
	Blob blob.Options
}

// Snapshotter carries out the plans of image sources when BuildKit's cache
// manager asks for a layer's snapshot. Everything else it hands through.
type Snapshotter struct {
	bksnapshot.Snapshotter
	opt       SnapshotterOptions
	plans     plans
	origins   origins
	expected  expectations
	corrupt   corrupt
	restoring atomic.Bool
}

// NewSnapshotter puts a Snapshotter in front of the worker's own.
func NewSnapshotter(next bksnapshot.Snapshotter, opt SnapshotterOptions) *Snapshotter {
	return &Snapshotter{Snapshotter: next, opt: opt}
}

// errPull tells the cache manager, to which every error means the same, to pull
// this layer and those above.
var errPull = errors.New("layer is pulled eagerly")

// labelRemote says that a snapshot's blob need not be in the content store.
const labelRemote = "containerd.io/snapshot/remote"

// Stat implements snapshot.Snapshotter. A lazy layer whose blob is in the content
// store, e.g. because it was converted, is not remote any more: BuildKit would
// otherwise ask for a way to fetch what it made of the blob itself.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	info, err := s.Snapshotter.Stat(ctx, key)
	if err != nil {
		return info, err
	}
	if _, remote := info.Labels[labelRemote]; !remote {
		return info, nil
	}
	if dgst, err := digest.Parse(info.Labels[snapshot.LabelDigest]); err == nil {
		if _, err := s.opt.ContentStore.Info(ctx, dgst); err == nil || s.local(ctx, dgst) {
			info.Labels = maps.Clone(info.Labels)
			delete(info.Labels, labelRemote)
		}
	}
	return info, nil
}

// Prepare implements snapshot.Snapshotter. With the labels of a plan it makes the
// layer's snapshot and returns ErrAlreadyExists, or errPull if no layer from
// here on can be lazy: BuildKit pulls those in parallel.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) error {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return err
		}
	}
	target := info.Labels[snapshot.LabelTarget]
	p := s.plans.get(info.Labels[labelPlan])
	if target != "" && info.Labels[snapshot.LabelRef] == "" && p == nil {
		return errPull // nobody knows where it could be mounted from
	}
	if target == "" || p == nil {
		return s.Snapshotter.Prepare(ctx, key, parent, opts...)
	}
	i := p.find(info.Labels[snapshot.LabelDigest])
	if i < 0 {
		return s.Snapshotter.Prepare(ctx, key, parent, opts...)
	}

	err := s.mount(ctx, p, i, key, parent, opts)
	if errors.Is(err, errPull) && p.lazyAbove(i) {
		if err = s.pull(ctx, p, i, target, parent, snapshot.Sessions(info.Labels)); err == nil {
			err = fmt.Errorf("snapshot %s: %w", target, cerrdefs.ErrAlreadyExists)
		}
	} else if errors.Is(err, errPull) {
		for j := i; j < len(p.layers); j++ {
			s.explain(ctx, p, j)(nil)
		}
		s.summarize(ctx, p)
	}
	if i == len(p.layers)-1 && cerrdefs.IsAlreadyExists(err) {
		s.summarize(ctx, p)
	}
	return err
}

// mount tries to mount the layer i; errPull means that it's to be pulled, for the
// reason which the layer now has.
func (s *Snapshotter) mount(ctx context.Context, p *plan, i int, key, parent string, opts []snapshots.Opt) error {
	l := &p.layers[i]
	if l.eager() != "" {
		return errPull
	}
	done := p.status(ctx, fmt.Sprintf("mounting layer %s (%s)", l.desc.Digest, l.table.format))
	err := s.Snapshotter.Prepare(ctx, key, parent, opts...)
	done(nil)
	if cerrdefs.IsAlreadyExists(err) {
		s.opt.Reporter.Opened(l.desc.Digest, l.table.format)
		s.mounted(p, i)
		return err
	}
	if context.Cause(ctx) != nil {
		return err // says nothing about the layer
	}
	var mismatch *snapshot.MismatchError
	var failed *snapshot.MountError
	switch {
	case errors.As(err, &mismatch):
		l.refuse(mismatch)
	case errors.As(err, &failed):
		l.pullBecause(failed.Reason())
	default:
		return err
	}
	return errPull
}

// pull makes the layer's snapshot as BuildKit's cache manager would: blob into the
// content store, unpacked on its parent, DiffID verified. The blobs of all layers
// that have to be pulled come in parallel.
func (s *Snapshotter) pull(ctx context.Context, p *plan, i int, target, parent string, sessions []string) (err error) {
	ctx, release, err := leaseutil.WithLease(ctx, s.opt.LeaseManager, leaseutil.MakeTemporary)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()

	g := session.NewGroup(sessions...)
	eg, egctx := errgroup.WithContext(ctx)
	for j := i; j < len(p.layers); j++ {
		if l := &p.layers[j]; l.eager() != "" {
			eg.Go(func() error { return s.fetch(egctx, p, j, g) })
		}
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	return s.unpack(ctx, p, i, target, parent)
}

// fetch brings the layer's blob into the content store.
func (s *Snapshotter) fetch(ctx context.Context, p *plan, i int, g session.Group) (err error) {
	l := &p.layers[i]
	if err := l.refused(); err != nil {
		return err
	}
	done := s.explain(ctx, p, i)
	defer func() { done(err) }()
	if _, err := s.opt.ContentStore.Info(ctx, l.desc.Digest); !cerrdefs.IsNotFound(err) {
		return err
	}
	if p.progress != nil {
		var stop func(error)
		ctx, stop = p.progress.Start(ctx)
		defer stop(nil)
	}
	return contentutil.Copy(ctx, s.opt.ContentStore, &pullprogress.ProviderWithProgress{
		Provider: l.handler.Provider(g),
		Manager:  s.opt.ContentStore,
	}, l.desc, l.handler.Ref, logs.LoggerFromContext(ctx))
}

func (s *Snapshotter) unpack(ctx context.Context, p *plan, i int, target, parent string) error {
	l := &p.layers[i]
	done := p.status(ctx, "extracting "+l.desc.Digest.String())
	defer done(nil)

	key := fmt.Sprintf("extract-%s %s", identity.NewID(), target)
	if err := s.Snapshotter.Prepare(ctx, key, parent); err != nil {
		return err
	}
	mountable, err := s.Mounts(ctx, key)
	if err != nil {
		return err
	}
	mounts, unmount, err := mountable.Mount()
	if err != nil {
		return err
	}
	applied, err := s.opt.Applier.Apply(ctx, l.desc, mounts)
	if err := errors.Join(err, unmount()); err != nil {
		return err
	}
	if want := digest.Digest(l.handler.Annotations[labels.LabelUncompressed]); applied.Digest != want {
		return fmt.Errorf("unpack layer %s: DiffID mismatch: the image says %s, the layer has %s", l.desc.Digest, want, applied.Digest)
	}
	if err := s.Commit(ctx, target, key); err != nil && !cerrdefs.IsAlreadyExists(err) {
		return err
	}
	return nil
}
