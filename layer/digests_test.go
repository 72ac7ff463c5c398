package layer_test

import (
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// withDigests makes a packed layer of chunks with these digests.
func withDigests(t *testing.T, digests ...[sha256.Size]byte) *layer.Layer {
	t.Helper()
	l := &layer.Layer{Inodes: []layer.Inode{{Mode: 0o40755}}, Digests: digests}
	for i := range digests {
		l.Chunks = append(l.Chunks, layer.Chunk{Data: int64(i) * layer.BlockSize, Size: 1})
	}
	return pack(t, l)
}

// Which chunks two layers have in common, or one has twice, is what comparing each with each says.
func TestChunksInCommon(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	// Few different ones, which begin alike, as a table of contents can have them.
	digest := func(different int) (d [sha256.Size]byte) {
		d[0] = byte(rnd.IntN(2))
		d[len(d)-1] = byte(rnd.IntN(different))
		return d
	}
	for range 50 {
		digests := [2][][sha256.Size]byte{}
		var layers [2]*layer.Layer
		for k := range layers {
			for range rnd.IntN(60) {
				digests[k] = append(digests[k], digest(1+rnd.IntN(100)))
			}
			layers[k] = withDigests(t, digests[k]...)
		}
		for k, l := range layers {
			for c, d := range digests[k] {
				for m, o := range layers {
					var want []int
					for i, other := range digests[m] {
						if other == d {
							want = append(want, i)
						}
					}
					if got := slices.Collect(o.WithDigest(d)); !slices.Equal(got, want) {
						t.Fatalf("layer %d, chunk %d: found %v in layer %d, want %v", k, c, got, m, want)
					}
				}
			}
			for range l.WithDigest([sha256.Size]byte{7}) {
				t.Fatal("found a chunk that there isn't")
			}
		}
		var got, want [2][]int
		layers[0].Shared(layers[1], func(c int) { got[0] = append(got[0], c) }, func(c int) { got[1] = append(got[1], c) })
		for k := range want {
			slices.Sort(got[k])
			for c, d := range digests[k] {
				if slices.Contains(digests[1-k], d) {
					want[k] = append(want[k], c)
				}
			}
			if !slices.Equal(got[k], want[k]) {
				t.Fatalf("of layer %d the other has %v, want %v", k, got[k], want[k])
			}
		}
		var twice, wantTwice []int
		layers[0].Shared(layers[0], func(c int) { twice = append(twice, c) }, nil)
		slices.Sort(twice)
		for c, d := range digests[0] {
			if slices.Index(digests[0], d) != c || slices.Contains(digests[0][c+1:], d) {
				wantTwice = append(wantTwice, c)
			}
		}
		if !slices.Equal(twice, wantTwice) {
			t.Fatalf("it has %v more than once, want %v", twice, wantTwice)
		}
	}
}

// Digests are what a table of contents says: that all of them begin alike makes nobody compare each with each.
func TestChunksInCommonTakeOneLookAtEach(t *testing.T) {
	const n = 200_000
	alike := make([][sha256.Size]byte, n)
	for i := range alike {
		alike[i][30], alike[i][31], alike[i][29] = byte(i>>8), byte(i), byte(i>>16)
	}
	same := make([][sha256.Size]byte, n)
	a, b, found := withDigests(t, alike...), withDigests(t, same...), 0
	count := func(int) { found++ }
	a.Shared(a, count, count)
	if found != 0 {
		t.Errorf("%d chunks are there twice", found)
	}
	a.Shared(b, count, count)
	if found != n+1 {
		t.Errorf("%d chunks are in common, want %d", found, n+1)
	}
	found = 0
	b.Shared(b, count, count)
	if found != n {
		t.Errorf("%d chunks are there more than once, want %d", found, n)
	}
}

// The order of a layer has each of its chunks, and digests in their order, as far as it says what they are.
func TestOrder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	var digests [][sha256.Size]byte
	for i := range 1000 {
		digests = append(digests, sha256.Sum256([]byte{byte(rnd.IntN(256)), byte(i / 500)}))
	}
	order := withDigests(t, digests...).Order()
	var chunks []int
	for k, o := range order {
		c := int(uint32(o))
		chunks = append(chunks, c)
		if want := binary.BigEndian.Uint32(digests[c][:]); uint32(o>>32) != want {
			t.Fatalf("chunk %d: %08x, want %08x", c, uint32(o>>32), want)
		}
		if k > 0 && order[k-1]>>32 > o>>32 {
			t.Fatalf("%016x comes before %016x", order[k-1], o)
		}
	}
	slices.Sort(chunks)
	for i := range digests {
		if i >= len(chunks) || chunks[i] != i {
			t.Fatalf("chunk %d isn't in the order once", i)
		}
	}
	if l := (&layer.Layer{Chunks: make([]layer.Chunk, 1), Digests: make([][sha256.Size]byte, 1)}); l.Order() != nil {
		t.Error("a layer that isn't packed has an order")
	}
}
