package zstd

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	klauspost "github.com/klauspost/compress/zstd"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// decompress does so by the library that Podman and stargz-snapshotter have: all at once, which knows the size from the header, and as a stream.
func decompress(t testing.TB, frame []byte) []byte {
	t.Helper()
	d, err := klauspost.NewReader(nil, klauspost.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	all, err := d.DecodeAll(frame, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Reset(bytes.NewReader(frame)); err != nil {
		t.Fatal(err)
	}
	var stream bytes.Buffer
	if _, err := d.WriteTo(&stream); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(stream.Bytes(), all) {
		t.Fatal("two decoders see two contents")
	}
	return all
}

// wantSame compresses, and decompresses again.
func wantSame(t testing.TB, in []byte) (frame []byte) {
	t.Helper()
	frame = Append(nil, in)
	if got := decompress(t, frame); !bytes.Equal(got, in) {
		t.Fatalf("%d bytes come back as %d others", len(in), len(got))
	}
	if most := MaxSize(len(in)); len(frame) > most {
		t.Errorf("%d bytes become %d, more than %d", len(in), len(frame), most)
	}
	return frame
}

func TestRoundTrip(t *testing.T) {
	for name, in := range inputs(t) {
		t.Run(name, func(t *testing.T) { wantSame(t, in) })
	}
}

// Pieces of everything, in any order and of any size, so that blocks begin anywhere and codes are used again or not.
func TestRoundTripRandom(t *testing.T) {
	all := inputs(t)
	for seed := range layertest.Seeds(150) {
		wantSame(t, layertest.Pieces(all, seed))
	}
}

// What the bits of a place say is no offset, however it looks like one: beyond the window there is nothing.
func TestNoMatchBeyondWindow(t *testing.T) {
	word := []byte("ABCDEFGH")
	// Its place has other bits than the word's, by one, and is looked up in the same slot.
	like := []byte{0x5d, 0x26, 0xf7, 0x4e, 0x65, 0xf5, 0x1a, 0xd8}
	in := layertest.Noise(3, window+1<<20)
	for _, at := range []struct {
		pos  int
		word []byte
	}{{5000, word}, {window + 5000, like}, {window + 6000, word}} {
		copy(in[at.pos-64:], bytes.Repeat([]byte("a"), 64)) // after which no position is left out
		copy(in[at.pos:], at.word)
	}
	wantSame(t, in)
}

// Frames say how large they are, so that who decompresses needs no more memory than that, up to a window.
func TestHeader(t *testing.T) {
	for _, n := range []int{0, 1, 255, 256, 65_791, 65_792, window, window + 1} {
		var h klauspost.Header
		if err := h.Decode(Append(nil, make([]byte, n))); err != nil {
			t.Fatal(err)
		}
		if !h.HasFCS || h.FrameContentSize != uint64(n) || h.SingleSegment != (n <= window) || n > window && h.WindowSize != window || h.HasCheckSum {
			t.Errorf("%d bytes: %+v", n, h)
		}
	}
}

// What the bytes behind the input are, which words are loaded from that reach over its end, makes no difference.
func TestReadsNothingBehindTheEnd(t *testing.T) {
	for name, in := range inputs(t) {
		in = in[max(0, len(in)-70_000):]
		behind := append(slices.Clone(in), in...)
		exact := make([]byte, len(in))
		copy(exact, in)
		if !bytes.Equal(Append(nil, behind[:len(in)]), Append(nil, exact[:len(in):len(in)])) {
			t.Errorf("%s: depends on what is behind it", name)
		}
	}
}

// An encoder that was used leaves nothing to the next frame.
func TestDeterministic(t *testing.T) {
	all := inputs(t)
	first := map[string][]byte{}
	for name, in := range all {
		e := encoders.New().(*encoder)
		first[name] = e.frame(nil, in)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for name, in := range all { // in another order each time
				if !bytes.Equal(Append(nil, in), first[name]) {
					t.Errorf("%s: another frame the second time", name)
				}
			}
		})
	}
	wg.Wait()
}

