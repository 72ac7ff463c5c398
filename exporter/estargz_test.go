package exporter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/plugins/content/local"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/cache/remotecache"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/converter"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// layerTar is a tar of a few files, some of them larger than a chunk.
func layerTar(t *testing.T, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	r := rand.New(rand.NewPCG(1, 2))
	for i, name := range names {
		p := make([]byte, 100_000*(i+1))
		for j := range p {
			p[j] = byte(r.UintN(16))
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(p))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// labelStore keeps the labels of a content store.
type labelStore struct {
	mu     sync.Mutex
	labels map[digest.Digest]map[string]string
}

func (s *labelStore) Get(d digest.Digest) (map[string]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.labels[d]), nil
}

func (s *labelStore) Set(d digest.Digest, l map[string]string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.labels[d] = maps.Clone(l)
	return nil
}

func (s *labelStore) Update(d digest.Digest, l map[string]string) (map[string]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.labels[d] == nil {
		s.labels[d] = map[string]string{}
	}
	maps.Copy(s.labels[d], l)
	return maps.Clone(s.labels[d]), nil
}

func contentStore(t *testing.T) content.Store {
	t.Helper()
	s, err := local.NewLabeledStore(t.TempDir(), &labelStore{labels: map[digest.Digest]map[string]string{}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// put stores an uncompressed layer.
func put(t *testing.T, cs content.Store, tar []byte) ocispecs.Descriptor {
	t.Helper()
	desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer, Digest: digest.FromBytes(tar), Size: int64(len(tar))}
	if err := content.WriteBlob(t.Context(), cs, desc.Digest.String(), bytes.NewReader(tar), desc); err != nil {
		t.Fatal(err)
	}
	return desc
}

// convert converts a layer as BuildKit does when compression is forced.
func convert(ctx context.Context, cs content.Store, desc ocispecs.Descriptor, comp compression.Config) (*ocispecs.Descriptor, error) {
	f, err := converter.New(ctx, cs, desc, comp)
	if err != nil {
		return nil, err
	}
	if f == nil {
		return &desc, nil
	}
	return f(ctx, cs, desc)
}

func ours(opt estargz.WriteOptions) compression.Config {
	return newEStargz(opt).replace(compression.New(compression.EStargz))
}

// What BuildKit's converter gets of us has the annotations and labels that its own writer's has.
func TestConvert(t *testing.T) {
	for name, comp := range map[string]compression.Config{
		"default": ours(estargz.WriteOptions{}),
		"level":   newEStargz(estargz.WriteOptions{}).replace(compression.New(compression.EStargz).SetLevel(1)),
		"chunks":  ours(estargz.WriteOptions{ChunkSize: 4 << 10, MinChunkSize: 1}),
	} {
		t.Run(name, func(t *testing.T) {
			cs := contentStore(t)
			in := layerTar(t, "a", "b", "c")
			plain := put(t, cs, in)
			desc, err := convert(t.Context(), cs, plain, comp)
			if err != nil {
				t.Fatal(err)
			}
			stock, err := convert(t.Context(), cs, plain, compression.New(compression.EStargz))
			if err != nil {
				t.Fatal(err)
			}
			if desc.MediaType != stock.MediaType {
				t.Errorf("media type %s, want %s", desc.MediaType, stock.MediaType)
			}
			for key := range stock.Annotations {
				if desc.Annotations[key] == "" {
					t.Errorf("no annotation %s: %v", key, desc.Annotations)
				}
			}
			blob, err := content.ReadBlob(t.Context(), cs, *desc)
			if err != nil {
				t.Fatal(err)
			}
			r, err := compression.EStargz.Decompress(t.Context(), cs, *desc)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, in) {
				t.Errorf("BuildKit decompresses it to %d bytes, want %d (%v)", len(got), len(in), err)
			}
			toc := digest.Digest(desc.Annotations[stargz.TOCJSONDigestAnnotation])
			opened, err := stargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := opened.VerifyTOC(toc); err != nil {
				t.Error(err)
			}
			info, err := cs.Info(t.Context(), desc.Digest)
			if err != nil {
				t.Fatal(err)
			}
			diffID := desc.Annotations[labels.LabelUncompressed]
			if info.Labels[labels.LabelUncompressed] != diffID || diffID == digest.FromBytes(in).String() {
				t.Errorf("labelled %v, annotated %s", info.Labels, diffID)
			}
			if needs, err := comp.Type.NeedsConversion(t.Context(), cs, *desc); err != nil || needs {
				t.Errorf("needs conversion again: %t, %v", needs, err)
			}
		})
	}
}

func TestConvertLossy(t *testing.T) {
	cs := contentStore(t)
	desc, err := convert(t.Context(), cs, put(t, cs, layerTar(t, "caf\xe9")), ours(estargz.WriteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	if toc, ok := desc.Annotations[stargz.TOCJSONDigestAnnotation]; ok {
		t.Errorf("announced as lazy, by %s", toc)
	}
	if desc.Annotations[labels.LabelUncompressed] == "" {
		t.Errorf("annotations %v", desc.Annotations)
	}
}

// A layer that can't have a table of contents is gzip'ed once, and not looked for in vain.
func TestConvertSparse(t *testing.T) {
	for name, in := range layertest.Sparse(t) {
		cs, comp := contentStore(t), ours(estargz.WriteOptions{})
		desc, err := convert(t.Context(), cs, put(t, cs, in), comp)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if toc, ok := desc.Annotations[stargz.TOCJSONDigestAnnotation]; ok || desc.Annotations[labels.LabelUncompressed] != digest.FromBytes(in).String() {
			t.Errorf("%s: announced as lazy, by %s, or it's another tar: %v", name, toc, desc.Annotations)
		}
		if needs, err := comp.Type.NeedsConversion(t.Context(), cs, *desc); err != nil || needs {
			t.Errorf("%s: needs conversion again: %t, %v", name, needs, err)
		}
		if needs, err := ours(estargz.WriteOptions{MinChunkSize: 1}).Type.NeedsConversion(t.Context(), cs, *desc); err != nil || !needs {
			t.Errorf("%s: with other options it needs conversion: %t, %v", name, needs, err)
		}
		if needs, err := compression.Gzip.NeedsConversion(t.Context(), cs, *desc); err != nil || needs {
			t.Errorf("%s: it isn't gzip: %t, %v", name, needs, err)
		}
	}
}

// full is a disk that fills up.
type full struct{ left int }

var errFull = errors.New("no space left on device")

func (f *full) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestWriteFails(t *testing.T) {
	before := runtime.NumGoroutine()
	in := layerTar(t, "a", "b", "c", "d", "e", "f", "g", "h")
	for name, c := range map[string]struct {
		dest  io.Writer
		tar   []byte
		stop  bool
		want  error
		again bool // whether another attempt is of any use
	}{
		"disk full at once": {&full{}, in, false, errFull, true},
		"disk full":         {&full{200_000}, in, false, errFull, true},
		"no space left":     {&failing{&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}}, in, false, syscall.ENOSPC, false},
		"quota exceeded":    {&failing{syscall.EDQUOT}, in, false, syscall.EDQUOT, false},
		"cancelled":         {io.Discard, in, true, errStopped, true},
		"tar ends early":    {io.Discard, in[:50_000], false, io.ErrUnexpectedEOF, true},
		"reserved name":     {io.Discard, layerTar(t, "a", "stargz.index.json", "b"), false, estargz.ErrReserved, false},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			comp := ours(estargz.WriteOptions{})
			open, finalize := comp.Type.Compress(ctx, comp)
			w, err := open(c.dest, ocispecs.MediaTypeImageLayerGzip)
			if err != nil {
				t.Fatal(err)
			}
			half := len(c.tar) / 2
			_, werr := w.Write(c.tar[:half])
			if c.stop {
				cancel(errStopped)
			}
			if werr == nil {
				_, werr = w.Write(c.tar[half:])
			}
			if err := w.Close(); !errors.Is(err, c.want) {
				t.Errorf("Close: %v, want %v", err, c.want)
			}
			if werr != nil && !errors.Is(werr, c.want) {
				t.Errorf("Write: %v, want %v", werr, c.want)
			}
			if _, err := finalize(t.Context(), contentStore(t)); !errors.Is(err, c.want) {
				t.Errorf("finalize: %v, want %v", err, c.want)
			}
			again, err := open(io.Discard, ocispecs.MediaTypeImageLayerGzip)
			if (err == nil) != c.again {
				t.Errorf("again: %v", err)
			}
			if err == nil {
				again.Close()
			}
		})
	}
	for range 1000 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines, before there were %d", runtime.NumGoroutine(), before)
}

// failing is a writer to which nothing can be written.
type failing struct{ err error }

func (w *failing) Write([]byte) (int, error) { return 0, w.err }

var errStopped = errors.New("stopped")

func TestOpenRefuses(t *testing.T) {
	comp := ours(estargz.WriteOptions{})
	open, finalize := comp.Type.Compress(t.Context(), comp)
	if _, err := open(io.Discard, ocispecs.MediaTypeImageLayerZstd); err == nil || !strings.Contains(err.Error(), "zstd") {
		t.Errorf("a zstd layer: %v", err)
	}
	if _, err := finalize(t.Context(), contentStore(t)); err == nil {
		t.Error("finalized nothing")
	}
}

// A failed attempt doesn't spoil the next.
func TestSecondAttempt(t *testing.T) {
	cs := contentStore(t)
	comp := ours(estargz.WriteOptions{})
	open, finalize := comp.Type.Compress(t.Context(), comp)
	in := layerTar(t, "a", "b")
	w, err := open(io.Discard, ocispecs.MediaTypeImageLayerGzip)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(in[:1000])
	if err := w.Close(); err == nil {
		t.Error("a part of a tar is a layer")
	}
	var b bytes.Buffer
	if w, err = open(&b, ocispecs.MediaTypeImageLayerGzip); err != nil {
		t.Fatal(err)
	}
	w.Write(in)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	desc := ocispecs.Descriptor{Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}
	if err := content.WriteBlob(t.Context(), cs, "x", &b, desc); err != nil {
		t.Fatal(err)
	}
	if a, err := finalize(t.Context(), cs); err != nil || a[stargz.TOCJSONDigestAnnotation] == "" {
		t.Errorf("%v, %v", a, err)
	}
}

// askedRef keeps what compression it was asked for.
type askedRef struct {
	cache.ImmutableRef
	asked compression.Type
}

func (r *askedRef) GetRemotes(_ context.Context, _ bool, cfg cacheconfig.RefConfig, _ bool, _ session.Group) ([]*solver.Remote, error) {
	r.asked = cfg.Compression.Type
	return nil, nil
}

func (r *askedRef) Clone() cache.ImmutableRef { return r }

// asking is an exporter that asks its refs for layers.
type asking struct {
	bkexporter.ExporterInstance
	comp compression.Config
}

func (a *asking) Resolve(context.Context, int, map[string]string) (bkexporter.ExporterInstance, error) {
	return a, nil
}

func (a *asking) Config() *bkexporter.Config { return bkexporter.NewConfigWithCompression(a.comp) }

func (a *asking) Export(ctx context.Context, src *bkexporter.Source, _ bkexporter.ExportBuildInfo) (map[string]string, bkexporter.FinalizeFunc, bkexporter.DescriptorReference, error) {
	return nil, nil, nil, src.EachRef(func(r cache.ImmutableRef) error {
		_, err := r.Clone().GetRemotes(ctx, true, cacheconfig.RefConfig{Compression: a.comp}, false, nil)
		return err
	})
}

// Every exporter of layers has them written by us, when it writes eStargz.
func TestExport(t *testing.T) {
	for _, c := range []struct {
		kind string
		comp compression.Type
	}{
		{"image", compression.EStargz}, {"oci", compression.EStargz}, {"docker", compression.EStargz},
		{"image", compression.Gzip}, {"oci", compression.Zstd},
	} {
		t.Run(fmt.Sprint(c.kind, " ", c.comp), func(t *testing.T) {
			inst, err := New(c.kind, &asking{comp: compression.New(c.comp)}).Resolve(t.Context(), 0, map[string]string{"compression": c.comp.String()})
			if err != nil {
				t.Fatal(err)
			}
			one, two := &askedRef{}, &askedRef{}
			src := &bkexporter.Source{Ref: one, Refs: map[string]cache.ImmutableRef{"p": two, "scratch": nil}}
			if _, _, _, err := inst.Export(t.Context(), src, bkexporter.ExportBuildInfo{}); err != nil {
				t.Fatal(err)
			}
			for _, got := range []compression.Type{one.asked, two.asked, inst.Config().Compression().Type} {
				if _, ok := got.(*eStargz); ok != (c.comp == compression.EStargz) {
					t.Errorf("asked for %T", got)
				}
				if got.String() != c.comp.String() {
					t.Errorf("it's called %s", got)
				}
			}
			if src.Ref != cache.ImmutableRef(one) {
				t.Error("the caller's refs have changed")
			}
		})
	}
}

// cacheTo is an exporter of caches that knows its configuration.
type cacheTo struct {
	remotecache.Exporter
	comp compression.Config
}

func (c *cacheTo) Config() remotecache.Config { return remotecache.Config{Compression: c.comp} }

func TestCache(t *testing.T) {
	resolve := func(_ context.Context, _ session.Group, attrs map[string]string) (remotecache.Exporter, error) {
		comp, err := compression.ParseAttributes(attrs)
		return &cacheTo{comp: comp}, err
	}
	for name, c := range map[string]struct {
		attrs map[string]string
		ours  bool
		err   string
	}{
		"nothing":           {nil, false, ""},
		"zstd":              {map[string]string{"compression": "zstd", "compression-level": "99"}, false, ""},
		"estargz":           {map[string]string{"compression": "estargz", "estargz-chunk-size": "1MiB"}, true, ""},
		"unknown attribute": {map[string]string{"compression": "estargz", "estargz-chunks": "1"}, false, `unknown attribute "estargz-chunks" of the local cache exporter`},
		"external TOC":      {map[string]string{"compression": "estargz", "estargz-external-toc": "true"}, false, "for the image exporter only"},
		"list without name": {map[string]string{"compression": "estargz", "lazy-prioritize": "/"}, false, "names no file"},
		"list for zstd":     {map[string]string{"compression": "zstd", "lazy-prioritize": "list"}, false, "lazy-prioritize=list is for compression=estargz only"},
		"unknown option":    {map[string]string{"lazy-x": "1"}, false, `"lazy-x"`},
		"for estargz only":  {map[string]string{"estargz-chunk-size": "1MiB"}, false, "compression=estargz only"},
		"bad level":         {map[string]string{"compression": "estargz", "compression-level": "10"}, false, "estargz has levels -2 to 9"},
		"bad compression":   {map[string]string{"compression": "lzma"}, false, "compression=lzma is unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := Cache("local", resolve, nil, nil)(t.Context(), nil, c.attrs)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := e.Config().Compression.Type.(*eStargz); ok != c.ours {
				t.Errorf("compression %T", e.Config().Compression.Type)
			}
		})
	}
}

