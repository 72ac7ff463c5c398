package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/estargz"
	stargzfs "github.com/containerd/stargz-snapshotter/fs"
	stargzlayer "github.com/containerd/stargz-snapshotter/fs/layer"
	"github.com/containerd/stargz-snapshotter/fs/remote"
	stargzsource "github.com/containerd/stargz-snapshotter/fs/source"
	stargz "github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// door is stargz-snapshotter's file system, reading through package blob.
type door struct {
	stargz.FileSystem
	opt Options

	abandoned  sync.WaitGroup // mounts whose caller is gone
	failures   atomic.Int64   // reads that were given up
	generation atomic.Int64   // of the compressed bytes which the file system keeps

	mu      sync.Mutex
	readers map[digest.Digest]*reader
	mounted map[string]digest.Digest        // by mount point
	failed  map[digest.Digest]error         // the last read that was given up, while a layer is being mounted
	tocs    map[digest.Digest]digest.Digest // the mounted layer that a table of contents belongs to
	implied map[digest.Digest][]string      // directories which a table of contents leaves out
}

func newDoor(root string, opaque stargzlayer.OverlayOpaqueType, opt Options) (*door, error) {
	d := &door{
		opt:     opt,
		readers: map[digest.Digest]*reader{},
		mounted: map[string]digest.Digest{},
		failed:  map[digest.Digest]error{},
		tocs:    map[digest.Digest]digest.Digest{},
		implied: map[digest.Digest][]string{},
	}
	d.opt.Blob.Failed = func(dgst digest.Digest, err error) {
		d.failures.Add(1)
		d.mu.Lock()
		d.failed[dgst] = err
		d.mu.Unlock()
		if opt.Blob.Failed != nil {
			opt.Blob.Failed(dgst, err)
		}
	}
	fs, err := stargzfs.NewFilesystem(root, opt.Stargz,
		stargzfs.WithGetSources(d.sources),
		stargzfs.WithResolveHandler("blob", d),
		stargzfs.WithMetadataStore(d.openTOC),
		stargzfs.WithOverlayOpaqueType(opaque),
	)
	if err != nil {
		return nil, err
	}
	d.FileSystem = fs
	return d, nil
}

// sources tells the file system names only: handler knows where the bytes are.
func (d *door) sources(labels map[string]string) ([]stargzsource.Source, error) {
	return stargzsource.FromDefaultLabels(func(reference.Spec) ([]docker.RegistryHost, error) {
		return nil, errors.New("layers are read through package blob")
	})(labels)
}

// failureKey is where Snapshotter.Prepare wants to find Mount's error, which
// stargz-snapshotter logs and drops.
type failureKey struct{}

// Mount implements stargz.FileSystem.
func (d *door) Mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	err := d.mount(ctx, mountpoint, labels)
	if failure, ok := ctx.Value(failureKey{}).(*error); ok {
		*failure = err
	}
	return err
}

func (d *door) mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	src, err := parseLabels(labels)
	if err != nil {
		return err
	}
	d.open(src)
	if d.opt.MountTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, d.opt.MountTimeout,
			fmt.Errorf("no table of contents within %s", d.opt.MountTimeout))
		defer cancel()
	}
	d.mu.Lock()
	delete(d.failed, src.digest)
	d.mu.Unlock()
	err = d.mountUntil(ctx, mountpoint, labels)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		return explain(ctx, src.digest, err, d.failed[src.digest])
	}
	d.mounted[mountpoint] = src.digest
	d.tocs[digest.Digest(labels[estargz.TOCJSONDigestAnnotation])] = src.digest
	return nil
}

// impliedBy returns the directories that a layer's table of contents leaves out.
func (d *door) impliedBy(toc digest.Digest) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.implied[toc]
}

// refetch makes the file system forget the compressed bytes it keeps, of all
// layers: it doesn't say which of them are corrupt. What it has verified it keeps.
func (d *door) refetch() {
	d.generation.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.readers {
		r.forget()
	}
}

// corrupt tells of a chunk that arrived corrupt twice.
func (d *door) corrupt(toc digest.Digest, err error) {
	d.mu.Lock()
	layer := d.tocs[toc]
	d.mu.Unlock()
	if d.opt.Blob.Failed != nil {
		d.opt.Blob.Failed(layer, fmt.Errorf("layer %s: %w", layer, err))
	}
}