func TestAppends(t *testing.T) {
	in := layertest.Text(1, 1000)
	got := Append([]byte("before"), in)
	if !bytes.Equal(got, append([]byte("before"), Append(nil, in)...)) {
		t.Error("another frame behind other bytes")
	}
}

// What was compressed isn't much larger than by klauspost's default level, and what can't be is stored. The program is another one under the
// race detector, and from each version of Go.
func TestSizes(t *testing.T) {
	e, err := klauspost.NewWriter(nil, klauspost.WithWindowSize(window), klauspost.WithEncoderCRC(false))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for name, want := range map[string]float64{
		"text": 1.05, "program": 1.03, "skewed": 1.01, "few skewed": 1.05, "noise": 1, "noise twice": 1.01, "zeros": 1, "two letters": 1.1, "text, noise, the same": 1.03,
	} {
		in := inputs(t)[name]
		n, theirs := len(Append(nil, in)), len(e.EncodeAll(in, nil))
		t.Logf("%s: %d, by klauspost's %d", name, n, theirs)
		if float64(n) > want*float64(theirs) {
			t.Errorf("%s: %d bytes, klauspost's makes it %d", name, n, theirs)
		}
	}
	if in := layertest.Noise(1, 300_000); len(Append(nil, in)) != 4+1+4+3*3+len(in) {
		t.Errorf("%d bytes of noise become %d", len(in), len(Append(nil, in)))
	}
}

// A distribution of any counts has a state for each symbol that there is, and all of them together.
func TestNormalize(t *testing.T) {
	for seed := range layertest.Seeds(2000) {
		r := rand.New(rand.NewPCG(seed, 3))
		counts := make([]uint32, 2+r.IntN(maxSymbols-1))
		total := 0
		for i := range counts {
			if last := i == len(counts)-1; last || r.IntN(3) > 0 {
				counts[i] = 1 + uint32(r.ExpFloat64()*float64(uint(1)<<r.IntN(15)))
			}
			total += int(counts[i])
		}
		log := logFor(total, len(counts), 8+uint(r.IntN(2)))
		norm := make([]int16, len(counts))
		normalize(norm, counts, total, log)
		sum := 0
		for i, p := range norm {
			if (p > 0) != (counts[i] > 0) || p < 0 {
				t.Fatalf("seed %d: %v of %v", seed, norm, counts)
			}
			sum += int(p)
		}
		if sum != 1<<log {
			t.Fatalf("seed %d: %d states, want %d: %v of %v", seed, sum, 1<<log, norm, counts)
		}
	}
}

// A code of any counts has a codeword for each literal that there is, none is the beginning of another, none could be shorter, and they aren't too
// long.
func TestCode(t *testing.T) {
	var l literalCoder
	for seed := range layertest.Seeds(2000) {
		r := rand.New(rand.NewPCG(seed, 4))
		letters := 2 + r.IntN(255)
		steep := 1 << r.IntN(18)
		l.keys = l.keys[:0]
		for s := range letters {
			l.keys = append(l.keys, (1+uint32(r.ExpFloat64()*float64(r.IntN(steep))/16)&0xffff)<<8|uint32(s))
		}
		var c code
		longest := l.build(&c)
		room := 1 << maxCodeword
		for s := range letters {
			n := c.length(s)
			if n == 0 || n > longest || longest > maxCodeword || c[s]&0xffff >= 1<<n {
				t.Fatalf("seed %d: literal %d has a codeword of %d bits, %#x; the longest one has %d", seed, s, n, c[s]&0xffff, longest)
			}
			room -= 1 << (maxCodeword - n)
		}
		if room != 0 {
			t.Fatalf("seed %d: %d codewords are left over", seed, room)
		}
	}
}

func FuzzRoundTrip(f *testing.F) {
	for _, in := range inputs(f) {
		if len(in) < 3000 {
			f.Add(in, uint16(1))
			f.Add(in, uint16(300))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, times uint16) {
		wantSame(t, bytes.Repeat(in, min(int(times), 1<<20/max(1, len(in)))))
	})
}
