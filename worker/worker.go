package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/exec"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/reference"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/client"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/session"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/bklog"
	bkworker "github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	"go.opentelemetry.io/otel/metric"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
	"github.com/buildkitd-lazy/buildkitd-lazy/exporter"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
	"github.com/buildkitd-lazy/buildkitd-lazy/source"
)

// ErrNoRuntime says that no OCI runtime is installed.
var ErrNoRuntime = errors.New("no OCI runtime: neither buildkit-runc nor runc is in PATH; install runc (apt-get install runc) or name a runtime by --oci-worker-binary")

// Options are what a worker is made of.
type Options struct {
	// Config is buildkitd.toml with flags applied and defaults filled in. Required.
	Config *bkconfig.Config
	// Lazy is the [lazy] table.
	Lazy config.Lazy
	// SessionManager knows the clients whose credentials lazy reads use. Required.
	SessionManager *session.Manager
	// TraceSocket is where build containers find the trace collector, or "".
	TraceSocket string
	// Version is what the worker reports to clients.
	Version client.BuildkitVersion

	// MeterProvider gets the figures of lazy layers. Nil means nobody does.
	MeterProvider metric.MeterProvider

	local func() content.Provider                                                    // where blobs are that need not be fetched any more
	hosts func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error) // see readHosts
	watch snapshot.Watch
}

// Worker is BuildKit's OCI worker with lazy base images.
type Worker struct {
	*base.Worker
	root        string
	reporter    *report.Reporter
	snapshotter snapshots.Snapshotter
	planner     *source.Snapshotter   // nil without lazy layers
	conversions *exporter.Conversions // the same
	images      *source.Source
	door        Door
	prunes      prunes
	passwords   *passwords
	unregister  func() error // metrics
}

var _ bkworker.Worker = (*Worker)(nil)

// New opens the worker's state below Config.Root. The caller closes it.
func New(ctx context.Context, opt Options) (_ *Worker, err error) {
	oci := opt.Config.Workers.OCI
	runtime, err := runtimeOf(oci.Binary)
	if err != nil {
		return nil, err
	}
	if err := endLeftSteps(ctx, opt.Config.Root, runtime); err != nil && !errors.Is(err, fs.ErrNotExist) {
		bklog.G(ctx).WithError(err).Warn("a step of an earlier daemon still runs")
	}
	if err := removeLeftBundles(opt.Config.Root); err != nil && !errors.Is(err, fs.ErrNotExist) {
		bklog.G(ctx).WithError(err).Warn("a step of an earlier daemon has left something behind")
	}
	if err := removeLeftMounts(opt.Config.Root, tempDirs()...); err != nil && !errors.Is(err, fs.ErrNotExist) {
		bklog.G(ctx).WithError(err).Warn("an earlier daemon has left mounts behind")
	}
	w := &Worker{root: opt.Config.Root, reporter: &report.Reporter{}}
	hosts := RegistryHosts(opt.Config.Registries)

	// The snapshotter is made before the content store.
	var blobs atomic.Pointer[containerdsnapshot.Store]
	opt.local = func() content.Provider {
		if s := blobs.Load(); s != nil {
			return s
		}
		return nil
	}
	meter := meterOf(opt.MeterProvider)
	if opt.watch, err = watch(meter, w.reporter); err != nil {
		return nil, err
	}
	w.passwords = newPasswords(opt.SessionManager)
	opt.hosts = readHosts(opt, hosts, w.passwords)
	factory, door, err := snapshotterFactory(opt, w.reporter)
	if err != nil {
		return nil, err
	}
	w.door = door
	if door.Lazy {
		bklog.G(ctx).WithField("door", door.Name).Info("base images are mounted lazily")
	} else {
		bklog.G(ctx).WithField("reason", door.Reason).Warn("base images are pulled eagerly")
	}
	open := factory.New
	factory.New = func(root string) (snapshots.Snapshotter, error) {
		s, err := open(root)
		w.snapshotter = s
		return s, err
	}
	defer func() {
		if err != nil && w.snapshotter != nil {
			err = errors.Join(err, w.snapshotter.Close())
		}
	}()

	wopt, err := baseOptions(opt, factory)
	if err != nil {
		return nil, err
	}
	wopt.RegistryHosts = hosts
	blobs.Store(wopt.ContentStore)
	var planner *source.Snapshotter
	restored := func() error { return nil }
	if s, ok := w.snapshotter.(*snapshot.Snapshotter); ok {
		wopt.Snapshotter = &mountingSnapshotter{wopt.Snapshotter, func(mounts []mount.Mount) (func(), error) {
			return s.Use(context.Background(), mounts) // BuildKit mounts without a context; how long a layer may take is bounded by mount-timeout
		}}
	}
	if door.Lazy {
		planner = source.NewSnapshotter(wopt.Snapshotter, source.SnapshotterOptions{
			ContentStore: wopt.ContentStore,
			Applier:      wopt.Applier,
			LeaseManager: wopt.LeaseManager,
			Reporter:     w.reporter,
			Registry:     registryOf(hosts, opt.SessionManager),
			Expect:       w.expectIn,
			LookAhead:    w.lookAhead,
			Hosts:        opt.hosts,
			Tar:          w.tarOf,
			Blob:         blobOptions(opt, w.reporter),
		})
		if restored, err = planner.Restore(ctx, wopt.MetadataStore); err != nil {
			return nil, err
		}
		wopt.ContentStore = containerdsnapshot.NewContentStore(
			planner.ContentStore(wopt.ContentStore.Store), wopt.ContentStore.Namespace())
		wopt.Snapshotter = &linking{Snapshotter: &mountingSnapshotter{planner, layerAt(w.layerAt).told(w.reporter)}}
		wopt.Executor = &executor{Executor: wopt.Executor, reporter: w.reporter, layerAt: w.layerAt, expect: w.expect}
	}
	if w.Worker, err = base.NewWorker(ctx, wopt); err != nil {
		return nil, err
	}
	if err := restored(); err != nil {
		return nil, fmt.Errorf("lazy layers of an earlier daemon: %w", err)
	}
	dropped, err := dropOrphans(ctx, wopt.MetadataStore, wopt.LeaseManager)
	if err != nil {
		return nil, fmt.Errorf("what an earlier daemon had begun: %w", err)
	}
	if door.Lazy {
		if w.unregister, err = registerMetrics(meter, w.lazySummary); err != nil {
			return nil, err
		}
	}
	w.planner = planner
	if planner != nil {
		w.conversions = &exporter.Conversions{Content: wopt.ContentStore, Leases: wopt.LeaseManager, Layers: planner}
	}
	w.CacheMgr = source.BindTables(w.CacheMgr)
	if planner != nil {
		w.CacheMgr = &mutables{w.CacheMgr, planner.Handlers}
	}
	w.ImageSource.CacheAccessor, w.OCILayoutSource.CacheAccessor = w.CacheMgr, w.CacheMgr
	w.ImageSource.ContentStore = manifests{w.ImageSource.ContentStore}
	sopt := source.Options{Snapshotter: planner, ContentStore: wopt.ContentStore, Reporter: w.reporter}
	if !door.Lazy {
		sopt.Eager = door.Reason
	}
	// The last registration of a scheme wins.
	w.images = source.New(w.ImageSource, sopt)
	w.SourceManager.Register(w.images)
	w.SourceManager.Register(source.New(w.OCILayoutSource, sopt))
	if door.Lazy || dropped > 0 {
		// What the cache manager has just forgotten, since nobody knows where it comes from, must go before a build takes
		// it for layers.
		if _, err := wopt.GarbageCollect(ctx); err != nil {
			return nil, fmt.Errorf("remove snapshots of an earlier daemon: %w", err)
		}
	}
	if c, ok := w.snapshotter.(snapshots.Cleaner); ok {
		// Directories that a killed daemon has left. Nothing waits for their end: there may be much in them.
		go func() {
			if err := w.prunes.do(ctx, c.Cleanup); err != nil && !cerrdefs.IsNotImplemented(err) {
				bklog.G(ctx).WithError(err).Warn("directories of an earlier daemon's snapshots are not removed")
			}
		}()
	}
	return w, nil
}

