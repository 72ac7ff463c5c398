package integration

import (
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestLabTellsStockVariantsApart runs the stock contestants of the benchmark through the lab: if
// these figures cannot tell an eager daemon from a lazy one, no test here can.
func TestLabTellsStockVariantsApart(t *testing.T) {
	l, err := link.New(t.Context(), link.Shape{Delay: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	ln, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	im := busybox(t, bigLayer(t, 8<<20))
	local := startRegistry(t, registry.Options{Dir: dir})
	img, _ := push(t, local, "base:estargz", im, baseimage.EStargz)
	size, err := baseimage.CompressedSize(img)
	if err != nil {
		t.Fatal(err)
	}

	reg := startRegistry(t, registry.Options{Dir: dir, Listener: ln, Front: l.Front})
	fetched := map[daemon.Kind]int64{}
	for _, kind := range []daemon.Kind{daemon.StockOverlay, daemon.StockStargzTuned} {
		l.ResetCounts()
		d := startDaemon(t, daemon.Options{Kind: kind, Link: l, Config: plainHTTP(reg)})
		res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN echo hello from the step\n"})
		wantContains(t, "output", res.Output(), "hello from the step")
		if at, ok := res.Said("hello from the step"); !ok || at <= 0 || at > res.Total {
			t.Errorf("%s: the step spoke at %v of %v", kind, at, res.Total)
		}
		fetched[kind] = l.Counts().Bytes
		if c := l.Counts(); c.Requests < 3 || c.Outstanding < 1 {
			t.Errorf("%s: counts %+v", kind, c)
		}
	}
	if got := fetched[daemon.StockOverlay]; got < size {
		t.Errorf("stock overlayfs fetched %d bytes of an image of %d", got, size)
	}
	if got := fetched[daemon.StockStargzTuned]; got > size/2 {
		t.Errorf("stock stargz, tuned, fetched %d bytes of an image of %d", got, size)
	}
}
