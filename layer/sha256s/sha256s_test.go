package sha256s_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/sha512"
	"encoding"
	"fmt"
	"hash"
	"reflect"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

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

// A digest that is registered is crypto/sha256's in all that can be asked of it, in each way.
func TestRegistered(t *testing.T) {
	p := layertest.Noise(1, 300_000)
	for way := range sha256s.Ways() {
		restore := sha256s.Use(way)
		d, want := sha256s.NewSingle(), sha256.New()
		for at, n := 0, 1; at < len(p); at, n = at+n, n*7%50_021 {
			n = min(n, len(p)-at)
			if m, err := d.Write(p[at : at+n]); m != n || err != nil {
				t.Fatal(m, err)
			}
			want.Write(p[at : at+n])
			state, err := d.(encoding.BinaryMarshaler).MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			again := sha256.New()
			if err := again.(encoding.BinaryUnmarshaler).UnmarshalBinary(state); err != nil {
				t.Fatal(err)
			}
			clone, err := d.(hash.Cloner).Clone()
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := clone.(encoding.BinaryMarshaler); !ok {
				t.Error("a clone can't be marshaled, as crypto/tls wants it")
			}
			same(t, []hash.Hash{d, again, clone}, []hash.Hash{want, want, want})
			clone.Write(p) // is its own
		}
		d.Reset()
		same(t, []hash.Hash{d}, []hash.Hash{sha256.New()})
		restore()
	}
}

// Where Register has something better, crypto.SHA256 is that.
func TestRegister(t *testing.T) {
	defer crypto.RegisterHash(crypto.SHA256, sha256.New)
	sha256s.Register()
	p := layertest.Noise(1, 100_001)
	d := digest.SHA256.Hash()
	d.Write(p)
	want := sha256.Sum256(p)
	if got := d.Sum(nil); !bytes.Equal(got, want[:]) {
		t.Errorf("go-digest's digest is %x, want %x", got, want)
	}
	if std, single := reflect.TypeOf(d) == reflect.TypeOf(sha256.New()), sha256s.Singles(); std == single {
		t.Errorf("go-digest's digests are %T, and single ones are faster: %v", d, single)
	}
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

// The last way is one after the other. On a machine that others share, it's the quickest call that tells ways apart: least-ns.
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
				least := time.Hour
				for b.Loop() {
					start := time.Now()
					sha256s.Write(p, digests...)
					least = min(least, time.Since(start))
				}
				b.ReportMetric(float64(least), "least-ns")
			})
		}
	}
}
