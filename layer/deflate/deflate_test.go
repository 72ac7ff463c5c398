package deflate

import (
	"bytes"
	stdgzip "compress/gzip"
	"io"
	"slices"
	"sync"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// gunzip decompresses by the standard library and by klauspost's, which share no code, and wants the same of both, to the last byte.
func gunzip(t testing.TB, gz []byte) []byte {
	t.Helper()
	r, err := stdgzip.NewReader(bytes.NewReader(gz))
	if err != nil {
		t.Fatal(err)
	}
	r.Multistream(false)
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("compress/gzip, behind %d bytes: %v", len(out), err)
	}
	src := bytes.NewReader(gz)
	k, err := gzip.NewReader(src)
	if err != nil {
		t.Fatal(err)
	}
	k.Multistream(false)
	again, err := io.ReadAll(k)
	if err != nil {
		t.Fatalf("klauspost, behind %d bytes: %v", len(again), err)
	}
	if !bytes.Equal(out, again) {
		t.Fatal("two decoders see two contents")
	}
	if src.Len() > 0 {
		t.Fatalf("%d bytes behind the stream", src.Len())
	}
	return out
}

// wantSame compresses, and decompresses again.
func wantSame(t testing.TB, in []byte) (gz []byte) {
	t.Helper()
	gz = AppendGzip(nil, in)
	if got := gunzip(t, gz); !bytes.Equal(got, in) {
		t.Fatalf("%d bytes come back as %d others", len(in), len(got))
	}
	if most := MaxSize(len(in)); len(gz) > most {
		t.Errorf("%d bytes become %d, more than %d", len(in), len(gz), most)
	}
	return gz
}

func TestRoundTrip(t *testing.T) {
	for name, in := range inputs(t) {
		t.Run(name, func(t *testing.T) { wantSame(t, in) })
	}
}

// Pieces of everything, in any order and of any size, so that blocks begin anywhere and matches lead across.
func TestRoundTripRandom(t *testing.T) {
	all := inputs(t)
	for seed := range layertest.Seeds(150) {
		wantSame(t, layertest.Pieces(all, seed))
	}
}

// What the bytes behind the input are, which words are loaded from that reach over its end, makes no difference.
func TestReadsNothingBehindTheEnd(t *testing.T) {
	for name, in := range inputs(t) {
		in = in[max(0, len(in)-70_000):]
		behind := append(slices.Clone(in), in...)
		exact := make([]byte, len(in))
		copy(exact, in)
		if !bytes.Equal(AppendGzip(nil, behind[:len(in)]), AppendGzip(nil, exact[:len(in):len(in)])) {
			t.Errorf("%s: depends on what is behind it", name)
		}
	}
}

// An encoder that was used leaves nothing to the next stream.
func TestDeterministic(t *testing.T) {
	all := inputs(t)
	first := map[string][]byte{}
	for name, in := range all {
		first[name] = AppendGzip(nil, in)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for name, in := range all { // in another order each time
				if !bytes.Equal(AppendGzip(nil, in), first[name]) {
					t.Errorf("%s: another stream the second time", name)
				}
			}
		})
	}
	wg.Wait()
}

func TestAppends(t *testing.T) {
	in := layertest.Text(1, 1000)
	got := AppendGzip([]byte("before"), in)
	if !bytes.Equal(got, append([]byte("before"), AppendGzip(nil, in)...)) {
		t.Error("another stream behind other bytes")
	}
}

// What was compressed isn't much larger than by others, and what can't be is stored. The program is another one under the race detector, and
// from each version of Go.
func TestSizes(t *testing.T) {
	for name, want := range map[string]float64{"text": 1.2, "program": 1.06, "skewed": 1.1, "noise": 1, "zeros": 1.5} {
		in := inputs(t)[name]
		var b bytes.Buffer
		gz, err := stdgzip.NewWriterLevel(&b, 6)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := gz.Write(in); err != nil {
			t.Fatal(err)
		}
		if err := gz.Close(); err != nil {
			t.Fatal(err)
		}
		n := len(AppendGzip(nil, in))
		t.Logf("%s: %d, by the standard library %d", name, n, b.Len())
		if float64(n) > want*float64(b.Len()) {
			t.Errorf("%s: %d bytes, the standard library makes it %d", name, n, b.Len())
		}
	}
	if in := layertest.Noise(1, 100_000); len(AppendGzip(nil, in)) != 10+5+maxStored+5+len(in)-maxStored+8 {
		t.Errorf("%d bytes of noise become %d", len(in), len(AppendGzip(nil, in)))
	}
}

// Into a buffer with room nothing is allocated by an encoder that was used.
func TestAllocatesNothing(t *testing.T) {
	e := new(encoder)
	for name, in := range inputs(t) {
		buf := make([]byte, 0, MaxSize(len(in))+100)
		if n := testing.AllocsPerRun(3, func() { e.appendGzip(buf, in) }); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
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