func TestWriteOptions(t *testing.T) {
	for attr, want := range map[string]estargz.WriteOptions{
		"":                            {},
		"estargz-chunk-size=65536":    {ChunkSize: 65536},
		"estargz-chunk-size=4k":       {ChunkSize: 4096},
		"estargz-chunk-size=64MiB":    {ChunkSize: 64 << 20},
		"estargz-min-chunk-size=0":    {MinChunkSize: 1},
		"estargz-min-chunk-size=256k": {MinChunkSize: 256 << 10},
	} {
		key, value, given := strings.Cut(attr, "=")
		attrs := map[string]string{"compression": "estargz"}
		if given {
			attrs[key] = value
		}
		if got, err := writeOptions(attrs); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", attr, got, err, want)
		}
	}
}

// What this daemon has written with other options is written again where that is forced, and what is lazy is left where it is.
func TestNeedsConversion(t *testing.T) {
	cs := contentStore(t)
	plain := put(t, cs, layerTar(t, "a", "b"))
	level1 := newEStargz(estargz.WriteOptions{}).replace(compression.New(compression.EStargz).SetLevel(1))
	usual := ours(estargz.WriteOptions{})
	explicit := newEStargz(estargz.WriteOptions{}).replace(compression.New(compression.EStargz).SetLevel(-1))
	chunks := ours(estargz.WriteOptions{ChunkSize: 64 << 10})
	written := func(comp compression.Config) ocispecs.Descriptor {
		t.Helper()
		d, err := convert(t.Context(), cs, plain, comp)
		if err != nil {
			t.Fatal(err)
		}
		return *d
	}
	theirs := written(compression.New(compression.EStargz))
	lazy := ocispecs.Descriptor{
		MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: digest.FromString("elsewhere"),
		Annotations: map[string]string{stargz.TOCJSONDigestAnnotation: digest.FromString("toc").String()},
	}
	gzip, chunked := lazy, lazy
	gzip.Annotations, chunked.MediaType = nil, ocispecs.MediaTypeImageLayerZstd
	for name, c := range map[string]struct {
		desc ocispecs.Descriptor
		comp compression.Config
		want bool
	}{
		"a tar":                {plain, usual, true},
		"the same options":     {written(usual), usual, false},
		"the default by name":  {written(usual), explicit, false},
		"another level":        {written(level1), usual, true},
		"other chunks":         {written(usual), chunks, true},
		"chunks, the same":     {written(chunks), chunks, false},
		"somebody else's":      {theirs, chunks, false},
		"lazy":                 {lazy, chunks, false},
		"lazy zstd:chunked":    {chunked, chunks, true},
		"not there, not lazy":  {gzip, usual, true},
		"not there, no digest": {ocispecs.Descriptor{MediaType: gzip.MediaType, Digest: gzip.Digest, Annotations: map[string]string{stargz.TOCJSONDigestAnnotation: "x"}}, usual, true},
		"is no layer":          {ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageConfig, Digest: plain.Digest}, usual, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := c.comp.Type.NeedsConversion(t.Context(), cs, c.desc); err != nil || got != c.want {
				t.Errorf("needs conversion: %t, %v; want %t", got, err, c.want)
			}
		})
	}
	for suffix, want := range map[string]string{"gzip+encrypted": "it is encrypted", "lz4": "unsupported media type"} {
		for _, comp := range []compression.Config{usual, oursChunked(zstdchunked.WriteOptions{})} {
			desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer + "+" + suffix, Digest: plain.Digest}
			_, err := comp.Type.NeedsConversion(t.Context(), cs, desc)
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "layer "+plain.Digest.String()) {
				t.Errorf("%s to %s: error %v, want %q of layer %s", desc.MediaType, comp.Type, err, want, plain.Digest)
			}
		}
	}
}
