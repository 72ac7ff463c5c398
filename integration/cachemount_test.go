package integration

import (
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestCacheMountFromLazyImage has a cache mount that begins with the files of a lazy image: what a step has left in it, a step of the next build finds, and
// one after a restart of the daemon, beside those files, which are as lazy as ever.
func TestCacheMountFromLazyImage(t *testing.T) {
	eachDoor(t, testCacheMountFromLazyImage)
}

func testCacheMountFromLazyImage(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t), baseimage.EStargz)
	push(t, reg, "filled:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	opt := daemon.Options{Root: t.TempDir(), Config: plainHTTP(reg)}
	step := func(d *daemon.Daemon, command string) string {
		t.Helper()
		return build(t, d, client.Solve{
			Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN --mount=type=cache,target=/cache,id=one,from=" + reg.Ref("filled:1") + ",source=/big " + command + "\n",
		}).Output()
	}
	d := startDaemon(t, opt)
	step(d, "echo what was left > /cache/left && rm /cache/0")
	const look = "cat /cache/left && sha256sum /cache/1 && test ! -e /cache/0 && echo"
	wantContains(t, "the next build's cache", step(d, look+" next"), "what was left", digest.FromString(noise(1, 1<<20)).Encoded())
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	wantContains(t, "the cache after a restart", step(d, look+" restarted"), "what was left", digest.FromString(noise(1, 1<<20)).Encoded())
}
