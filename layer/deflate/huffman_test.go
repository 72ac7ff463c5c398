package deflate

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// weightsOf are n symbols' frequencies: of some kind that makes flat codes, deep ones, or ones of few symbols.
func weightsOf(r *rand.Rand, n int) []uint32 {
	freq := make([]uint32, n)
	kind := r.IntN(5)
	a, b := uint32(1), uint32(1)
	for i := range freq {
		switch kind {
		case 0:
			freq[i] = r.Uint32N(10)
		case 1:
			freq[i] = 1 << r.IntN(18)
		case 2: // Fibonacci's make the deepest trees
			if i < 28 {
				freq[i], a, b = a, b, a+b
			}
		case 3:
			if r.IntN(n) == 0 {
				freq[i] = r.Uint32N(1000)
			}
		case 4:
			freq[i] = r.Uint32N(5000)
		}
	}
	r.Shuffle(n, func(i, j int) { freq[i], freq[j] = freq[j], freq[i] })
	return freq
}

// A code is complete, which is what decoders ask for, has a codeword for whatever occurs, none above the limit, and is as good as
// Huffman's where that has none above the limit either.
func TestCodes(t *testing.T) {
	for seed := range layertest.Seeds(600) {
		r := rand.New(rand.NewPCG(seed, 3))
		n, limit := usedLitLen, litLenLimit
		switch r.IntN(3) {
		case 0:
			n, limit = usedOffset, maxCodeword
		case 1:
			n, limit = numPrecode, maxPrecode
		}
		freq := weightsOf(r, n)
		var c code
		c.size[0], c.size[n-1] = 9, 9 // what was there before
		c.build(freq, limit)
		room := 0
		for s, f := range freq {
			size := int(c.size[s])
			switch {
			case f > 0 && size == 0:
				t.Fatalf("seed %d: symbol %d occurs, and has no codeword", seed, s)
			case size > limit:
				t.Fatalf("seed %d: symbol %d has %d bits", seed, s, size)
			case size > 0:
				room += 1 << (maxCodeword - size)
			}
			for s2 := range s {
				if size2 := int(c.size[s2]); size > 0 && size2 > 0 {
					m := min(size, size2)
					if (c.word[s]^c.word[s2])&(1<<m-1) == 0 {
						t.Fatalf("seed %d: %d begins as %d does", seed, s, s2)
					}
				}
			}
		}
		if room != 1<<maxCodeword {
			t.Fatalf("seed %d: codewords take %d of %d", seed, room, 1<<maxCodeword)
		}
		// One codeword more is there if only one symbol occurs.
		if best := shortest(freq, limit); float64(c.bits(freq)) > 1.15*float64(best)+1 {
			t.Errorf("seed %d: %d bits with codewords of up to %d, %d are enough", seed, c.bits(freq), limit, best)
		}
		if best, unlimited := shortest(freq, limit), shortest(freq, 31); best == unlimited && c.bits(freq) != best {
			t.Errorf("seed %d: %d bits, by Huffman's code %d", seed, c.bits(freq), best)
		}
	}
}

// shortest returns how many bits symbols take at least that occur so often, if no codeword is above a limit: by package-merge (Larmore and
// Hirschberg, "A Fast Algorithm for Optimal Length-Limited Huffman Codes", 1990).
func shortest(freq []uint32, limit int) (bits int) {
	var coins []int
	for _, f := range freq {
		if f > 0 {
			coins = append(coins, int(f))
		}
	}
	if len(coins) == 1 {
		return coins[0]
	}
	slices.Sort(coins)
	packages := slices.Clone(coins)
	for range limit - 1 {
		var pairs []int
		for i := 1; i < len(packages); i += 2 {
			pairs = append(pairs, packages[i-1]+packages[i])
		}
		packages = append(pairs, coins...)
		slices.Sort(packages)
	}
	for _, p := range packages[:max(0, 2*len(coins)-2)] {
		bits += p
	}
	return bits
}
