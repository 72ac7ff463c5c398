package integration

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestNextVersionFetchesWhatIsNew reads all of an image, and then of its next version, whose one layer has a file in ten changed: of what
// is the same no byte comes over the network again.
func TestNextVersionFetchesWhatIsNew(t *testing.T) { eachDoor(t, testNextVersionFetchesWhatIsNew) }

func testNextVersionFetchesWhatIsNew(t *testing.T) {
	const files, size = 80, 100_000
	// version returns a layer, and what sha256sum says of it.
	version := func(n int) (baseimage.Layer, string) {
		entries := []baseimage.Entry{baseimage.Dir("app"), baseimage.File("app/version", fmt.Sprint(n))}
		var want strings.Builder
		for i := range files {
			seed := uint64(i)
			if i%10 == 3 {
				seed = uint64(1000*n + i)
			}
			content := noise(seed, size)
			entries = append(entries, baseimage.File(fmt.Sprintf("app/%02d", i), content))
			fmt.Fprintf(&want, "%x  /app/%02d\n", sha256.Sum256([]byte(content)), i)
		}
		return layer(t, "app", entries...), want.String()
	}
	first, _ := version(1)
	second, want := version(2)
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

			layers := layerDigests(t, img)
			app := layers[len(layers)-1]
			// Besides what has changed, the end of the blob, with the table of contents.
			const changed, end = files / 10 * size, 400_000
			if read := reg.Log.BlobBytes()[app]; read < changed || read > changed+end {
				t.Errorf("%d bytes of %d were fetched of the next version, of which %d have changed", read, files*size, changed)
			}
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
