package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// engine serves layers out of the store. A layer is opened once, whatever the number of snapshots that have it:
// its door mounts it below the engine's own directory, and a snapshot gets a bind mount of that.
type engine struct {
	opt   Options
	root  string // of the door's mounts
	door  layerDoor
	store *store.Store
	sched *fill.Scheduler

	ctx  context.Context //nolint:containedctx // of openings, which several mounts may wait for
	end  context.CancelCauseFunc
	wg   sync.WaitGroup // of openings, and of what is read ahead of them
	stop func() error

	totals totals
	tidy   tidy
	turns  chan struct{} // of openings that compute

	sources sources

	mu     sync.Mutex
	closed bool
	layers map[store.Key]*served
	mounts map[string]*served // by mount point
	ends   ends
}

// layerDoor lets readers into an opened layer.
type layerDoor interface {
	mount(s *served, target string) (doorMount, error)
	Close() error
}

// doorMount is a layer that readers can get into.
type doorMount interface {
	// Complete says that no byte of the layer is missing any more.
	Complete() error
	Unmount() error
}

// warmer is a doorMount whose metadata may have left the memory.
type warmer interface {
	// Warm is called before each use.
	Warm()
}

var (
	errUnmounted     = errors.New("layer is being unmounted")
	errEngineClosed  = errors.New("the snapshotter is being closed")
	errNobodyMounted = errors.New("nobody mounted the layer")
)

// DefaultMountTimeout is the default of Options.MountTimeout: what stargz-snapshotter gives a layer.
const DefaultMountTimeout = 30 * time.Second

// aheadFor is how long a layer that was opened because the one below it was mounted waits for its own
// mount.
const aheadFor = time.Minute

// newEngine opens the engine below root, whose mounts are below root too.
func newEngine(root string, userXattr bool, opt Options) (_ *engine, err error) {
	e := &engine{opt: opt, root: filepath.Join(root, "layers"), layers: map[store.Key]*served{}, mounts: map[string]*served{}}
	e.tidy.rest, e.turns = e.rest, make(chan struct{}, runtime.GOMAXPROCS(0))
	e.ctx, e.end = context.WithCancelCause(context.Background())
	if err := os.MkdirAll(e.root, 0o700); err != nil {
		return nil, err
	}
	// The door first: it takes over what a former daemon has left, which must be gone before layers are bound.
	if e.door, err = newLayerDoor(root, opt.Door, userXattr, e.denied); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.door.Close())
		}
	}()
	// What mounts of a former daemon were on. One that can't be removed is not in the way: new ones have names of their own.
	left, err := os.ReadDir(e.root)
	if err != nil {
		return nil, err
	}
	for _, d := range left {
		_ = os.Remove(filepath.Join(e.root, d.Name()))
	}
	if opt.Door == DoorEROFS {
		opt.Store.OpenData = erofs.OpenData
	}
	if e.store, err = store.Open(filepath.Join(root, "store"), opt.Store); err != nil {
		return nil, err
	}
	if opt.Fill.Room == nil {
		opt.Fill.Room = room(root, opt.Watch.NoRoom)
	}
	e.sched = fill.NewScheduler(opt.Fill)
	e.stop = sync.OnceValue(e.close)
	return e, nil
}

// failureKey is where Snapshotter.Prepare wants to find Mount's error, which
// stargz-snapshotter logs and drops.
type failureKey struct{}

// Mount implements stargz.FileSystem.
func (e *engine) Mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	err := e.mount(ctx, mountpoint, labels)
	if failure, ok := ctx.Value(failureKey{}).(*error); ok {
		*failure = err
	}
	return err
}

