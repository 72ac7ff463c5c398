package worker

import (
	"bytes"
	"context"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/client"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/worker/base"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
	"github.com/buildkitd-lazy/buildkitd-lazy/source"
)

// usage is a worker's cache manager, BuildKit's own, whose lazy layers take what a test says.
type usage struct {
	*Worker
	t    *testing.T
	held heldLayers
	cache.Manager
	blobs *asked
}

type heldLayers struct {
	snapshots.Snapshotter
	sizes map[digest.Digest]int64
}

func (h heldLayers) Layers() map[digest.Digest]int64 { return maps.Clone(h.sizes) }

// asked is a content store that tells that it's asked for a blob.
type asked struct {
	content.Store
	info func()
}

func (a *asked) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	if a.info != nil {
		a.info()
	}
	return a.Store.Info(ctx, dgst)
}

func newUsage(t *testing.T) *usage {
	t.Helper()
	const namespace = "buildkit"
	root := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	unpacked, err := native.NewSnapshotter(filepath.Join(root, "snapshots"))
	check(err)
	blobs, err := local.NewStore(filepath.Join(root, "content"))
	check(err)
	db, err := bolt.Open(filepath.Join(root, "containerdmeta.db"), 0o600, nil)
	check(err)
	t.Cleanup(func() { db.Close() })
	mdb := ctdmetadata.NewDB(db, blobs, map[string]snapshots.Snapshotter{snapshot.Name: unpacked})
	check(mdb.Init(t.Context()))
	records, err := metadata.NewStore(filepath.Join(root, "metadata_v2.db"))
	check(err)

	u := &usage{t: t, held: heldLayers{sizes: map[digest.Digest]int64{}}, blobs: &asked{Store: mdb.ContentStore()}}
	leases := leaseutil.WithNamespace(ctdmetadata.NewLeaseManager(mdb), namespace)
	planner := source.NewSnapshotter(containerdsnapshot.NewSnapshotter(snapshot.Name, mdb.Snapshotter(snapshot.Name), namespace, nil), source.SnapshotterOptions{
		ContentStore: containerdsnapshot.NewContentStore(u.blobs, namespace), LeaseManager: leases, Reporter: &report.Reporter{},
	})
	store := containerdsnapshot.NewContentStore(planner.ContentStore(u.blobs), namespace)
	u.Manager, err = cache.NewManager(cache.ManagerOpt{
		Snapshotter: planner, ContentStore: store, LeaseManager: leases, MetadataStore: records,
		Root: root, MountPoolRoot: filepath.Join(root, "cachemounts"),
	})
	check(err)
	t.Cleanup(func() { u.Manager.Close() })
	u.Worker = &Worker{Worker: &base.Worker{CacheMgr: u.Manager, WorkerOpt: base.WorkerOpt{ContentStore: store}}, snapshotter: u.held, planner: planner}
	return u
}

// record has the cache manager make a record of a blob, of a layer of that DiffID, and returns its snapshot's name.
func (u *usage) record(blob digest.Digest, diffID string) (snapshot string) {
	u.t.Helper()
	ref, err := u.GetByBlob(u.t.Context(), ocispecs.Descriptor{
		Digest: blob, MediaType: ocispecs.MediaTypeImageLayerGzip, Annotations: map[string]string{labels.LabelUncompressed: digest.FromString(diffID).String()},
	}, nil, cache.DescHandlers{blob: &cache.DescHandler{}})
	if err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(func() {
		if err := ref.Release(context.WithoutCancel(u.t.Context())); err != nil {
			u.t.Error(err)
		}
	})
	return ref.GetString(recordSnapshot)
}

// used returns the sum of what du shows.
func (u *usage) used() (n int64) {
	u.t.Helper()
	records, err := u.Worker.DiskUsage(u.t.Context(), client.DiskUsageInfo{})
	if err != nil {
		u.t.Error(err)
	}
	for _, r := range records {
		n += r.Size
	}
	return n
}

// wantUsed waits for that sum: right after a record's size was found, BuildKit hands on what it was to who asks again.
func (u *usage) wantUsed(when string, want int64) {
	u.t.Helper()
	n := u.used()
	for end := time.Now().Add(time.Second); n != want && time.Now().Before(end); n = u.used() {
		time.Sleep(time.Millisecond)
	}
	if n != want {
		u.t.Errorf("%s, du shows %d bytes, want %d", when, n, want)
	}
}

