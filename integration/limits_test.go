package integration

import (
	"strings"
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestFewDescriptors has more reads wait at a time than the daemon may have descriptors, of which the kernel door takes one for each: all of
// them succeed.
func TestFewDescriptors(t *testing.T) { eachDoor(t, testFewDescriptors) }

func testFewDescriptors(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	reg.Faults.Add(registry.Fault{Kind: registry.Slow, Delay: 300 * time.Millisecond})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Wrap: []string{"sh", "-c", `ulimit -n 128; exec "$@"`, "sh"}})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + `
RUN cd /big; for f in *; do for k in $(seq 0 15); do (dd if=$f bs=64k skip=$k count=1 of=/dev/null 2> /dev/null || echo refused) & done; done; wait; echo read
`})
	out := res.Output()
	wantContains(t, "output", out, "read\n")
	if n := strings.Count(out, "refused"); n > 0 {
		t.Errorf("%d of 256 reads were refused", n)
	}
}