func (e *engine) mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	src, err := parseLabels(labels)
	if err != nil {
		return err
	}
	timeout := e.opt.MountTimeout
	if timeout <= 0 {
		timeout = DefaultMountTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no table of contents within %s", timeout))
	defer cancel()
	toc, err := digest.Parse(labels[estargz.TOCJSONDigestAnnotation])
	if err != nil {
		return fmt.Errorf("label %s: %w", estargz.TOCJSONDigestAnnotation, err)
	}
	s, err := e.acquire(ctx, src, store.Key{Blob: src.digest, TOC: toc})
	if err != nil {
		return err
	}
	e.openAhead(ctx, src)
	select {
	case <-s.ready:
		err = s.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil {
		err = unix.Mount(s.target, mountpoint, "", unix.MS_BIND, "")
	}
	if err != nil {
		return errors.Join(explainOpening(src.digest, err), e.release(s))
	}
	e.mu.Lock()
	closed := e.closed
	if !closed {
		e.mounts[mountpoint] = s
	}
	e.mu.Unlock()
	if closed {
		return errors.Join(errEngineClosed, unix.Unmount(mountpoint, unix.MNT_DETACH), e.release(s))
	}
	return nil
}

// openAhead opens the layers above, so that their tables of contents come at the same time as this one's.
func (e *engine) openAhead(ctx context.Context, src layerSource) {
	for _, above := range src.above {
		s, err := e.acquire(ctx, src.of(above.Blob), above)
		if err != nil {
			return // closed, or nobody waits any more
		}
		timer := time.AfterFunc(aheadFor, func() { _ = e.releaseAhead(s) })
		e.mu.Lock()
		again := s.ahead != nil
		if !again {
			s.ahead = timer
		}
		e.mu.Unlock()
		if again {
			timer.Stop()
			_ = e.release(s) // it has another reference
		}
	}
}

func (e *engine) releaseAhead(s *served) error {
	e.mu.Lock()
	ahead := s.ahead
	s.ahead = nil
	e.mu.Unlock()
	if ahead == nil {
		return nil
	}
	ahead.Stop()
	return e.release(s)
}

// acquire returns a layer, which is being opened or is open, and which the caller releases. It is read first where src
// says from now on. A layer that is being closed is waited for: two of it would have the same files.
func (e *engine) acquire(ctx context.Context, src layerSource, key store.Key) (*served, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.layers[key] != nil && e.layers[key].refs == 0 {
		gone := e.layers[key].gone
		e.mu.Unlock()
		select {
		case <-gone:
		case <-ctx.Done():
		}
		e.mu.Lock()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	if e.closed {
		return nil, errEngineClosed
	}
	s := e.layers[key]
	if s == nil {
		s = &served{key: key, engine: e, ready: make(chan struct{}), gone: make(chan struct{})}
		ctx, cancel := context.WithCancelCause(trace.ContextWithSpan(e.ctx, trace.SpanFromContext(ctx)))
		s.cancel = cancel
		s.repos.hosts, s.repos.opt = e.opt.Hosts, s.watchBlob(e.opt.Blob)
		s.repos.name(src) // before it is opened
		e.layers[key] = s
		e.wg.Go(func() { e.open(ctx, s) })
	} else {
		s.repos.name(src)
	}
	if len(src.above) > 0 {
		s.above = src.above
	}
	s.refs++
	return s, nil
}

// open opens a layer for all who wait for it.
func (e *engine) open(ctx context.Context, s *served) {
	opening, end := s.spanOpen(ctx)
	s.err = s.open(opening)
	end(s.err)
	close(s.ready)
	if s.err == nil {
		e.join()
		e.wg.Go(func() {
			e.borrow(ctx, s)
			defer e.giveBack(s)
			select {
			case <-s.held.Done():
				_ = s.door.Complete() // what fails costs time only
			case <-ctx.Done():
			}
		})
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.layers[s.key] == s {
		delete(e.layers, s.key) // the next one tries again
	}
}

// join tells the scheduler which open layers are of one image.
func (e *engine) join() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.layers {
		image := []*fill.Filler{nil}
		if s.opened() {
			image[0] = s.filler
		}
		for _, above := range s.above {
			var f *fill.Filler
			if o := e.layers[above]; o != nil && o.opened() {
				f = o.filler
			}
			image = append(image, f)
		}
		e.sched.Join(image...)
	}
}

// release ends a use of a layer, and closes it after the last.
func (e *engine) release(s *served) error {
	e.mu.Lock()
	s.refs--
	last := s.refs == 0
	e.mu.Unlock()
	if !last {
		return nil
	}
	s.cancel(errNobodyMounted)
	<-s.ready
	var err error
	if s.err == nil { // else nothing of it is left
		err = s.close()
	}
	e.mu.Lock()
	if e.layers[s.key] == s {
		delete(e.layers, s.key)
	}
	e.mu.Unlock()
	close(s.gone)
	return err
}

// rest lets the kernel have what lookups have brought into memory of the trees of layers.
func (e *engine) rest() {
	e.sources.rest()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.layers {
		if s.refs > 0 && s.opened() { // the store may have let go of the tree of one that is being closed
			s.held.Model().Rest()
		}
	}
}

// impliedBy returns the directories which the mounted layer with that table of contents leaves out.
func (e *engine) impliedBy(toc digest.Digest) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, s := range e.layers {
		if key.TOC == toc && s.opened() {
			return s.implied
		}
	}
	return nil
}

// Check implements stargz.FileSystem. A mounted layer is available: whether its
// registry still is shows when a byte is missing, and then it is retried.
func (e *engine) Check(_ context.Context, mountpoint string, labels map[string]string) error {
	e.mu.Lock()
	s := e.mounts[mountpoint]
	e.mu.Unlock()
	if s == nil {
		return fmt.Errorf("%s is not mounted", mountpoint)
	}
	if src, err := parseLabels(labels); err == nil && len(src.sessions) > 0 {
		s.repos.name(src)
	}
	if d, ok := s.door.(warmer); ok {
		d.Warm()
	}
	return nil
}

// Unmount implements stargz.FileSystem.
func (e *engine) Unmount(_ context.Context, mountpoint string) error {
	e.mu.Lock()
	s := e.mounts[mountpoint]
	delete(e.mounts, mountpoint)
	e.mu.Unlock()
	if s == nil {
		return nil // a directory of unpacked files, or what a failed mount has left
	}
	err := unix.Unmount(mountpoint, unix.MNT_DETACH)
	err = errors.Join(err, e.releaseAhead(s))
	return errors.Join(err, e.release(s))
}

// denied tells of a read that got EIO.
func (e *engine) denied(target string, err error) {
	e.mu.Lock()
	var s *served
	for _, l := range e.layers {
		if l.opened() && l.target == target {
			s = l
		}
	}
	e.mu.Unlock()
	var layer digest.Digest // unknown if the kernel couldn't even tell of the read
	switch {
	case s != nil:
		layer = s.key.Blob
	case target != "" || errors.Is(err, erofs.ErrUnmounted):
		return // of what is gone
	}
	if e.opt.Watch.Denied != nil && !errors.Is(err, errUnmounted) {
		e.opt.Watch.Denied(layer, err)
	}
}

// Close unmounts all layers and ends their reads. What has arrived of them is kept.
func (e *engine) Close() error { return e.stop() }

func (e *engine) close() error {
	e.mu.Lock()
	e.closed = true
	mounted := make([]string, 0, len(e.mounts))
	for mountpoint := range e.mounts {
		mounted = append(mounted, mountpoint)
	}
	e.mu.Unlock()
	e.end(errEngineClosed)
	e.wg.Wait()
	e.tidy.close()
	var errs []error
	for _, mountpoint := range mounted {
		errs = append(errs, e.Unmount(context.Background(), mountpoint))
	}
	e.mu.Lock()
	var rest []*served
	for _, s := range e.layers {
		rest = append(rest, s)
	}
	e.mu.Unlock()
	for _, s := range rest {
		errs = append(errs, e.releaseAhead(s))
	}
	for _, s := range rest {
		<-s.gone // all users are gone by now, or about to be
	}
	errs = append(errs, e.sched.Close(), e.door.Close(), e.store.Close())
	return errors.Join(slices.DeleteFunc(errs, func(err error) bool { return err == nil })...)
}
