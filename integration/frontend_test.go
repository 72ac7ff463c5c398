package integration

import (
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestFrontendIsPulled has a frontend whose program takes longer to arrive than BuildKit lets a frontend take to answer, which is 10 s: it runs.
func TestFrontendIsPulled(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, registry.Options{})
	var ran atomic.Bool
	tell := reg.OnSignal("ran", func(*http.Request) string {
		ran.Store(true)
		return ""
	})
	im := busybox(t, bigLayer(t, 2<<20))
	im.Config.Entrypoint = []string{"sh", "-c", "sha256sum /big/1 && wget -q -O /dev/null " + tell}
	img, _ := push(t, reg, "frontend:1", im, baseimage.EStargz)
	reg.Faults.Add(registry.Fault{Kind: registry.Slow, Delay: 12 * time.Second, Match: registry.MatchBlob(layerDigests(t, img)[1])})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := tryBuild(t, d, client.Solve{Dockerfile: "# syntax=" + reg.Ref("frontend:1") + "\n", Plain: true})
	wantContains(t, "build", res.Err, "failed to solve") // it isn't really a frontend
	if !ran.Load() {
		t.Error("the frontend did not come to its end")
	}
	wantContains(t, "output", res.Plain, "a frontend has to answer within 10 s of its start")
}
