package source

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/plugins/content/local"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/session"
	bksnapshot "github.com/moby/buildkit/snapshot"
	"github.com/moby/sys/user"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// bench is a Snapshotter among fakes that write down what it does with them.
type bench struct {
	t *testing.T
	*Snapshotter
	plan *plan
	rep  *report.Reporter

	mu      sync.Mutex
	log     []string         // of snapshotter and applier
	lines   []string         // of progress
	mountOf map[string]error // by layer name; nil means that it is mounted
	diffIDs map[digest.Digest]digest.Digest
	opened  map[string]int // blobs read, by layer name
	gate    func(name string)
	leases  map[string]bool
}

// layers are made of names: a lazy one starts with "lazy".
func newBench(t *testing.T, names ...string) *bench {
	b := &bench{
		t: t, rep: &report.Reporter{}, mountOf: map[string]error{}, diffIDs: map[digest.Digest]digest.Digest{},
		opened: map[string]int{}, leases: map[string]bool{},
	}
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var descs []ocispecs.Descriptor
	handlers := map[digest.Digest]*cache.DescHandler{}
	for _, name := range names {
		d := eager(name)
		if strings.HasPrefix(name, "lazy") {
			d = lazy(name)
		}
		d.Size = int64(len(name))
		descs = append(descs, d)
		diffID := digest.FromString("unpacked " + name)
		b.diffIDs[d.Digest] = diffID
		handlers[d.Digest] = &cache.DescHandler{
			Ref:         "registry.test/image:v1",
			Annotations: map[string]string{labels.LabelUncompressed: diffID.String()},
			Provider:    func(session.Group) content.Provider { return provider{b, name} },
		}
	}
	b.plan = newPlan("registry.test/image:v1", digest.FromString("manifest"), descs, handlers, "")
	b.plan.registry, b.plan.progress = true, progressLog{b}
	for i := range b.plan.layers {
		l := &b.plan.layers[i]
		l.handler.Provider = l.provider(l.handler.Provider, b.rep)
	}
	b.Snapshotter = NewSnapshotter(&fakeSnapshotter{b: b}, SnapshotterOptions{
		ContentStore: store, Applier: applier{b}, LeaseManager: &leaseManager{b: b}, Reporter: b.rep,
	})
	b.plans.add(b.plan)
	return b
}

func (b *bench) note(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log = append(b.log, fmt.Sprintf(format, args...))
}

// prepare asks for the snapshot of the layer i as BuildKit's cache manager does.
func (b *bench) prepare(ctx context.Context, i int) error {
	l := b.plan.labels(i)
	l[snapshot.LabelTarget] = fmt.Sprint("target", i)
	return b.Prepare(ctx, "key", "parent", snapshots.WithLabels(l))
}

// prepareAll asks for all layers until one is not there, and returns how many are.
func (b *bench) prepareAll() (int, error) {
	for i := range b.plan.layers {
		if err := b.prepare(b.t.Context(), i); !cerrdefs.IsAlreadyExists(err) {
			return i, err
		}
	}
	return len(b.plan.layers), nil
}