// mountUntil is the file system's Mount, which itself goes on for 30 s whatever
// becomes of its context.
func (d *door) mountUntil(ctx context.Context, mountpoint string, labels map[string]string) error {
	done := make(chan error, 1)
	d.abandoned.Add(1)
	go func() { done <- d.FileSystem.Mount(ctx, mountpoint, labels) }()
	select {
	case err := <-done:
		d.abandoned.Done()
		return err
	case <-ctx.Done():
		go func() {
			defer d.abandoned.Done()
			if <-done == nil {
				_ = d.unmount(context.WithoutCancel(ctx), mountpoint)
			}
		}()
		return context.Cause(ctx)
	}
}

// unmount is the file system's Unmount, which gives up on files in use.
func (d *door) unmount(ctx context.Context, mountpoint string) error {
	if err := d.FileSystem.Unmount(ctx, mountpoint); err != nil {
		return unix.Unmount(mountpoint, unix.MNT_DETACH)
	}
	return nil
}

// Check implements stargz.FileSystem. A mounted layer is available: whether its
// registry still is shows when a byte is missing, and then it is retried.
func (d *door) Check(ctx context.Context, mountpoint string, labels map[string]string) error {
	if src, err := parseLabels(labels); err == nil && len(src.sessions) > 0 {
		d.open(src)
	}
	return d.FileSystem.Check(ctx, mountpoint, labels)
}

// Unmount implements stargz.FileSystem.
func (d *door) Unmount(ctx context.Context, mountpoint string) error {
	d.mu.Lock()
	dgst, ok := d.mounted[mountpoint]
	d.mu.Unlock()
	if !ok {
		// A directory of unpacked files, or what a failed mount has left.
		_ = d.FileSystem.Unmount(ctx, mountpoint)
		return nil
	}
	err := d.unmount(ctx, mountpoint)
	d.mu.Lock()
	_, ok = d.mounted[mountpoint]
	delete(d.mounted, mountpoint)
	last := ok
	for _, other := range d.mounted {
		last = last && other != dgst
	}
	var r *reader
	if last {
		r = d.readers[dgst]
		delete(d.readers, dgst)
		delete(d.failed, dgst)
		maps.DeleteFunc(d.tocs, func(toc, layer digest.Digest) bool {
			if layer == dgst {
				delete(d.implied, toc)
			}
			return layer == dgst
		})
	}
	d.mu.Unlock()
	if r != nil {
		err = errors.Join(err, r.Close())
	}
	if last && d.opt.Unmounted != nil {
		d.opt.Unmounted(dgst)
	}
	return err
}

// Close ends the reads of all layers, mounted or not, and waits for mounts that
// were given up.
func (d *door) Close() error {
	d.mu.Lock()
	readers := d.readers
	d.readers = map[digest.Digest]*reader{}
	d.mu.Unlock()
	var errs []error
	for _, r := range readers {
		errs = append(errs, r.Close())
	}
	d.abandoned.Wait()
	return errors.Join(errs...)
}

// open makes sure that the layer and those above it have readers which use the
// newest credentials.
func (d *door) open(src layerSource) {
	hosts := func() ([]docker.RegistryHost, error) { return d.opt.Hosts(src.ref, src.sessions) }
	d.mu.Lock()
	defer d.mu.Unlock()
	for dgst, size := range src.sizes {
		r := d.readers[dgst]
		if r == nil {
			r = &reader{digest: dgst, local: d.opt.Local, generation: &d.generation}
			d.readers[dgst] = r
		}
		r.from(src.ref, size, hosts, d.opt.Blob)
	}
}

// Handle implements remote.Handler: it gives the file system its ranged reads.
func (d *door) Handle(ctx context.Context, desc ocispecs.Descriptor) (remote.Fetcher, int64, error) {
	d.mu.Lock()
	r := d.readers[desc.Digest]
	d.mu.Unlock()
	if r == nil {
		return nil, 0, fmt.Errorf("layer %s: unknown source", desc.Digest)
	}
	f, size, err := r.open(ctx)
	if err != nil {
		return nil, 0, err
	}
	return f, size, nil
}
