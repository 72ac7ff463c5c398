package exporter

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

func oursChunked(opt zstdchunked.WriteOptions) compression.Config {
	comp := compression.New(compression.Zstd)
	if opt.Level != nil {
		comp = comp.SetLevel(*opt.Level)
	}
	return (&zstdChunked{Type: compression.Zstd, opt: opt}).replace(comp)
}

// What BuildKit's converter gets of us is zstd to everybody, and has its DiffID.
func TestConvertZstdChunked(t *testing.T) {
	for name, comp := range map[string]compression.Config{
		"default": oursChunked(zstdchunked.WriteOptions{}),
		"level":   oursChunked(zstdchunked.WriteOptions{Level: new(1)}),
		"chunks":  oursChunked(zstdchunked.WriteOptions{ChunkSize: 4 << 10}),
	} {
		t.Run(name, func(t *testing.T) {
			cs := contentStore(t)
			in := layerTar(t, "a", "b", "c")
			plain := put(t, cs, in)
			stock, err := convert(t.Context(), cs, plain, compression.New(compression.Zstd))
			if err != nil {
				t.Fatal(err)
			}
			if needs, err := comp.Type.NeedsConversion(t.Context(), cs, *stock); err != nil || !needs {
				t.Errorf("plain zstd passes for zstd:chunked: %t, %v", needs, err)
			}
			for _, from := range []ocispecs.Descriptor{plain, *stock} {
				desc, err := convert(t.Context(), cs, from, comp)
				if err != nil {
					t.Fatal(err)
				}
				if desc.MediaType != ocispecs.MediaTypeImageLayerZstd || desc.Annotations[labels.LabelUncompressed] != digest.FromBytes(in).String() {
					t.Errorf("%s, annotations %v", desc.MediaType, desc.Annotations)
				}
				r, err := compression.Zstd.Decompress(t.Context(), cs, *desc)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, in) {
					t.Errorf("BuildKit decompresses it to %d bytes, want %d (%v)", len(got), len(in), err)
				}
				r.Close()
				blob, err := content.ReadBlob(t.Context(), cs, *desc)
				if err != nil {
					t.Fatal(err)
				}
				toc, at, err := zstdchunked.Find(desc.Annotations)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := zstdchunked.Open(bytes.NewReader(blob), desc.Size, zstdchunked.Options{TOCDigest: toc, Position: at}); err != nil {
					t.Error(err)
				}
				if needs, err := comp.Type.NeedsConversion(t.Context(), cs, *desc); err != nil || needs {
					t.Errorf("needs conversion again: %t, %v", needs, err)
				}
			}
		})
	}
}

// What this daemon has written with other options is written again where that is forced, and what somebody else has written isn't.
func TestZstdChunkedOptions(t *testing.T) {
	cs := contentStore(t)
	plain := put(t, cs, layerTar(t, "a", "b"))
	usual, chunks := oursChunked(zstdchunked.WriteOptions{}), oursChunked(zstdchunked.WriteOptions{ChunkSize: 64 << 10})
	level := oursChunked(zstdchunked.WriteOptions{Level: new(1)})
	written := func(comp compression.Config) ocispecs.Descriptor {
		t.Helper()
		d, err := convert(t.Context(), cs, plain, comp)
		if err != nil {
			t.Fatal(err)
		}
		return *d
	}
	elsewhere := written(usual)
	elsewhere.Digest = digest.FromString("elsewhere")
	var theirs bytes.Buffer
	w, err := zstdchunked.Write(t.Context(), &theirs, bytes.NewReader(layerTar(t, "c")), zstdchunked.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pulled := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerZstd, Digest: w.Digest, Size: w.Size, Annotations: w.Annotations}
	if err := content.WriteBlob(t.Context(), cs, "pulled", &theirs, pulled); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		desc ocispecs.Descriptor
		comp compression.Config
		want bool
	}{
		"the same options":       {written(usual), usual, false},
		"the default by name":    {written(usual), oursChunked(zstdchunked.WriteOptions{Level: new(0), ChunkSize: 4 << 20}), false},
		"other chunks":           {written(usual), chunks, true},
		"chunks, the same":       {written(chunks), chunks, false},
		"another level":          {written(level), usual, true},
		"not there, and lazy":    {elsewhere, chunks, false},
		"somebody else's":        {pulled, chunks, false},
		"eStargz in its place":   {ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: plain.Digest}, usual, true},
		"is no layer":            {ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageConfig, Digest: plain.Digest}, usual, false},
		"of a type nobody knows": {ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip + "+encrypted", Digest: plain.Digest}, usual, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := c.comp.Type.NeedsConversion(t.Context(), cs, c.desc)
			if encrypted := strings.HasSuffix(c.desc.MediaType, "+encrypted"); (err != nil) != encrypted || got != c.want {
				t.Errorf("needs conversion: %t, %v; want %t", got, err, c.want)
			}
		})
	}
}

