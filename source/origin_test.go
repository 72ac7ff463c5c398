package source

import (
	"context"
	"errors"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/session"
	bksnapshot "github.com/moby/buildkit/snapshot"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// record is a ref of BuildKit's cache manager as far as origins are concerned.
type record struct {
	cache.ImmutableRef
	item  *metadata.StorageItem
	chain []cache.ImmutableRef
}

func (r *record) GetExternal(key string) ([]byte, error)  { return r.item.GetExternal(key) }
func (r *record) SetExternal(key string, dt []byte) error { return r.item.SetExternal(key, dt) }
func (r *record) LayerChain() cache.RefList               { return append(cache.RefList(nil), r.chain...) }
func (r *record) Release(context.Context) error           { return nil }

// records makes a store with a record for each layer of a plan, and returns the uppermost.
func records(t *testing.T, p *plan) (*metadata.Store, *record) {
	t.Helper()
	md, err := metadata.NewStore(filepath.Join(t.TempDir(), "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { md.Close() })
	var chain []cache.ImmutableRef
	for i := range p.layers {
		item, _ := md.Get(p.layers[i].desc.Digest.Encoded())
		if err := item.Update(func(b *bolt.Bucket) error {
			for k, v := range map[string]string{"cache.blob": p.layers[i].desc.Digest.String(), "cache.snapshot": "snapshot of " + p.layers[i].desc.Digest.String()} {
				value, err := metadata.NewValue(v)
				if err != nil {
					return err
				}
				if err := item.SetValue(b, k, value); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		chain = append(chain, &record{item: item})
	}
	return md, &record{chain: chain}
}

// remoteSnapshots has a remote snapshot for every layer.
type remoteSnapshots struct{ bksnapshot.Snapshotter }

func (remoteSnapshots) Stat(_ context.Context, key string) (snapshots.Info, error) {
	blob := key[len("snapshot of "):]
	return snapshots.Info{Name: key, Labels: map[string]string{labelRemote: "remote snapshot", snapshot.LabelDigest: blob}}, nil
}

// What a daemon resolved is known to the next: how to fetch it, and, until its cache manager has opened, as local.
func TestOriginsOutliveTheDaemon(t *testing.T) {
	b := newBench(t, "lazy0", "lazy1")
	for i := range b.plan.layers {
		b.plan.layers[i].handler.SnapshotLabels = b.plan.labels(i)
	}
	md, top := records(t, b.plan)
	if err := b.rememberImage(t.Context(), b.plan, top); err != nil {
		t.Fatal(err)
	}

	next := newBench(t, "another") // another daemon, with nothing resolved of that image
	next.opt.Registry = func(ref string) func(session.Group) content.Provider {
		if ref != "registry.test/image:v1" {
			t.Errorf("asked for the registry of %s", ref)
		}
		return func(session.Group) content.Provider { return provider{next, "lazy0"} }
	}
	next.Snapshotter.Snapshotter = remoteSnapshots{}
	blobs := next.ContentStore(next.opt.ContentStore)
	lazy0, lazy1 := b.plan.layers[0].desc, b.plan.layers[1].desc
	stranger := digest.FromString("stranger")
	known := func(dgst digest.Digest) (info, remote bool) {
		t.Helper()
		_, err := blobs.Info(t.Context(), dgst)
		if err != nil && !cerrdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		st, serr := next.Stat(t.Context(), "snapshot of "+dgst.String())
		if serr != nil {
			t.Fatal(serr)
		}
		_, remote = st.Labels[labelRemote]
		return err == nil, remote
	}
	if _, ok := next.Handlers([]digest.Digest{lazy0.Digest}); ok {
		t.Error("a handler of what nobody has told")
	}
	done, err := next.Restore(t.Context(), md)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{lazy0.Digest, lazy1.Digest} {
		if info, remote := known(d); !info || remote {
			t.Errorf("while the cache manager opens: blob there %t, snapshot remote %t", info, remote)
		}
	}
	if info, remote := known(stranger); info || !remote {
		t.Errorf("a stranger: blob there %t, snapshot remote %t", info, remote)
	}
	if err := done(); err != nil {
		t.Fatal(err)
	}
	if info, remote := known(lazy0.Digest); info || !remote {
		t.Errorf("afterwards: blob there %t, snapshot remote %t", info, remote)
	}
	hs, ok := next.Handlers([]digest.Digest{lazy0.Digest, lazy1.Digest})
	if !ok {
		t.Fatal("no handlers")
	}
	h, was := hs[lazy0.Digest], b.plan.layers[0].handler
	labels := maps.Clone(was.SnapshotLabels)
	delete(labels, labelPlan)
	if h.Ref != was.Ref || !maps.Equal(h.Annotations, was.Annotations) || !maps.Equal(h.SnapshotLabels, labels) {
		t.Errorf("handler %+v, was %+v", h, was)
	}
	if ra, err := h.Provider(nil).ReaderAt(t.Context(), lazy0); err != nil || ra.Size() != lazy0.Size {
		t.Errorf("read through the handler: %v", err)
	}
	if _, ok := next.Handlers([]digest.Digest{lazy0.Digest, stranger}); ok {
		t.Error("a handler of a stranger")
	}
	img := next.rep.Image(report.Base{Layers: b.plan.descriptors()})
	if img.Lazy != 2 {
		t.Errorf("the reporter knows %d lazy layers of 2", img.Lazy)
	}
}

// A record whose origin can't be read is as one without.
func TestUnreadableOrigin(t *testing.T) {
	b := newBench(t, "lazy0")
	md, top := records(t, b.plan)
	if err := top.chain[0].SetExternal(originKey, []byte("{")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Restore(t.Context(), md); err != nil {
		t.Fatal(err)
	}
	if _, ok := b.origins.get(b.plan.layers[0].desc.Digest); ok {
		t.Error("an origin made of nothing")
	}
}

// While sizes are counted, a lazy layer is local, and its blob takes what the layer takes, besides its own size.
func TestSizesAreCounted(t *testing.T) {
	b := newBench(t, "lazy0", "here")
	b.Snapshotter.Snapshotter = remoteSnapshots{}
	lazy, here := b.plan.layers[0].desc, b.plan.layers[1].desc
	if err := content.WriteBlob(t.Context(), b.opt.ContentStore, "ref", strings.NewReader("here"), here); err != nil {
		t.Fatal(err)
	}
	blobs := b.ContentStore(b.opt.ContentStore)
	ctx := WithSizes(t.Context(), map[digest.Digest]int64{lazy.Digest: 1000, here.Digest: 200})
	for dgst, want := range map[digest.Digest]int64{lazy.Digest: 1000, here.Digest: 200 + here.Size} {
		if info, err := blobs.Info(ctx, dgst); err != nil || info.Size != want || info.Digest != dgst {
			t.Errorf("info %+v, %v; want a size of %d", info, err, want)
		}
	}
	for dgst, want := range map[digest.Digest]error{lazy.Digest: cerrdefs.ErrNotFound, here.Digest: nil} {
		if _, err := blobs.Info(t.Context(), dgst); !errors.Is(err, want) {
			t.Errorf("outside: %v, want %v", err, want)
		}
	}
	if info, err := b.Stat(ctx, "snapshot of "+lazy.Digest.String()); err != nil || info.Labels[labelRemote] != "" {
		t.Errorf("labels %v, %v", info.Labels, err)
	}
	if info, err := b.Stat(t.Context(), "snapshot of "+lazy.Digest.String()); err != nil || info.Labels[labelRemote] == "" {
		t.Errorf("outside: labels %v, %v", info.Labels, err)
	}
}
