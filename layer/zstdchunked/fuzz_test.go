package zstdchunked_test

import (
	"bytes"
	"errors"
	"io/fs"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// The end of a blob is anything, and so is what its manifest says of it: it's opened or refused.
func FuzzFooter(f *testing.F) {
	tar := layertest.Tar(f, file("a", "x"), file("b/c", "y"))
	for _, write := range writers {
		b := write(f, tar)
		_, at, err := zstdchunked.Find(b.annotations)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b.data, at.String())
		f.Add(b.data, "")
	}
	f.Fuzz(func(t *testing.T, blob []byte, position string) {
		at, err := zstdchunked.ParsePosition(position)
		if err != nil {
			at = zstdchunked.Position{}
		}
		b, err := zstdchunked.Open(bytes.NewReader(blob), int64(len(blob)), zstdchunked.Options{Position: at})
		if err != nil {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("doesn't wrap ErrInvalid: %v", err)
			}
			return
		}
		layertest.Check(t, b.Layer)
	})
}

// A TOC is anything: it gives a consistent layer or is refused.
func FuzzTOC(f *testing.F) {
	for _, entries := range layers {
		for _, write := range []writer{podman(1000), stargzBuild()} {
			w := write(f, layertest.Tar(f, entries...))
			b := open(f, w, bytes.NewReader(w.data))
			if j, err := decompress(b.TOC); err != nil {
				f.Fatal(err)
			} else if len(j) < 3000 { // what is larger takes minutes to minimize
				f.Add(j)
			}
		}
	}
	f.Add([]byte(`{"entries":[{"type":"reg","name":"x","size":300000000,"offset":9,"chunkSize":300000000,"chunkType":"zeros"}]}`))
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, toc []byte) {
		b, err := zstdchunked.Parse(enc.EncodeAll(toc, nil), 1<<30, zstdchunked.Options{})
		if err != nil {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("doesn't wrap ErrInvalid: %v", err)
			}
			return
		}
		layertest.Check(t, b.Layer)
	})
}

func decompress(p []byte) ([]byte, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	return dec.DecodeAll(p, nil)
}
