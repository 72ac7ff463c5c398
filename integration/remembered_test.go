package integration

import (
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// conversions counts the layers that a daemon with debug=true has written from others.
func conversions(d *daemon.Daemon) int {
	return strings.Count(d.Logs(), "converting blob to the target compression")
}

// TestConversionsAreRemembered forces the layers of a gzip base to each format, with several sizes of chunks: each conversion is made once in
// the life of the state directory, and none is answered by another one.
func TestConversionsAreRemembered(t *testing.T) {
	for format, wantLayers := range map[string]func(*testing.T, v1.Image){
		"estargz":     func(t *testing.T, img v1.Image) { wantEStargz(t, img) },
		"zstdchunked": wantZstdDiffIDs,
	} {
		t.Run(format, func(t *testing.T) { testConversionsAreRemembered(t, format, wantLayers) })
	}
}

func testConversionsAreRemembered(t *testing.T, format string, wantLayers func(*testing.T, v1.Image)) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:gzip", busybox(t, bigLayer(t, 2<<20)), baseimage.Gzip)
	opt := daemon.Options{Config: "debug = true\n" + plainHTTP(reg), Root: t.TempDir()}
	d := startDaemon(t, opt)
	digests := map[string][]digest.Digest{}
	export := func(attrs string, converted int) {
		t.Helper()
		before := conversions(d)
		build(t, d, client.Solve{
			Dockerfile: "FROM " + reg.Ref("base:gzip") + "\nRUN head -c 200000 /dev/zero > /new\n",
			Outputs:    []string{"type=image,name=" + reg.Ref("app:1") + ",push=true,compression=" + format + ",force-compression=true" + attrs},
		})
		if n := conversions(d) - before; n != converted {
			t.Errorf("%q: %d layers were converted, want %d", attrs, n, converted)
		}
		img := pull(t, reg, "app:1")
		wantLayers(t, img)
		got := layerDigests(t, img)
		for other, had := range digests {
			if (other == attrs) != slices.Equal(had, got) {
				t.Errorf("%q: layers %v, with %q there were %v", attrs, got, other, had)
			}
		}
		digests[attrs] = got
	}
	small, level := ","+format+"-chunk-size=64k", ",compression-level=1"
	export("", 2) // the step's layer is written once
	export("", 0)
	export(small, 3) // the step's too, which has other chunks
	export("", 0)
	export(level, 3)
	export(small, 0)
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	for _, attrs := range []string{level, small, ""} {
		export(attrs, 0)
	}
}

// TestForceCompressionKeepsLazyLayers forces what is eStargz: its layers are neither fetched nor written again, also by a build that finds its steps
// cached, and after a restart.
func TestForceCompressionKeepsLazyLayers(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	opt := daemon.Options{Config: "debug = true\n" + plainHTTP(reg), Root: t.TempDir()}
	d := startDaemon(t, opt)
	export := func() {
		t.Helper()
		reg.Log.Reset()
		build(t, d, client.Solve{
			Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN echo new > /new\n",
			Outputs:    []string{"type=image,name=" + reg.Ref("app:1") + ",push=true,compression=estargz,force-compression=true,estargz-chunk-size=64k"},
		})
		if n := conversions(d); n != 0 {
			t.Errorf("%d layers were converted", n)
		}
		big := layerDigests(t, base)[1]
		if n, size := reg.Log.BlobBytes()[big], sizeOf(t, base, big); n > size/10 {
			t.Errorf("%d bytes of %d were fetched", n, size)
		}
		img := pull(t, reg, "app:1")
		wantEStargz(t, img)
		if got := layerDigests(t, img)[:2]; !slices.Equal(got, layerDigests(t, base)) {
			t.Errorf("layers %v, the base has %v", got, layerDigests(t, base))
		}
	}
	export()
	export()
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	export()
}
