package snapshot

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// What is expected of a layer that is open is fetched though nobody reads.
func TestExpect(t *testing.T) { eachDoor(t, testExpect) }

func testExpect(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"first": random(1 << 20), "second": random(1 << 20)})
	c := &counting{blobs: map[string][]byte{l.digest.String(): l.blob}}
	reg := newRegistry(t, c.ServeHTTP, l)
	s, root := newSnapshotter(t, reg.options(door))
	s.ExpectIn(l.digest, []fill.Expected{{Paths: []string{"first"}}}) // isn't there yet
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	filled := func() int64 { return s.Stats().Layers[0].Filled }
	for i, expect := range []func(){
		func() { s.ExpectIn(l.digest, []fill.Expected{{Paths: []string{"none", "first"}}}) },
		func() { s.Expect(filepath.Dir(mountsBelow(t, root)[0]), nil) }, // a mount that isn't a snapshot's
		func() { s.Expect("1/fs", []fill.Expected{{Paths: []string{"second"}}}) },
	} {
		expect()
		want := []int64{1 << 20, 1 << 20, 2 << 20}[i]
		for end := time.Now().Add(30 * time.Second); filled() < want && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
		if n := filled(); n != want {
			t.Errorf("%d: %d bytes are there, want %d", i, n, want)
		}
	}
	s.ExpectIn(digest.FromString("another"), []fill.Expected{{Paths: []string{"first"}}})
}
