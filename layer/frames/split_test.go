package frames_test

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// counting is a format that counts what its TOC would have.
type counting struct{ records int }

// Pack implements frames.Format.
func (*counting) Pack(*frames.Frame) ([]byte, error) { return nil, nil }

// Put implements frames.Format.
func (c *counting) Put(f *frames.Frame, _ int64, _ int) error {
	if !f.Untold {
		c.records += len(f.Records)
	}
	return nil
}

// TestLimits has the first entry untold of which the TOC would be larger than readers take it.
func TestLimits(t *testing.T) {
	dirs := layertest.Tar(t, layertest.Dir("d"))[:512]
	for name, c := range map[string]struct {
		in   io.Reader
		told int
	}{
		"entries": {io.MultiReader(repeat(dirs, layer.MaxEntries), bytes.NewReader(layertest.Tar(t, layertest.Dir("last")))), layer.MaxEntries},
		"chunks":  {bytes.NewReader(layertest.Tar(t, layertest.File("a", "1000"), layertest.File("last", strings.Repeat("x", layer.MaxChunks-3)), layertest.Dir("d"))), 4},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "entries" && testing.Short() {
				t.Skip("half a million headers take half a minute under the race detector")
			}
			f := &counting{}
			out, err := frames.Write(t.Context(), io.Discard, c.in, f, frames.Options{ChunkSize: 1, MinChunkSize: 64 << 10, Pool: frames.NewPool(0)})
			if err != nil {
				t.Fatal(err)
			}
			// The frame at hand is lost to the TOC as well.
			if out.Untold != "last" || f.records > c.told {
				t.Errorf("untold is %q, and %d records are told; want last, %d", out.Untold, f.records, c.told)
			}
		})
	}
}

// repeat reads the same n times.
func repeat(p []byte, n int) io.Reader {
	return io.LimitReader(&repeated{p: p}, int64(n*len(p)))
}

type repeated struct {
	p  []byte
	at int
}

// Read implements io.Reader.
func (r *repeated) Read(p []byte) (int, error) {
	n := copy(p, r.p[r.at:])
	r.at = (r.at + n) % len(r.p)
	return n, nil
}
