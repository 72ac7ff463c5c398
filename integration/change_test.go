package integration

import (
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestOneLineChange builds one on top of a lazy base of 64 MiB, in a new daemon, and pushes it to the base's registry: what goes over the network, in both
// directions together, is less than a fiftieth of the base. `bench -push` has the figures of a large image.
func TestOneLineChange(t *testing.T) { eachDoor(t, testOneLineChange) }

func testOneLineChange(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", baseimage.Image{Layers: []baseimage.Layer{bigLayer(t, 64<<20)}}, baseimage.EStargz)
	size := imageSize(t, base)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	reg.Log.Reset()
	build(t, d, client.Solve{
		Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nCOPY <<EOF /etc/motd\nchanged\nEOF\n",
		Outputs:    []string{"type=image,name=" + reg.Ref("app:1") + ",push=true,compression=estargz"},
	})
	var moved int64
	for _, e := range reg.Log.Entries() {
		moved += e.Bytes + e.Received
	}
	if moved > size/50 {
		t.Errorf("%d bytes went over the network, of a base of %d", moved, size)
	}
	wantEStargz(t, pull(t, reg, "app:1"))
}
