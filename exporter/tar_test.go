package exporter

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// blobBytes is a blob that isn't in the content store.
type blobBytes struct{ *bytes.Reader }

func (blobBytes) Close() error { return nil }

// readTar reads the tar of a blob in small pieces.
func readTar(blob content.ReaderAt, desc ocispecs.Descriptor) ([]byte, error) {
	r, err := openTar(blob, desc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(iotest.OneByteReader(r))
}

// The tar of a layer is the one that BuildKit makes of its blob.
func TestTar(t *testing.T) {
	cs := contentStore(t)
	plain := put(t, cs, layerTar(t, "a", "b"))
	plain.Annotations = map[string]string{labels.LabelUncompressed: plain.Digest.String()}
	for name, comp := range map[string]compression.Config{
		"plain":         compression.New(compression.Uncompressed),
		"gzip":          compression.New(compression.Gzip),
		"zstd":          compression.New(compression.Zstd),
		"eStargz":       ours(estargz.WriteOptions{}),
		"stock eStargz": compression.New(compression.EStargz),
		"zstd:chunked":  oursChunked(zstdchunked.WriteOptions{}),
	} {
		t.Run(name, func(t *testing.T) {
			desc, err := convert(t.Context(), cs, plain, comp)
			if err != nil {
				t.Fatal(err)
			}
			from, err := compression.FromMediaType(desc.MediaType)
			if err != nil {
				t.Fatal(err)
			}
			r, err := from.Decompress(t.Context(), cs, *desc)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			want, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			blob, err := content.ReadBlob(t.Context(), cs, *desc)
			if err != nil {
				t.Fatal(err)
			}
			got, err := readTar(blobBytes{bytes.NewReader(blob)}, *desc)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %v, want %d", len(got), err, len(want))
			}
		})
	}
}

// otherEnd has another end the first time that it's read.
type otherEnd struct {
	blobBytes
	end []byte
}

func (o *otherEnd) ReadAt(p []byte, off int64) (int, error) {
	if o.end != nil && off+int64(len(p)) == o.Size() {
		n := copy(p, o.end)
		o.end = nil
		return n, nil
	}
	return o.blobBytes.ReadAt(p, off)
}

// What isn't as the image says ends in an error.
func TestTarFails(t *testing.T) {
	cs := contentStore(t)
	plain := put(t, cs, layerTar(t, "a", "b"))
	made, err := convert(t.Context(), cs, plain, ours(estargz.WriteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	whole, err := content.ReadBlob(t.Context(), cs, *made)
	if err != nil {
		t.Fatal(err)
	}
	other := slices.Clone(whole)
	other[len(other)/2] ^= 1
	var noTOC bytes.Buffer
	for range 2 {
		w := gzip.NewWriter(&noTOC)
		_, err := w.Write(layerTar(t, "a"))
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
	}
	footer := whole[len(whole)-stargz.FooterSize:]
	at := bytes.Index(footer, []byte("STARGZ")) - 16
	half := noTOC.Len() / 2
	footerAt := func(toc int) []byte {
		return slices.Concat(footer[:at], fmt.Appendf(nil, "%016x", toc), footer[at+16:])
	}
	noTOC.Write(footerAt(half))
	gone := errors.New("the registry is gone")
	for name, c := range map[string]struct {
		blob   content.ReaderAt
		diffID string
		want   []string
	}{
		"another DiffID":  {blobBytes{bytes.NewReader(whole)}, digest.FromString("other").String(), []string{"is damaged", "its DiffID is " + made.Annotations[labels.LabelUncompressed]}},
		"broken":          {blobBytes{bytes.NewReader(other)}, made.Annotations[labels.LabelUncompressed], []string{"is damaged", "decompress"}},
		"no table":        {blobBytes{bytes.NewReader(noTOC.Bytes())}, "", []string{"is damaged", "no table of contents"}},
		"another end":     {&otherEnd{blobBytes{bytes.NewReader(whole)}, footerAt(256)}, made.Annotations[labels.LabelUncompressed], []string{"sent twice"}},
		"no end":          {&otherEnd{blobBytes{bytes.NewReader(whole)}, make([]byte, len(footer))}, made.Annotations[labels.LabelUncompressed], []string{"sent twice"}},
		"end isn't there": {&unreadable{blobBytes{bytes.NewReader(whole)}, int64(len(whole)) - 1, gone}, "", []string{gone.Error()}},
		"not all there":   {&unreadable{blobBytes{bytes.NewReader(whole)}, 20_000, gone}, "", []string{gone.Error()}},
	} {
		t.Run(name, func(t *testing.T) {
			desc := *made
			desc.Annotations = map[string]string{}
			if c.diffID != "" {
				desc.Annotations[labels.LabelUncompressed] = c.diffID
			}
			_, err := readTar(c.blob, desc)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want %q in it", err, want)
				}
			}
		})
	}
}

// unreadable fails to read one of its bytes.
type unreadable struct {
	blobBytes
	at  int64
	err error
}

func (u *unreadable) ReadAt(p []byte, off int64) (int, error) {
	if off <= u.at && u.at < off+int64(len(p)) {
		return 0, u.err
	}
	return u.blobBytes.ReadAt(p, off)
}