// What the store has dropped of a layer isn't counted any more, neither by this daemon nor by the next one.
func TestUsageOfDroppedLayers(t *testing.T) {
	u := newUsage(t)
	one, other := digest.FromString("one"), digest.FromString("other")
	u.record(one, "one")
	u.record(other, "other")
	u.wantUsed("before anything is read", 0)
	u.held.sizes[one], u.held.sizes[other] = 1<<30, 1<<20
	u.wantUsed("with both layers", 1<<30+1<<20)
	delete(u.held.sizes, one)
	u.wantUsed("when one was dropped", 1<<20)
	delete(u.held.sizes, other)
	next := *u
	next.Worker = &Worker{Worker: u.Worker.Worker, snapshotter: u.held, planner: u.planner}
	next.wantUsed("when the other was dropped, after a restart", 0)
	u.held.sizes[one] = 1 << 10
	next.wantUsed("when one is used again", 1<<10)
}

// slowly is a cache manager whose du is told of when it begins.
type slowly struct {
	cache.Manager
	begins func()
}

func (s *slowly) DiskUsage(ctx context.Context, opt client.DiskUsageInfo) ([]*client.UsageInfo, error) {
	s.begins()
	return s.Manager.DiskUsage(ctx, opt)
}

// A du that takes long doesn't leave behind what a layer had when it began.
func TestUsageWhileLayersGrow(t *testing.T) {
	u := newUsage(t)
	blob := digest.FromString("blob")
	u.record(blob, "blob")
	u.held.sizes[blob] = 100

	// The first du stops when the record's size is being found, which is the second time that the blob is asked for.
	stopped, goOn, begun := make(chan struct{}), make(chan struct{}), make(chan struct{})
	times := 0
	u.CacheMgr = &slowly{u.Manager, func() {
		u.blobs.info = func() {
			if times++; times == 2 {
				close(stopped)
				<-goOn
			}
		}
	}}
	first, second := make(chan int64), make(chan int64)
	go func() { first <- u.used() }()
	<-stopped
	u.blobs.info = nil
	u.held.sizes[blob] = 200
	u.CacheMgr = &slowly{u.Manager, func() { close(begun) }}
	go func() { second <- u.used() }()
	<-begun
	close(goOn)
	if n := <-first; n != 100 {
		t.Errorf("the first du shows %d bytes", n)
	}
	<-second // what it shows is the first one's, if it has waited for that
	u.CacheMgr = u.Manager
	u.wantUsed("after both", 200)
}

// The files of a layer that was unpacked below a lazy one count, with its blob, and once, also if a record of another blob has the same ones.
func TestUsageOfUnpackedLayers(t *testing.T) {
	u := newUsage(t)
	ctx := t.Context()
	data := []byte("compressed")
	blob := digest.FromBytes(data)
	if err := content.WriteBlob(ctx, u.ContentStore(), "blob", bytes.NewReader(data), ocispecs.Descriptor{Digest: blob, Size: int64(len(data))}); err != nil {
		t.Fatal(err)
	}
	name := u.record(blob, "files")
	u.wantUsed("before the layer is unpacked", int64(len(data)))

	if err := u.planner.Prepare(ctx, "extract", ""); err != nil {
		t.Fatal(err)
	}
	mountable, err := u.planner.Mounts(ctx, "extract")
	if err != nil {
		t.Fatal(err)
	}
	mounts, release, err := mountable.Mount()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(mounts[0].Source, "file"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	if err := u.planner.Commit(ctx, name, "extract"); err != nil {
		t.Fatal(err)
	}
	files, err := u.planner.Usage(ctx, name)
	if err != nil || files.Size < 1<<20 {
		t.Fatalf("a file of 1 MiB takes %d bytes, %v", files.Size, err)
	}
	u.wantUsed("with its files", int64(len(data))+files.Size)
	if same := u.record(digest.FromString("compressed otherwise"), "files"); same != name {
		t.Fatalf("the snapshots %s and %s of the same layer", name, same)
	}
	u.wantUsed("with another record of the same files", int64(len(data))+files.Size)
}
