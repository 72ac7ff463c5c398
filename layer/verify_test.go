package layer_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// chunksOf is a layer of chunks of the given sizes, and their bytes.
func chunksOf(sizes ...int) (l *layer.Layer, content [][]byte) {
	l = &layer.Layer{}
	rnd := rand.NewChaCha8([32]byte{1})
	for _, n := range sizes {
		p := make([]byte, n)
		_, _ = rnd.Read(p)
		l.Chunks = append(l.Chunks, layer.Chunk{Data: l.DataSize, Size: int64(n)})
		l.Digests = append(l.Digests, sha256.Sum256(p))
		l.DataSize += int64(n)
		content = append(content, p)
	}
	return l, content
}

func TestReadChunk(t *testing.T) {
	l, content := chunksOf(1, 4096, 64<<10, 64<<10+1, 300_000)
	buf := make([]byte, 400_000)
	for i, p := range content {
		behind := append(slices.Clone(p), "more"...)
		v, err := l.ReadChunk(i, iotest.HalfReader(bytes.NewReader(behind)), buf)
		if err != nil || v.Chunk() != i || !bytes.Equal(v.Bytes(), p) || !v.Of(l) {
			t.Fatalf("chunk %d: %v", i, err)
		}
		if v.Of(&layer.Layer{Chunks: slices.Clone(l.Chunks)}) || v.Of(nil) {
			t.Errorf("chunk %d is of another layer", i)
		}
		if err := l.CheckChunk(i, bytes.NewReader(behind), buf[:1000]); err != nil {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	if (layer.Verified{}).Of(l) || (layer.Verified{}).Of(nil) {
		t.Error("no chunk is one of a layer")
	}
}

func TestReadChunkOfWrongBytes(t *testing.T) {
	l, content := chunksOf(10, 200_000)
	buf := make([]byte, 200_000)
	read := map[string]func(i int, r io.Reader) error{
		"ReadChunk": func(i int, r io.Reader) error {
			v, err := l.ReadChunk(i, r, buf)
			if v.Of(l) {
				t.Errorf("chunk %d is verified in spite of: %v", i, err)
			}
			return err
		},
		"CheckChunk": func(i int, r io.Reader) error { return l.CheckChunk(i, r, buf[:4096]) },
	}
	boom := errors.New("boom")
	for name, read := range read {
		t.Run(name, func(t *testing.T) {
			for i, p := range content {
				for _, at := range []int{0, len(p) / 2, len(p) - 1} {
					wrong := slices.Clone(p)
					wrong[at] ^= 1
					de, ok := errors.AsType[*layer.DigestError](read(i, bytes.NewReader(wrong)))
					if !ok || de.Chunk != i || de.Want != l.Digests[i] || de.Got != sha256.Sum256(wrong) {
						t.Errorf("chunk %d, byte %d: %v", i, at, de)
					}
				}
				for _, n := range []int{0, len(p) - 1} {
					if err := read(i, bytes.NewReader(p[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
						t.Errorf("chunk %d, %d bytes: %v", i, n, err)
					}
				}
				if err := read(i, iotest.ErrReader(boom)); !errors.Is(err, boom) {
					t.Errorf("chunk %d: %v", i, err)
				}
			}
		})
	}
}
