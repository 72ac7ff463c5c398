package sha256x2_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"hash"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/sha256x2"
)

// FuzzWrite compares the digests of what two have in common, and of what is before and behind it, with those of one after the other.
func FuzzWrite(f *testing.F) {
	data := layertest.Noise(1, 64<<10)
	for _, n := range []int{0, 1, 63, 64, 1023, 1024, 1025, 4096, 5000, 64 << 10} {
		for _, before := range []uint16{0, 1, 64, 512, 700} {
			f.Add(data[:n], before, uint16(0), uint16(1023)) // in one go
			f.Add(data[:n], uint16(0), before, uint16(16))   // 1025 bytes: from the second time on not at a block
			f.Add(data[:n], before, before, uint16(18))      // 1152 bytes: 18 blocks
		}
	}
	f.Fuzz(func(t *testing.T, p []byte, beforeA, beforeB, step uint16) {
		if step == 0 {
			step = 1
		}
		a, b, wantA, wantB := sha256.New(), sha256.New(), sha256.New(), sha256.New()
		a.Write(data[:beforeA])
		wantA.Write(data[:beforeA])
		b.Write(data[:beforeB])
		wantB.Write(data[:beforeB])
		wantA.Write(p)
		wantB.Write(p)
		for rest := p; len(rest) > 0; {
			n := min(len(rest), int(step)*64+int(step)%3)
			sha256x2.Write(a, b, rest[:n])
			rest = rest[n:]
		}
		same(t, "first", a, wantA)
		same(t, "second", b, wantB)
		a.Write(p) // they can be gone on with
		wantA.Write(p)
		same(t, "continued", a, wantA)
	})
}

// TestOtherHashes: what isn't crypto/sha256's is written to all the same.
func TestOtherHashes(t *testing.T) {
	p := layertest.Noise(1, 10000)
	a, b, want, other := sha256.New(), sha512.New512_256(), sha256.Sum256(p), sha512.Sum512_256(p)
	sha256x2.Write(a, b, p)
	if !bytes.Equal(a.Sum(nil), want[:]) || !bytes.Equal(b.Sum(nil), other[:]) {
		t.Error("digests differ")
	}
}

func same(t *testing.T, what string, got, want hash.Hash) {
	t.Helper()
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Errorf("%s digest is %x, want %x", what, got.Sum(nil), want.Sum(nil))
	}
}

func BenchmarkWrite(b *testing.B) {
	p := layertest.Noise(1, 64<<10)
	x, y := sha256.New(), sha256.New()
	b.Run("together", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			sha256x2.Write(x, y, p)
		}
	})
	b.Run("one after the other", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			x.Write(p)
			y.Write(p)
		}
	})
}
