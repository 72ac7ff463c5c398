package integration

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestNextVersionFetchesWhatIsNew reads all of an image, and then of its next version, whose one layer has a file in ten changed: of what
// is the same no byte comes over the network again.
func TestNextVersionFetchesWhatIsNew(t *testing.T) { eachDoor(t, testNextVersionFetchesWhatIsNew) }

const (
	versionFiles = 80
	versionSize  = 100_000
	// versionNew is how many bytes of a version have changed.
	versionNew = versionFiles / 10 * versionSize
)

// version returns a layer, a file in ten of which is another one in each version, and what sha256sum says of it.
func version(t *testing.T, n int) (baseimage.Layer, string) {
	t.Helper()
	entries := []baseimage.Entry{baseimage.Dir("app"), baseimage.File("app/version", fmt.Sprint(n))}
	var want strings.Builder
	for i := range versionFiles {
		seed := uint64(i)
		if i%10 == 3 {
			seed = uint64(1000*n + i)
		}
		content := noise(seed, versionSize)
		entries = append(entries, baseimage.File(fmt.Sprintf("app/%02d", i), content))
		fmt.Fprintf(&want, "%x  /app/%02d\n", sha256.Sum256([]byte(content)), i)
	}
	return layer(t, "app", entries...), want.String()
}

// wantWhatIsNew fails the test if something else than what has changed was fetched of the last layer, which it returns.
func wantWhatIsNew(t *testing.T, reg *registry.Registry, img v1.Image) digest.Digest {
	t.Helper()
	layers := layerDigests(t, img)
	app := layers[len(layers)-1]
	// Besides what has changed, the end of the blob, with the table of contents.
	const end = 400_000
	if read := reg.Log.BlobBytes()[app]; read < versionNew || read > versionNew+end {
		t.Errorf("%d bytes of %d were fetched of the next version, of which %d have changed", read, versionFiles*versionSize, versionNew)
	}
	return app
}

func testNextVersionFetchesWhatIsNew(t *testing.T) {
	const files, size = versionFiles, versionSize
	first, _ := version(t, 1)
	second, want := version(t, 2)
	for _, format := range []baseimage.Format{baseimage.EStargz, baseimage.ZstdChunked} {
		t.Run(string(format), func(t *testing.T) {
			reg := startRegistry(t, registry.Options{})
			push(t, reg, "base:1", busybox(t, first), format)
			img, _ := push(t, reg, "base:2", busybox(t, second), format)
			addr := freePort(t)
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Args: []string{"--debugaddr", addr}})
			build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN cat /app/* | wc -c\n"})
			reg.Log.Reset()
			res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:2") + "\nRUN sha256sum /app/[0-9]*\n"})
			wantContains(t, "output", res.Output(), want)

			app := wantWhatIsNew(t, reg, img)
			var page struct {
				Totals struct{ Copied int64 }
				Layers []struct {
					Digest string
					Copied int64
				}
			}
			if err := json.Unmarshal([]byte(debugPage(t, addr, "/debug/lazy?format=json")), &page); err != nil {
				t.Fatal(err)
			}
			for _, l := range page.Layers {
				if l.Digest == app.String() && l.Copied < (files-files/10)*size {
					t.Errorf("%d bytes weren't fetched for being there, want at least %d", l.Copied, (files-files/10)*size)
				}
			}
			if got := metrics(t, debugPage(t, addr, "/metrics"))["buildkitd_lazy_copied_bytes_total"]; int64(got) != page.Totals.Copied || got == 0 {
				t.Errorf("copied %g bytes according to the metrics, %d according to /debug/lazy", got, page.Totals.Copied)
			}
		})
	}
}

// TestNextVersionAfterARestart is TestNextVersionFetchesWhatIsNew with a daemon that has been started anew, and whose store has the first version,
// which nobody uses.
func TestNextVersionAfterARestart(t *testing.T) {
	first, _ := version(t, 1)
	second, want := version(t, 2)
	for name, end := range map[string]func(*testing.T, *daemon.Daemon){
		"SIGTERM": stopDaemon,
		"SIGKILL": func(_ *testing.T, d *daemon.Daemon) { d.Kill() }, // all of the first version is in doubt
	} {
		for _, format := range []baseimage.Format{baseimage.EStargz, baseimage.ZstdChunked} {
			t.Run(name+"/"+string(format), func(t *testing.T) {
				eachDoorAtOnce(t, func(t *testing.T, door []string) {
					reg := startRegistry(t, registry.Options{})
					push(t, reg, "base:1", busybox(t, first), format)
					img, _ := push(t, reg, "base:2", busybox(t, second), format)
					opt := daemon.Options{Config: plainHTTP(reg), Env: door, Root: t.TempDir()}
					d := startDaemon(t, opt)
					build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN cat /app/* | wc -c\n"})
					end(t, d)
					reg.Log.Reset()
					d = startDaemon(t, opt)
					res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:2") + "\nRUN sleep 1\nRUN sha256sum /app/[0-9]*\n"})
					wantContains(t, "output", res.Output(), want)
					wantWhatIsNew(t, reg, img)
				})
			})
		}
	}
}

// TestPreviousVersionIsPruned prunes the first version while a step reads the second one, and copies from it: the rest is fetched.
func TestPreviousVersionIsPruned(t *testing.T) {
	first, _ := version(t, 1)
	second, want := version(t, 2)
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := startRegistry(t, registry.Options{})
		push(t, reg, "base:1", busybox(t, first), baseimage.EStargz)
		img, _ := push(t, reg, "base:2", busybox(t, second), baseimage.EStargz)
		opt := daemon.Options{Config: plainHTTP(reg) + "[lazy]\nbackground-fetch = false\n", Env: door, Root: t.TempDir()}
		d := startDaemon(t, opt)
		build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN cat /app/* | wc -c\n"})
		stopDaemon(t, d)
		reg.Log.Reset()
		debug := freePort(t)
		opt.Args = []string{"--debugaddr", debug}
		d = startDaemon(t, opt)
		copied := func() float64 {
			return metrics(t, debugPage(t, debug, "/metrics"))["buildkitd_lazy_copied_bytes_total"]
		}
		var before float64
		prune := reg.OnSignal("prune", func(*http.Request) string {
			before = copied()
			if out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "prune", "--all"); err != nil {
				t.Errorf("prune: %v\n%s", err, out)
			}
			// What is removed is freed by and by.
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				layers, err := filepath.Glob(filepath.Join(d.Root, "runc-*", "snapshots", "store", "layers", "*"))
				if err == nil && len(layers) == 2 {
					return ""
				}
				if time.Now().After(deadline) {
					t.Errorf("the store has %q, %v; want the two layers of the second version", layers, err)
					return ""
				}
			}
		})
		res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:2") +
			"\nRUN sleep 1 && cat /app/00 > /dev/null && wget -q -O /dev/null " + prune + " && sha256sum /app/[0-9]*\n"})
		wantContains(t, "output", res.Output(), want)
		layers := layerDigests(t, img)
		if read := reg.Log.BlobBytes()[layers[len(layers)-1]]; before == 0 || read < versionFiles*versionSize/2 {
			t.Errorf("%g bytes were copied before the first version was pruned, %g in all; %d were fetched", before, copied(), read)
		}
	})
}
