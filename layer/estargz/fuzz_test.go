package estargz_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// The end of a blob is anything: it's opened or refused.
func FuzzFooter(f *testing.F) {
	tar := layertest.Tar(f, file("a", "x"), file("b/c", "y"))
	for _, write := range []writer{build(), external, legacy} {
		b := write(f, tar)
		f.Add(b.data, b.toc)
	}
	f.Add(legacyFooter(f, 1<<62), []byte(nil))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, blob, toc []byte) {
		b, err := estargz.Open(bytes.NewReader(blob), int64(len(blob)), estargz.Options{ExternalTOC: toc})
		if err != nil {
			if !errors.Is(err, fs.ErrInvalid) && !errors.Is(err, estargz.ErrExternalTOC) {
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
		b := build(stargz.WithChunkSize(1000), stargz.WithMinChunkSize(2500))(f, layertest.Tar(f, entries...))
		toc, err := readTOC(b)
		if err != nil {
			f.Fatal(err)
		}
		if len(toc) < 3000 { // what is larger takes minutes to minimize
			f.Add(toc)
		}
	}
	f.Add([]byte(`{"version":1,"entries":[{"name":"a","type":"reg","size":9,"digest":"` + sum + `"},{"type":"hardlink","name":"b","linkName":"a"}]}`))
	f.Add([]byte(`{"a":[1,2.5,{"b":null}],"entries":[{"name":"\ud83d\ude00","type":"dir","xattrs":{"user.a":"YQ=="}}]}`))
	var packed bytes.Buffer
	gz, err := gzip.NewWriterLevel(&packed, gzip.NoCompression)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, toc []byte) {
		packed.Reset()
		gz.Reset(&packed)
		if _, err := gz.Write(layertest.Tar(t, file("stargz.index.json", string(toc)))); err != nil {
			t.Fatal(err)
		}
		if err := gz.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := estargz.Parse(packed.Bytes(), 1<<30, estargz.Options{})
		if err != nil {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("doesn't wrap ErrInvalid: %v", err)
			}
			return
		}
		layertest.Check(t, b.Layer)
	})
}

func readTOC(b blob) ([]byte, error) {
	offset, _, err := stargz.OpenFooter(b.reader())
	if err != nil {
		return nil, err
	}
	toc, _, err := new(stargz.GzipDecompressor).ParseTOC(bytes.NewReader(b.data[offset:]))
	if err != nil {
		return nil, err
	}
	return json.Marshal(toc)
}

// A tar is anything: it's refused, or becomes a layer that holds it.
func FuzzWrite(f *testing.F) {
	for _, entries := range layers {
		if in := layertest.Tar(f, entries...); len(in) <= 4096 { // what is larger takes minutes to minimize
			f.Add(in, uint16(1000), uint16(2500))
		}
	}
	f.Add(layertest.Tar(f, file("stargz.index.json", "x")), uint16(1), uint16(1))
	pool := estargz.NewPool(1)
	f.Fuzz(func(t *testing.T, in []byte, chunk, least uint16) {
		var out bytes.Buffer
		w, err := estargz.Write(t.Context(), &out, bytes.NewReader(in), estargz.WriteOptions{ChunkSize: int64(chunk) + 200, MinChunkSize: int64(least), Level: new(0), Pool: pool})
		if err != nil {
			return
		}
		gz, err := gzip.NewReader(bytes.NewReader(out.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(gz); err != nil || !bytes.HasPrefix(got, in) || digest.FromBytes(got) != w.DiffID {
			t.Errorf("decompresses to %d bytes, of %d (%v)", len(got), len(in), err)
		}
		b, err := estargz.Open(bytes.NewReader(out.Bytes()), int64(out.Len()), estargz.Options{TOCDigest: w.TOCDigest})
		if err != nil {
			if !errors.Is(err, fs.ErrInvalid) || errors.Is(err, estargz.ErrTOC) || errors.Is(err, estargz.ErrFooter) {
				t.Errorf("our own reader: %v", err)
			}
			return // names that no layer can have
		}
		layertest.Check(t, b.Layer)
		layertest.Fill(t, b.Layer, bytes.NewReader(out.Bytes()))
	})
}

// Any tree of files goes through: ours and stargz-snapshotter's readers see the same one, each with the bytes that were written, verified, and the
// TOC is what stargz-snapshotter's writer makes of the tar.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint64(1), uint8(40), uint16(1000), uint16(2500))
	f.Add(uint64(2), uint8(3), uint16(0), uint16(1))
	f.Add(uint64(3), uint8(120), uint16(9000), uint16(65535))
	f.Fuzz(func(t *testing.T, seed uint64, n uint8, chunk, least uint16) {
		r := rand.New(rand.NewPCG(seed, 4))
		entries := layertest.Random(r, int(n))
		in := layertest.Tar(t, entries...)
		opt := estargz.WriteOptions{ChunkSize: int64(chunk) + 100, MinChunkSize: int64(least), Level: new(r.IntN(12) - 2)}
		b, w := written(t, in, opt)
		wantLossless(t, b, w, in)
		compare(t, b, entries)
		wantVerified(t, b, entries)
		wantUpstreamTOC(t, b, in, opt)
		if len(entries) > 0 { // stargz-snapshotter mounts no layer without a root
			if err := mounted(b, entries); err != nil {
				t.Error(err)
			}
		}
	})
}
