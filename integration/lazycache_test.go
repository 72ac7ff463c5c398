package integration

import (
	"strings"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestLazyCache imports caches with lazy layers into another daemon: of a registry's, a step reads what it needs; one on the client's
// disk is pulled, and the build says why.
func TestLazyCache(t *testing.T) { eachDoor(t, testLazyCache) }

func testLazyCache(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t), baseimage.EStargz)
	dockerfile := "FROM " + reg.Ref("base:estargz") + "\nRUN echo made && echo small > /small && head -c 8000000 /dev/urandom > /large\n"
	more := dockerfile + "RUN echo read && cat /small && ls -l /large\n"
	local, localChunked := t.TempDir(), t.TempDir()
	for _, c := range []struct {
		name, to, from string
		lazy           bool
	}{
		{"registry", "type=registry,mode=max,compression=estargz,ref=" + reg.Ref("cache:manifest"), "type=registry,ref=" + reg.Ref("cache:manifest"), true},
		{"registry index", "type=registry,mode=max,compression=estargz,image-manifest=false,ref=" + reg.Ref("cache:index"), "type=registry,ref=" + reg.Ref("cache:index"), true},
		{"registry zstd:chunked", "type=registry,mode=max,compression=zstdchunked,ref=" + reg.Ref("cache:zstd"), "type=registry,ref=" + reg.Ref("cache:zstd"), true},
		{"registry gzip", "type=registry,mode=max,compression=gzip,ref=" + reg.Ref("cache:gzip"), "type=registry,ref=" + reg.Ref("cache:gzip"), false},
		{"registry index zstd:chunked", "type=registry,mode=max,compression=zstdchunked,image-manifest=false,ref=" + reg.Ref("cache:chunkedindex"), "type=registry,ref=" + reg.Ref("cache:chunkedindex"), true},
		{"local", "type=local,mode=max,compression=estargz,dest=" + local, "type=local,src=" + local, false},
		{"local zstd:chunked", "type=local,mode=max,compression=zstdchunked,dest=" + localChunked, "type=local,src=" + localChunked, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			build(t, startDaemon(t, daemon.Options{Config: plainHTTP(reg)}), client.Solve{Dockerfile: dockerfile, CacheTo: []string{c.to}})

			opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
			d := startDaemon(t, opt)
			reg.Log.Reset()
			res := build(t, d, client.Solve{Dockerfile: more, CacheFrom: []string{c.from}})
			if strings.Contains(res.Output(), "made") {
				t.Error("the step is not cached")
			}
			wantContains(t, "output", res.Output(), "small", "8000000")
			var sent int64
			for _, n := range reg.Log.BlobBytes() {
				sent += n
			}
			switch {
			case c.lazy:
				if sent > 4e6 {
					t.Errorf("%d bytes were fetched", sent)
				}
				wantContains(t, "progress", statuses(res), "mounting layer")
				// BuildKit runs a step again that ran on an imported result, in the first build without the cache.
				build(t, d, client.Solve{Dockerfile: more})
				stopDaemon(t, d)
				d = startDaemon(t, opt)
				res = build(t, d, client.Solve{Dockerfile: more + "RUN wc -c /large\n"})
				if got := res.Output(); strings.TrimSpace(got) != "8000000 /large" {
					t.Errorf("after a restart, the steps say %q", got)
				}
			case strings.HasPrefix(c.name, "local"):
				wantContains(t, "progress", statuses(res), "its cache isn't in a registry")
			default:
				if sent < 8e6 {
					t.Errorf("%d bytes were fetched of a layer that can't be lazy", sent)
				}
			}
		})
	}
}
