package worker

import (
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/buildkit/cache/metadata"
	bolt "go.etcd.io/bbolt"
)

func TestDropOrphans(t *testing.T) {
	records, err := metadata.NewStore(filepath.Join(t.TempDir(), "metadata_v2.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer records.Close()
	db, err := bolt.Open(filepath.Join(t.TempDir(), "containerdmeta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	manager := ctdmetadata.NewLeaseManager(ctdmetadata.NewDB(db, nil, nil))
	ctx := namespaces.WithNamespace(t.Context(), "buildkit")

	if err := records.Update("known", func(b *bolt.Bucket) error { return b.Put([]byte("key"), []byte(`{"value":1}`)) }); err != nil {
		t.Fatal(err)
	}
	flat := map[string]string{labelFlat: "2026-11-22T00:00:00Z"}
	for id, labels := range map[string]map[string]string{
		"known": flat, "known-variants": nil,
		"lost": flat, "lost-variants": nil, "removed-variants": nil,
		"another's": nil,
	} {
		if _, err := manager.Create(ctx, leases.WithID(id), leases.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []int{3, 0} {
		if n, err := dropOrphans(ctx, records, manager); n != want || err != nil {
			t.Errorf("dropped %d, %v; want %d", n, err, want)
		}
	}
	list, err := manager.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, l := range list {
		left = append(left, l.ID)
	}
	slices.Sort(left)
	if want := []string{"another's", "known", "known-variants"}; !slices.Equal(left, want) {
		t.Errorf("left are %q, want %q", left, want)
	}
}
