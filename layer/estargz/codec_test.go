package estargz_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"strings"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
)

var _ layer.Codec = estargz.Codec{}

func gzipped(t testing.TB, s string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A frame's range may hold another stream, or the beginning of one.
func TestCodecEndsWithTheStream(t *testing.T) {
	in := append(gzipped(t, "first"), gzipped(t, "second")[:12]...)
	for range 3 { // the second time with what the first has left
		r, err := estargz.Codec{}.Decompress(bytes.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || string(got) != "first" {
			t.Errorf("%q, %v", got, err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Error(err)
		}
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("read after Close: %v", err)
		}
		if _, err := (estargz.Codec{}).Decompress(strings.NewReader("not gzip, not at all")); err == nil {
			t.Error("what isn't gzip was decompressed")
		}
	}
}

func TestCodecDamage(t *testing.T) {
	in := gzipped(t, strings.Repeat("content", 1000))
	for name, in := range map[string][]byte{"cut off": in[:len(in)-9], "checksum": append(append([]byte{}, in[:len(in)-8]...), make([]byte, 8)...)} {
		r, err := estargz.Codec{}.Decompress(bytes.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err == nil {
			t.Errorf("%s: no error", name)
		}
		r.Close()
	}
}
