package integration

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestMergedLayersAreLinked runs steps on what COPY --link has put onto a lazy base, a layer by itself that is merged with the others: by hardlinks, as
// stock does it, not by copies that take time and room once more. What a step then writes is in no other step's way.
func TestMergedLayersAreLinked(t *testing.T) {
	eachDoor(t, testMergedLayersAreLinked)
}

func testMergedLayersAreLinked(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 2<<20)), baseimage.EStargz)
	large := noise(9, 4<<20)
	context := filepath.Dir(writeFile(t, t.TempDir(), "large", large))
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	dockerfile := "FROM " + reg.Ref("base:1") + " AS other\nRUN cp /big/1 /made\nFROM " + reg.Ref("base:1") + `
COPY --link large /large
COPY --link --from=other /made /big/0 /both/
RUN for f in /large /both/made /both/0; do echo "links $(stat -c %h $f)"; sha256sum $f; done
`
	sums := []string{digest.FromString(large).Encoded(), digest.FromString(noise(1, 1<<20)).Encoded(), digest.FromString(noise(0, 1<<20)).Encoded()}
	for _, last := range []string{"", "RUN echo more >> /large && echo more >> /both/made\n", "RUN sha256sum /large /both/*\n"} {
		out := build(t, d, client.Solve{Context: context, Dockerfile: dockerfile + last, NoCache: last == ""}).Output()
		if last == "" {
			links := 0
			for l := range strings.Lines(out) {
				if n, ok := strings.CutPrefix(strings.TrimSpace(l), "links "); ok {
					links++
					if n, err := strconv.Atoi(n); err != nil || n < 2 {
						t.Errorf("a file of a merged layer has %d links, want 2 or more", n)
					}
				}
			}
			if links != 3 {
				t.Errorf("links of %d files are known, want 3", links)
			}
		}
		if !strings.Contains(last, "more") {
			wantContains(t, "output", out, sums...)
		}
	}
}
