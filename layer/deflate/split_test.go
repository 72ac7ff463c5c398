package deflate

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

func TestWeighted(t *testing.T) {
	for _, f := range []int{0, 1, 2, 3, 100, len(weights) - 1, len(weights), len(weights) + 1, 12345, 1 << 20, 1<<21 + 1} {
		want := 0.0
		if f > 0 {
			want = bit * float64(f) * math.Log2(float64(f))
		}
		if got := float64(weighted(f)); math.Abs(got-want) > want/1000+bit {
			t.Errorf("weighted(%d) is %v, not %v", f, got, want)
		}
	}
}

// Two of a kind cost no more in one block than apart, and two that have nothing in common as much as they do apart, and a bit more for
// each symbol to tell them from each other.
func TestCost(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var none, a, b, c histogram
	n := 0
	for i := range 100 {
		f := r.Uint32N(50)
		a.litLen[i], b.litLen[i], c.litLen[150+i] = f, 2*f, f
		n += int(f)
	}
	apart := a.costs(&none).alone + b.costs(&none).alone
	if got := a.costs(&b).together; math.Abs(float64(got-apart)) > float64(100*bit) {
		t.Errorf("of one kind: %d bits together, %d apart", got/bit, apart/bit)
	}
	apart = a.costs(&none).alone + c.costs(&none).alone + 2*n*bit
	if got := a.costs(&c).together; math.Abs(float64(got-apart)) > float64(100*bit) {
		t.Errorf("of two kinds: %d bits together, %d apart", got/bit, apart/bit)
	}
}

// Where the content changes, a block ends, about there.
func TestSplits(t *testing.T) {
	apart := len(AppendGzip(nil, layertest.Text(1, 100_000))) + len(AppendGzip(nil, layertest.Program(t, 100_000)))
	together := len(AppendGzip(nil, append(layertest.Text(1, 100_000), layertest.Program(t, 100_000)...)))
	if together > apart+apart/200 {
		t.Errorf("%d bytes together, %d apart", together, apart)
	}
}