func (b *bench) wantLog(want ...string) {
	b.t.Helper()
	if !slices.Equal(b.log, want) {
		b.t.Errorf("done:\n\t%s\nwant:\n\t%s", strings.Join(b.log, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// wantLines compares progress, with layers' names in place of their digests.
func (b *bench) wantLines(names []string, want ...string) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var got []string
	for _, l := range b.lines {
		for _, n := range names {
			l = strings.ReplaceAll(l, digest.FromString(n).String(), n)
		}
		got = append(got, l)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		b.t.Errorf("progress:\n\t%s\nwant:\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

type fakeSnapshotter struct {
	bksnapshot.Snapshotter
	b *bench
}

func (s *fakeSnapshotter) Prepare(_ context.Context, key, parent string, opts ...snapshots.Opt) error {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return err
		}
	}
	target := info.Labels[snapshot.LabelTarget]
	if target == "" {
		s.b.note("prepare %s on %s", strings.SplitN(key, "-", 2)[0], parent)
		return nil
	}
	for name, err := range s.b.mountOf {
		if err != nil && digest.FromString(name).String() == info.Labels[snapshot.LabelDigest] {
			s.b.note("mount %s fails", target)
			return err
		}
	}
	s.b.note("mount %s", target)
	return cerrdefs.ErrAlreadyExists
}

func (s *fakeSnapshotter) Mounts(context.Context, string) (bksnapshot.Mountable, error) {
	return mountable{}, nil
}

func (s *fakeSnapshotter) Commit(_ context.Context, name, _ string, _ ...snapshots.Opt) error {
	s.b.note("commit %s", name)
	return nil
}

type mountable struct{}

func (mountable) Mount() ([]mount.Mount, func() error, error) {
	return []mount.Mount{{Type: "bind"}}, func() error { return nil }, nil
}
func (mountable) IdentityMapping() *user.IdentityMapping { return nil }

type applier struct{ b *bench }

func (a applier) Apply(ctx context.Context, desc ocispecs.Descriptor, _ []mount.Mount, _ ...diff.ApplyOpt) (ocispecs.Descriptor, error) {
	if _, err := a.b.opt.ContentStore.Info(ctx, desc.Digest); err != nil {
		return ocispecs.Descriptor{}, err
	}
	return ocispecs.Descriptor{Digest: a.b.diffIDs[desc.Digest]}, nil
}

type leaseManager struct {
	leases.Manager
	b *bench
}

func (m *leaseManager) Create(_ context.Context, opts ...leases.Opt) (leases.Lease, error) {
	var l leases.Lease
	for _, o := range opts {
		if err := o(&l); err != nil {
			return l, err
		}
	}
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	m.b.leases[l.ID] = true
	return l, nil
}

func (m *leaseManager) Delete(_ context.Context, l leases.Lease, _ ...leases.DeleteOpt) error {
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	delete(m.b.leases, l.ID)
	return nil
}

// provider is the registry: a layer's blob is its name.
type provider struct {
	b    *bench
	name string
}

func (p provider) ReaderAt(context.Context, ocispecs.Descriptor) (content.ReaderAt, error) {
	p.b.mu.Lock()
	p.b.opened[p.name]++
	p.b.mu.Unlock()
	if p.b.gate != nil {
		p.b.gate(p.name)
	}
	return readerAt{bytes.NewReader([]byte(p.name))}, nil
}

type readerAt struct{ *bytes.Reader }

func (readerAt) Close() error { return nil }

type progressLog struct{ b *bench }

func (progressLog) Start(ctx context.Context) (context.Context, func(error)) {
	return ctx, func(error) {}
}

func (p progressLog) Status(id, _ string) func() {
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	p.b.lines = append(p.b.lines, id)
	return func() {}
}

func TestAllLazy(t *testing.T) {
	names := []string{"lazy0", "lazy1"}
	b := newBench(t, names...)
	if n, err := b.prepareAll(); n != 2 || err != nil {
		t.Fatalf("%d layers, %v", n, err)
	}
	b.wantLog("mount target0", "mount target1")
	b.wantLines(names, "mounting layer lazy0 (estargz)", "mounting layer lazy1 (estargz)", "lazy 2 of 2 layers, 0 B of 10 B fetched")
	if len(b.opened) != 0 {
		t.Errorf("blobs read: %v", b.opened)
	}
}

// Without a lazy layer from here on, BuildKit pulls by itself, in parallel.
func TestNothingLazyAbove(t *testing.T) {
	names := []string{"lazy0", "plain1", "plain2"}
	b := newBench(t, names...)
	n, err := b.prepareAll()
	if n != 1 || !errors.Is(err, errPull) {
		t.Fatalf("%d layers, %v", n, err)
	}
	b.wantLog("mount target0")
	b.wantLines(names, "mounting layer lazy0 (estargz)",
		"pulling layer plain1 : no table of contents", "pulling layer plain2 : no table of contents",
		"lazy 1 of 3 layers, 12 B of 17 B fetched")
	if len(b.opened) != 0 {
		t.Errorf("blobs read: %v", b.opened)
	}
}

// A plain layer below a lazy one is unpacked here, and all plain ones come in
// parallel, each of them announced once.
func TestPulledInPlace(t *testing.T) {
	names := []string{"plain0", "plain1", "lazy2", "plain3"}
	b := newBench(t, names...)
	var both sync.WaitGroup
	both.Add(3)
	met := make(chan struct{})
	go func() { both.Wait(); close(met) }()
	b.gate = func(string) {
		both.Done()
		select {
		case <-met:
		case <-time.After(30 * time.Second):
			t.Error("blobs are not fetched in parallel")
		}
	}
	n, err := b.prepareAll()
	if n != 3 || !errors.Is(err, errPull) {
		t.Fatalf("%d layers, %v", n, err)
	}
	b.wantLog("prepare extract on parent", "commit target0", "prepare extract on parent", "commit target1", "mount target2")
	b.wantLines(names,
		"pulling layer plain0 : no table of contents", "pulling layer plain1 : no table of contents", "pulling layer plain3 : no table of contents",
		"extracting plain0", "extracting plain1", "mounting layer lazy2 (estargz)", "lazy 1 of 4 layers, 18 B of 23 B fetched")
	for _, n := range []string{"plain0", "plain1", "plain3"} {
		if b.opened[n] != 1 {
			t.Errorf("%s was read %d times", n, b.opened[n])
		}
		if _, err := b.opt.ContentStore.Info(t.Context(), digest.FromString(n)); err != nil {
			t.Error(err)
		}
	}
	if b.opened["lazy2"] != 0 || len(b.leases) != 0 {
		t.Errorf("lazy2 read %d times, leases left: %v", b.opened["lazy2"], b.leases)
	}
	img := b.rep.Image(b.plan.base())
	if img.Lazy != 1 || img.Layers[0].Fetched != 6 || img.Layers[0].Mode != report.Eager {
		t.Errorf("report %+v", img)
	}
}

func TestMountFails(t *testing.T) {
	failed := func(name string) error {
		return fmt.Errorf("snapshotter: %w", &snapshot.MountError{Layer: digest.FromString(name), Err: errors.New("bad footer")})
	}
	t.Run("below a lazy layer", func(t *testing.T) {
		names := []string{"lazy0", "lazy1"}
		b := newBench(t, names...)
		b.mountOf["lazy0"] = failed("lazy0")
		if n, err := b.prepareAll(); n != 2 {
			t.Fatalf("%d layers, %v", n, err)
		}
		b.wantLog("mount target0 fails", "prepare extract on parent", "commit target0", "mount target1")
		b.wantLines(names, "mounting layer lazy0 (estargz)", "pulling layer lazy0 : its table of contents can't be used: bad footer", "extracting lazy0",
			"mounting layer lazy1 (estargz)", "lazy 1 of 2 layers, 5 B of 10 B fetched")
	})
	t.Run("on top", func(t *testing.T) {
		names := []string{"lazy0", "lazy1"}
		b := newBench(t, names...)
		b.mountOf["lazy1"] = failed("lazy1")
		if n, err := b.prepareAll(); n != 1 || !errors.Is(err, errPull) {
			t.Fatalf("%d layers, %v", n, err)
		}
		b.wantLog("mount target0", "mount target1 fails")
		if len(b.opened) != 0 {
			t.Errorf("blobs read: %v", b.opened)
		}
	})
}

// A layer with another table of contents than its manifest's is used in no way.
func TestMismatchIsRefused(t *testing.T) {
	mismatch := &snapshot.MismatchError{Layer: digest.FromString("lazy0"), Want: toc, Got: digest.FromString("other")}
	for _, names := range [][]string{{"lazy0", "lazy1"}, {"lazy0"}} {
		b := newBench(t, names...)
		b.mountOf["lazy0"] = mismatch
		n, err := b.prepareAll()
		if n != 0 || err == nil || cerrdefs.IsAlreadyExists(err) {
			t.Fatalf("%d layers, %v", n, err)
		}
		// BuildKit, to which every error means the same, pulls by itself.
		l := &b.plan.layers[0]
		if _, err := l.handler.Provider(nil).ReaderAt(t.Context(), l.desc); !errors.Is(err, mismatch) {
			t.Errorf("reading the blob: %v", err)
		}
		if len(b.opened) != 0 || len(b.leases) != 0 {
			t.Errorf("blobs read: %v; leases left: %v", b.opened, b.leases)
		}
		b.wantLog("mount target0 fails")
	}
}

func TestDiffIDMismatch(t *testing.T) {
	b := newBench(t, "plain0", "lazy1")
	b.diffIDs[digest.FromString("plain0")] = digest.FromString("something else")
	n, err := b.prepareAll()
	if n != 0 || err == nil || cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("%d layers, %v", n, err)
	}
	for _, s := range []string{digest.FromString("plain0").String(), "DiffID mismatch", digest.FromString("unpacked plain0").String(), digest.FromString("something else").String()} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
	b.wantLog("prepare extract on parent")
	if len(b.leases) != 0 {
		t.Errorf("leases left: %v", b.leases)
	}
}

// A build that is cancelled says nothing about the layer it was mounting.
func TestCancelledMount(t *testing.T) {
	b := newBench(t, "lazy0", "lazy1")
	stop := errors.New("build cancelled")
	b.mountOf["lazy0"] = &snapshot.MountError{Layer: digest.FromString("lazy0"), Err: stop}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if err := b.prepare(ctx, 0); !errors.Is(err, stop) {
		t.Fatalf("Prepare: %v", err)
	}
	delete(b.mountOf, "lazy0")
	if n, err := b.prepareAll(); n != 2 || err != nil {
		t.Errorf("afterwards: %d layers, %v", n, err)
	}
}

// Whatever has no plan is none of our business.
func TestHandedThrough(t *testing.T) {
	b := newBench(t, "plain0")
	stranger := b.plan.labels(0)
	stranger[snapshot.LabelTarget] = "t"
	stranger[snapshot.LabelDigest] = digest.FromString("stranger").String()
	for name, l := range map[string]map[string]string{
		"no labels":     nil,
		"no target":     b.plan.labels(0),
		"unknown plan":  {snapshot.LabelTarget: "t", labelPlan: "gone", snapshot.LabelRef: "registry.test/image:v1"},
		"unknown layer": stranger,
	} {
		b.log = nil
		if err := b.Prepare(t.Context(), "k-1", "p", snapshots.WithLabels(l)); err != nil && !cerrdefs.IsAlreadyExists(err) {
			t.Errorf("%s: %v", name, err)
		}
		if len(b.log) != 1 || len(b.lines) != 0 {
			t.Errorf("%s: done %q, said %q", name, b.log, b.lines)
		}
	}
}

// The summary is shown once for a plan, also where another build did the work.
func TestAnnouncedOnce(t *testing.T) {
	names := []string{"lazy0", "lazy1"}
	b := newBench(t, names...)
	b.announceKnown(t.Context(), b.plan)
	if len(b.lines) != 0 {
		t.Errorf("said of an unknown image: %q", b.lines)
	}
	for _, n := range names {
		b.rep.Opened(digest.FromString(n), "estargz")
	}
	b.rep.Fetched(digest.FromString("lazy0"), 4, time.Second)
	b.announceKnown(t.Context(), b.plan)
	b.announceKnown(t.Context(), b.plan)
	if n, err := b.prepareAll(); n != 2 {
		t.Fatalf("%d layers, %v", n, err)
	}
	b.wantLines(names, "lazy 2 of 2 layers, 4 B of 10 B fetched", "mounting layer lazy0 (estargz)", "mounting layer lazy1 (estargz)")

	b = newBench(t, names...)
	b.rep.Pulled(digest.FromString("lazy0"), "not for the first time")
	b.rep.Fetched(digest.FromString("lazy0"), 12, time.Second)
	b.rep.Opened(digest.FromString("lazy1"), "estargz")
	b.announceKnown(t.Context(), b.plan)
	b.wantLines(names, "lazy 1 of 2 layers, 5 B of 10 B fetched")

	b = newBench(t)
	b.announceKnown(t.Context(), b.plan)
	if len(b.lines) != 0 {
		t.Errorf("said of an image without layers: %q", b.lines)
	}
}

func TestSizeInWords(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1900000: "1.9 MB", 620e6: "620 MB", 1.7e9: "1.7 GB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
}

type statSnapshotter struct {
	bksnapshot.Snapshotter
	info snapshots.Info
}

func (s statSnapshotter) Stat(context.Context, string) (snapshots.Info, error) { return s.info, nil }

// BuildKit calls a layer lazy while its snapshot is remote, and then wants to know
// how to fetch even what it has converted the layer's blob to.
func TestALayerWhoseBlobIsThereIsNotRemote(t *testing.T) {
	blob := []byte("blob")
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{labelRemote: "remote snapshot", snapshot.LabelDigest: digest.FromBytes(blob).String()}
	s := NewSnapshotter(statSnapshotter{info: snapshots.Info{Labels: labels}}, SnapshotterOptions{ContentStore: store})
	remote := func() bool {
		info, err := s.Stat(t.Context(), "layer")
		if err != nil {
			t.Fatal(err)
		}
		_, ok := info.Labels[labelRemote]
		return ok
	}
	if !remote() {
		t.Error("without its blob, the layer must be remote")
	}
	if err := content.WriteBlob(t.Context(), store, "x", bytes.NewReader(blob), ocispecs.Descriptor{Digest: digest.FromBytes(blob), Size: 4}); err != nil {
		t.Fatal(err)
	}
	if remote() {
		t.Error("with its blob in the content store, the layer must not be remote")
	}
	if _, ok := labels[labelRemote]; !ok {
		t.Error("the snapshotter's own labels were changed")
	}
}
