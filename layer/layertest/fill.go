package layertest

import (
	"crypto/sha256"
	"io"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Fill decompresses all frames of a layer's blob, and returns the data space. Chunks whose digest isn't what the layer says
// fail the test.
func Fill(t testing.TB, l *layer.Layer, blob io.ReaderAt) []byte {
	t.Helper()
	data := make([]byte, l.DataSize)
	for i, f := range l.Frames {
		r, err := l.Codec.Decompress(io.NewSectionReader(blob, f.Offset, f.Size))
		if err != nil {
			t.Fatalf("frame %d at %d: %v", i, f.Offset, err)
		}
		at := int64(0)
		for k, c := range l.Chunks[f.FirstChunk:][:f.NumChunks] {
			if _, err := io.CopyN(io.Discard, r, int64(c.Inner)-at); err != nil {
				t.Fatalf("frame %d, up to %d: %v", i, c.Inner, err)
			}
			p := data[c.Data:c.End()]
			if _, err := io.ReadFull(r, p); err != nil {
				t.Fatalf("frame %d, %d bytes at %d: %v", i, c.Size, c.Inner, err)
			}
			if sha256.Sum256(p) != l.Digest(int(f.FirstChunk)+k) {
				t.Errorf("frame %d, %d bytes at %d: digest mismatch", i, c.Size, c.Inner)
			}
			at = int64(c.Inner) + c.Size
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	return data
}

// Content returns what a regular file has in a data space.
func Content(l *layer.Layer, data []byte, path string) (string, error) {
	i, err := l.Lookup(path)
	if err != nil {
		return "", err
	}
	in := &l.Inodes[i]
	return string(data[in.Data:][:in.Size]), nil
}
