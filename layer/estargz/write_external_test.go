package estargz_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// A layer whose TOC is elsewhere decompresses to its tar, and is to our reader and stargz-snapshotter's what the tar is.
func TestWriteExternalTOC(t *testing.T) {
	check := func(t *testing.T, entries []layertest.Entry, opt estargz.WriteOptions) {
		t.Helper()
		in := layertest.Tar(t, entries...)
		inside, with := written(t, in, opt)
		opt.ExternalTOC = true
		b, w := written(t, in, opt)
		b.toc = w.TOC
		if got := digest.FromBytes(b.data); w.Digest != got || w.Size != int64(len(b.data)) {
			t.Errorf("the blob is %s of %d bytes, not %s of %d", got, len(b.data), w.Digest, w.Size)
		}
		if !bytes.Equal(gunzip(t, b.data), in) {
			t.Error("the blob isn't the tar")
		}
		if w.DiffID != digest.FromBytes(in) || w.TarSize != int64(len(in)) {
			t.Errorf("diff ID %s of %d bytes, want %s of %d", w.DiffID, w.TarSize, digest.FromBytes(in), len(in))
		}
		if w.TOCDigest != with.TOCDigest || !bytes.Equal(w.TOC, with.TOC) || w.End != with.End {
			t.Errorf("TOC %s behind %d bytes, want %s behind %d", w.TOCDigest, w.End, with.TOCDigest, with.End)
		}
		if n := len(b.data) - 46; !bytes.Equal(b.data[:n], inside.data[:n]) {
			t.Error("the frames are others")
		}
		compare(t, b, entries)
	}
	for content, entries := range layers {
		for name, opt := range options {
			t.Run(content+"/"+name, func(t *testing.T) { check(t, entries, opt) })
		}
	}
	names := slices.Sorted(maps.Keys(options))
	for seed := range layertest.Seeds(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 3))
			check(t, layertest.Random(r, r.IntN(100)), options[names[int(seed)%len(names)]])
		})
	}
}