// Reporter keeps account of what builds read.
func (w *Worker) Reporter() *report.Reporter { return w.reporter }

// Door says how readers get into lazy layers, or why there are none.
func (w *Worker) Door() Door { return w.door }

// Exporter implements worker.Worker.
func (w *Worker) Exporter(name string, sm *session.Manager) (bkexporter.Exporter, error) {
	exp, err := w.Worker.Exporter(name, sm)
	if err != nil {
		return nil, err
	}
	e := exporter.New(name, exp)
	e.Content = w.ContentStore()
	e.Lists = &exporter.Lists{Sessions: sm, Dir: w.root}
	e.Registries = &exporter.Registries{Content: w.ContentStore(), Sessions: sm, Hosts: w.RegistryHosts}
	if w.planner != nil {
		e.Blobs, e.Conversions = w.planner, w.conversions
	}
	return e, nil
}

// tarOf returns the tar of a layer out of what has arrived of that.
func (w *Worker) tarOf(ctx context.Context, labels map[string]string, sessions []string, headers zstdchunked.Position) (tar io.ReadCloser, toc []byte, err error) {
	s, ok := w.snapshotter.(*snapshot.Snapshotter)
	if !ok {
		return nil, nil, fs.ErrNotExist
	}
	return s.Tar(ctx, labels, sessions, headers)
}

// FromRemote implements worker.Worker.
func (w *Worker) FromRemote(ctx context.Context, remote *solver.Remote) (cache.ImmutableRef, error) {
	if w.planner == nil {
		return w.Worker.FromRemote(ctx, remote)
	}
	return w.planner.FromRemote(ctx, remote, w.Worker.FromRemote)
}

// pruneEnds is how long a garbage collection may take to notice that the daemon is being stopped.
const pruneEnds = 5 * time.Second

// Close implements worker.Worker: it ends garbage collections, and unmounts all lazy layers.
func (w *Worker) Close() error {
	w.prunes.end(pruneEnds)
	var err error
	if w.unregister != nil {
		err = w.unregister()
	}
	return errors.Join(err, w.Worker.Close(), w.snapshotter.Close(), w.passwords.Close())
}

// runtimeOf returns the OCI runtime that BuildKit's executor will run.
func runtimeOf(binary string) (string, error) {
	if binary != "" {
		if _, err := exec.LookPath(binary); err != nil {
			return "", fmt.Errorf("OCI runtime %s: %w", binary, err)
		}
		return binary, nil
	}
	for _, name := range []string{"buildkit-runc", "runc"} {
		if _, err := exec.LookPath(name); err == nil {
			return name, nil
		}
	}
	return "", ErrNoRuntime
}