// A layer that can't have a table of contents is converted once, and not looked for in vain.
func TestConvertLossyToZstd(t *testing.T) {
	cs, comp := contentStore(t), oursChunked(zstdchunked.WriteOptions{})
	desc, err := convert(t.Context(), cs, put(t, cs, layerTar(t, "caf\xe9")), comp)
	if err != nil {
		t.Fatal(err)
	}
	if toc, _, err := zstdchunked.Find(desc.Annotations); err != nil || toc != "" {
		t.Errorf("announced as lazy: %v (%v)", desc.Annotations, err)
	}
	if needs, err := comp.Type.NeedsConversion(t.Context(), cs, *desc); err != nil || needs {
		t.Errorf("needs conversion again: %t, %v", needs, err)
	}
}

func TestZstdChunkedFails(t *testing.T) {
	comp := oursChunked(zstdchunked.WriteOptions{})
	ctx, cancel := context.WithCancelCause(t.Context())
	open, finalize := comp.Type.Compress(ctx, comp)
	if _, err := open(io.Discard, ocispecs.MediaTypeImageLayerGzip); err == nil || !strings.Contains(err.Error(), "gzip") {
		t.Errorf("a gzip layer: %v", err)
	}
	if _, err := finalize(t.Context(), contentStore(t)); err == nil {
		t.Error("finalized nothing")
	}
	in := layerTar(t, "a", "b")
	for name, dest := range map[string]io.Writer{"write fails": &full{}, "early end": io.Discard} {
		w, err := open(dest, ocispecs.MediaTypeImageLayerZstd)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(in[:120_000])
		if err := w.Close(); !errors.Is(err, errFull) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := finalize(t.Context(), contentStore(t)); err == nil {
			t.Errorf("%s: finalized", name)
		}
	}
	w, err := open(io.Discard, ocispecs.MediaTypeImageLayerZstd)
	if err != nil {
		t.Fatal(err)
	}
	cancel(errStopped)
	w.Write(in)
	if err := w.Close(); !errors.Is(err, errStopped) {
		t.Errorf("cancelled: %v", err)
	}

	// Where there's no room, another way to make the tar doesn't help, and its error would hide this one.
	open, _ = comp.Type.Compress(t.Context(), comp)
	if w, err = open(&failing{syscall.ENOSPC}, ocispecs.MediaTypeImageLayerZstd); err != nil {
		t.Fatal(err)
	}
	w.Write(in)
	if err := w.Close(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("disk full: %v", err)
	}
	if _, err := open(io.Discard, ocispecs.MediaTypeImageLayerZstd); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("disk full, again: %v", err)
	}
}

func TestZstdChunkedAttributes(t *testing.T) {
	for name, c := range map[string]struct {
		attrs  map[string]string
		layers bool
		want   string // part of the error; "" if there is none
		asked  bool
	}{
		"not asked for":     {map[string]string{"compression": "zstd"}, true, "", false},
		"asked for":         {map[string]string{"compression": "zstdchunked"}, true, "", true},
		"with chunks":       {map[string]string{"compression": "zstdchunked", "zstdchunked-chunk-size": "64k"}, true, "", true},
		"with OCI types":    {map[string]string{"compression": "zstdchunked", "oci-mediatypes": "true"}, true, "", true},
		"local files":       {map[string]string{"zstdchunked-chunk-size": "64k"}, false, "writes no layers", false},
		"unknown":           {map[string]string{"compression": "zstdchunked", "zstdchunked-min-chunk-size": "64k"}, true, "there is zstdchunked-chunk-size", false},
		"other compression": {map[string]string{"compression": "zstd", "zstdchunked-chunk-size": "64k"}, true, "choose that or leave", false},
		"no size":           {map[string]string{"compression": "zstdchunked", "zstdchunked-chunk-size": "much"}, true, "is no size", false},
		"too small":         {map[string]string{"compression": "zstdchunked", "zstdchunked-chunk-size": "1k"}, true, "out of range", false},
		"too large":         {map[string]string{"compression": "zstdchunked", "zstdchunked-chunk-size": "1g"}, true, "out of range", false},
		"Docker types":      {map[string]string{"compression": "zstdchunked", "oci-mediatypes": "false"}, true, "conflicts with oci-mediatypes", false},
		"timestamps":        {map[string]string{"compression": "zstdchunked", "rewrite-timestamp": "true"}, true, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			attrs := maps.Clone(c.attrs)
			z, err := takeZstdChunked("image exporter", c.layers, attrs)
			switch {
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error %v, want %q", err, c.want)
			case c.want == "" && (err != nil || (z != nil) != c.asked):
				t.Errorf("%v, %v", z, err)
			}
			if c.asked && (attrs["compression"] != "zstd" || attrs["zstdchunked-chunk-size"] != "") {
				t.Errorf("BuildKit is asked for %v", attrs)
			}
		})
	}
}
