package sha256s_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/sha256s"
)

// FuzzWrite compares the digests of what several have in common, and of what is before and behind it, with those of one after the other, in each
// way that this CPU has.
func FuzzWrite(f *testing.F) {
	data := layertest.Noise(1, 64<<10)
	for _, n := range []int{0, 1, 63, 64, 1023, 1024, 1025, 4096, 5000, 64 << 10} {
		for _, before := range []uint16{0, 1, 64, 512, 700} {
			f.Add(data[:n], before, uint16(0), uint16(64), uint16(1023)) // in one go
			f.Add(data[:n], uint16(0), uint16(0), before, uint16(16))    // 1025 bytes: from the second time on not at a block
			f.Add(data[:n], before, before, before, uint16(18))          // 1152 bytes: 18 blocks
		}
	}
	f.Fuzz(func(t *testing.T, p []byte, before1, before2, before3, step uint16) {
		if step == 0 {
			step = 1
		}
		for way := range sha256s.Ways() {
			restore := sha256s.Use(way)
			for count := 1; count <= 4; count++ {
				var digests, want []hash.Hash
				for _, before := range []uint16{before1, before2, before3, 64}[:count] {
					d, w := sha256.New(), sha256.New()
					d.Write(data[:before])
					w.Write(data[:before])
					w.Write(p)
					digests, want = append(digests, d), append(want, w)
				}
				for rest := p; len(rest) > 0; {
					n := min(len(rest), int(step)*64+int(step)%3)
					sha256s.Write(rest[:n], digests...)
					rest = rest[n:]
				}
				same(t, digests, want)
				for i := range digests { // they can be gone on with
					digests[i].Write(p)
					want[i].Write(p)
				}
				same(t, digests, want)
			}
			restore()
		}
	})
}

// TestOtherHashes: what isn't crypto/sha256's is written to all the same.
func TestOtherHashes(t *testing.T) {
	p := layertest.Noise(1, 10000)
	digests, want := []hash.Hash{sha256.New(), sha512.New512_256()}, []hash.Hash{sha256.New(), sha512.New512_256()}
	sha256s.Write(p, digests...)
	for _, w := range want {
		w.Write(p)
	}
	same(t, digests, want)
}

func same(t *testing.T, got, want []hash.Hash) {
	t.Helper()
	for i := range got {
		if g, w := got[i].Sum(nil), want[i].Sum(nil); !bytes.Equal(g, w) {
			t.Errorf("digest %d of %d is %x, want %x", i+1, len(got), g, w)
		}
	}
}

// The last way is one after the other.
func BenchmarkWrite(b *testing.B) {
	p := layertest.Noise(1, 64<<10)
	for _, n := range []int{1, 2, 3} {
		digests := make([]hash.Hash, n)
		for i := range digests {
			digests[i] = sha256.New()
		}
		for way := range sha256s.Ways() {
			b.Run(fmt.Sprintf("%d digests, way %d", n, way), func(b *testing.B) {
				defer sha256s.Use(way)()
				b.SetBytes(int64(len(p)))
				for b.Loop() {
					sha256s.Write(p, digests...)
				}
			})
		}
	}
}
