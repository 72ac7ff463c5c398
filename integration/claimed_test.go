package integration

import (
	"fmt"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestClaimedDiffID has an image whose layer claims the DiffID of another image's. A lazy layer is never compared with its DiffID, so nobody
// finds out; and nobody who uses the other image may get anything of it, whichever of the two was there first, nor after a restart.
func TestClaimedDiffID(t *testing.T) { eachDoor(t, testClaimedDiffID) }

func testClaimedDiffID(t *testing.T) {
	honest := busybox(t, layer(t, "honest", baseimage.File("f", "honest\n"), baseimage.File("only-honest", "")))
	liar := busybox(t, layer(t, "liar", baseimage.File("f", "a lie\n"), baseimage.File("only-liar", "")))
	for name, c := range map[string]struct {
		liar, honest baseimage.Format
	}{
		"eStargz":                      {baseimage.EStargz, baseimage.EStargz},
		"Podman's zstd:chunked":        {baseimage.ZstdChunked, baseimage.ZstdChunked},
		"stargz-snapshotter's":         {baseimage.StargzChunked, baseimage.StargzChunked},
		"eStargz of a gzip layer":      {baseimage.EStargz, baseimage.Gzip},
		"zstd:chunked of eStargz":      {baseimage.ZstdChunked, baseimage.EStargz},
		"zstd:chunked of a gzip layer": {baseimage.ZstdChunked, baseimage.Gzip},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := startRegistry(t, registry.Options{})
			img, _ := push(t, reg, "honest:1", honest, c.honest)
			pushClaim(t, reg, "liar:1", liar, c.liar, img)
			config := plainHTTP(reg)
			for _, order := range [][]string{{"liar:1", "honest:1"}, {"honest:1", "liar:1"}} {
				opt := daemon.Options{Config: config, Root: t.TempDir()}
				d := startDaemon(t, opt)
				says := func(tag, want string, n int) {
					t.Helper()
					res := build(t, d, client.Solve{Dockerfile: fmt.Sprintf("FROM %s\nRUN echo %d && cat /f && ls -d /only-*\n", reg.Ref(tag), n)})
					wantContains(t, "output", res.Output(), want)
				}
				both := func(n int) {
					t.Helper()
					for _, tag := range order {
						says(tag, map[string]string{"honest:1": "honest\n/only-honest\n", "liar:1": "a lie\n/only-liar\n"}[tag], n)
					}
				}
				both(1)
				both(2)
				stopDaemon(t, d)
				d = startDaemon(t, opt)
				both(3)
				stopDaemon(t, d)
			}
		})
	}
}

// pushClaim pushes an image whose configuration has the DiffIDs of another one.
func pushClaim(t *testing.T, reg *registry.Registry, tag string, im baseimage.Image, format baseimage.Format, of v1.Image) {
	t.Helper()
	img, err := im.Build(t.Context(), format)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	other, err := of.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	if n := len(cf.RootFS.DiffIDs); n != len(other.RootFS.DiffIDs) || cf.RootFS.DiffIDs[n-1] == other.RootFS.DiffIDs[n-1] {
		t.Fatalf("DiffIDs %v and %v", cf.RootFS.DiffIDs, other.RootFS.DiffIDs)
	}
	cf.RootFS = *other.RootFS.DeepCopy()
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	if _, err := baseimage.Push(t.Context(), reg, tag, img); err != nil {
		t.Fatal(err)
	}
}
