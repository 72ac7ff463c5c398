package exporter

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"maps"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/converter"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// datedTar is a tar of a file of 2001.
func datedTar(t *testing.T, name string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: 3, ModTime: time.Unix(1e9, 0)}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("abc")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// counted counts the blobs that are read.
type counted struct {
	content.Store
	reads int
}

func (c *counted) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	c.reads++
	return c.Store.ReaderAt(ctx, desc)
}

// Layers above the base are rewritten once for each time and way to write them.
func TestRewrite(t *testing.T) {
	cs := contentStore(t)
	base, own := put(t, cs, datedTar(t, "base")), put(t, cs, datedTar(t, "own"))
	for _, d := range []*ocispecs.Descriptor{&base, &own} {
		d.Annotations = map[string]string{labels.LabelUncompressed: d.Digest.String()}
	}
	from := &counted{Store: cs}
	do := func(epoch int64, comp compression.Config, reads bool) ocispecs.Descriptor {
		t.Helper()
		from.reads = 0
		r := &rewriting{epoch: time.Unix(epoch, 0), base: []digest.Digest{base.Digest}, store: cs}
		remote := &solver.Remote{Descriptors: []ocispecs.Descriptor{base, own}, Provider: from}
		got, err := r.do(t.Context(), remote, remote.Descriptors, comp)
		if err != nil {
			t.Fatal(err)
		}
		if d := got.Descriptors[0]; d.Digest != base.Digest {
			t.Errorf("the base's layer is %s, want %s", d.Digest, base.Digest)
		}
		if remote.Descriptors[1].Digest != own.Digest {
			t.Error("the caller's descriptors have changed")
		}
		if (from.reads > 0) != reads {
			t.Errorf("%d blobs were read, want that there are any: %t", from.reads, reads)
		}
		d := got.Descriptors[1]
		if d.Digest == own.Digest || d.Annotations["buildkit/rewritten-timestamp"] != strconv.FormatInt(epoch, 10) {
			t.Errorf("rewritten: %+v", d)
		}
		return d
	}
	lazy, gzip := ours(estargz.WriteOptions{}), compression.New(compression.Gzip)
	first := do(5, lazy, true)
	rc, err := compression.EStargz.Decompress(t.Context(), cs, first)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	for tr := tar.NewReader(rc); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Unix() != 5 {
			t.Errorf("%s is of %s", h.Name, h.ModTime)
		}
	}
	if again := do(5, lazy, false); again.Digest != first.Digest || !maps.Equal(again.Annotations, first.Annotations) {
		t.Errorf("again: %+v, want %+v", again, first)
	}
	do(6, lazy, true)
	do(5, gzip, true)
	do(5, gzip.SetLevel(1), true)
	do(5, ours(estargz.WriteOptions{ChunkSize: 64 << 10}), true)
	do(5, gzip, false)
	chunked := do(5, oursChunked(zstdchunked.WriteOptions{}), true)
	if toc, _, err := zstdchunked.Find(chunked.Annotations); err != nil || toc == "" {
		t.Errorf("rewritten as zstd:chunked it has annotations %v (%v)", chunked.Annotations, err)
	}
	if again := do(5, oursChunked(zstdchunked.WriteOptions{}), false); again.Digest != chunked.Digest || !maps.Equal(again.Annotations, chunked.Annotations) {
		t.Errorf("again: %+v, want %+v", again, chunked)
	}
	do(5, oursChunked(zstdchunked.WriteOptions{ChunkSize: 64 << 10}), true)
	do(5, compression.New(compression.Zstd), true)
}

// TestRewriteForced converts all layers: those of the base, which have got other DiffIDs, keep their times, and BuildKit finds nothing left to do.
func TestRewriteForced(t *testing.T) {
	cs := contentStore(t)
	var descs []ocispecs.Descriptor
	var base []digest.Digest
	for _, name := range []string{"base", "base/2", "own"} {
		d := put(t, cs, datedTar(t, name))
		d.Annotations = map[string]string{labels.LabelUncompressed: d.Digest.String()}
		descs = append(descs, d)
		if name != "own" {
			base = append(base, d.Digest)
		}
	}
	epoch := time.Unix(5, 0)
	for name, c := range map[string]struct {
		comp  compression.Config
		stock compression.Type
	}{
		"estargz":     {ours(estargz.WriteOptions{}), compression.EStargz},
		"external":    {ours(estargz.WriteOptions{ExternalTOC: true}), compression.EStargz},
		"in order":    {inOrderOf(t, t.TempDir(), "base"), compression.EStargz},
		"zstdchunked": {oursChunked(zstdchunked.WriteOptions{}), compression.Zstd},
	} {
		t.Run(name, func(t *testing.T) {
			from := &convertedRef{cs: cs, descs: descs}
			r := &ref{ImmutableRef: from, content: cs, rewriting: &rewriting{epoch: epoch, base: base, store: cs}, stayed: &stayed{}}
			cfg := cacheconfig.RefConfig{Compression: c.comp.SetForce(true)}
			converted, err := from.GetRemotes(t.Context(), true, cfg, false, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := r.rewritten(t.Context(), converted[0], cfg, nil)
			if err != nil {
				t.Fatal(err)
			}
			for i, was := range converted[0].Descriptors {
				d := got.Descriptors[i]
				if same := d.Digest == was.Digest; same != (i < len(base)) || was.Digest == descs[i].Digest {
					t.Errorf("layer %d was %s, and is %s", i, was.Digest, d.Digest)
				}
				if i < len(base) && d.Annotations[labels.LabelUncompressed] == base[i].String() {
					continue
				}
				if f, err := converter.NewWithRewriteTimestamp(t.Context(), cs, d, compression.New(c.stock), &epoch, nil); f != nil || err != nil {
					t.Errorf("BuildKit would rewrite layer %d, %+v (%v)", i, d, err)
				}
				if was.Annotations[rewrittenAnnotation] != "" {
					t.Errorf("the caller's annotations of layer %d have changed", i)
				}
			}
		})
	}
}

// The tables of contents that are exported are those of the layers as rewritten, and BuildKit takes these for done.
func TestRewriteWithExternalTOCs(t *testing.T) {
	cs := contentStore(t)
	made, err := convert(t.Context(), cs, put(t, cs, datedTar(t, "own")), ours(estargz.WriteOptions{ExternalTOC: true}))
	if err != nil {
		t.Fatal(err)
	}
	var first ocispecs.Descriptor
	for range 2 { // the second time it's known
		comp := ours(estargz.WriteOptions{ExternalTOC: true})
		tocs := comp.Type.(*eStargz).tocs
		info, err := cs.Info(t.Context(), made.Digest)
		if err != nil {
			t.Fatal(err)
		}
		desc := *made
		if err := tocs.annotate(&desc, info); err != nil {
			t.Fatal(err)
		}
		r := &rewriting{epoch: time.Unix(5, 0), store: cs}
		remote := &solver.Remote{Descriptors: []ocispecs.Descriptor{desc}, Provider: cs}
		got, err := r.do(t.Context(), remote, remote.Descriptors, comp)
		if err != nil {
			t.Fatal(err)
		}
		d := got.Descriptors[0]
		toc := d.Annotations[stargz.TOCJSONDigestAnnotation]
		if d.Digest == desc.Digest || toc == "" || toc == desc.Annotations[stargz.TOCJSONDigestAnnotation] {
			t.Errorf("rewritten: %+v", d)
		}
		if of, ok := tocs.of[d.Digest]; !ok || of.TOC.String() != toc || len(tocs.of) != 1 {
			t.Errorf("tables of contents %+v, want that of %s", tocs.of, d.Digest)
		}
		if needs, err := compression.EStargz.NeedsConversion(t.Context(), cs, d); needs || err != nil {
			t.Errorf("BuildKit would write it once more: %t, %v", needs, err)
		}
		if first.Digest == "" {
			first = d
		}
		if d.Digest != first.Digest || !maps.Equal(d.Annotations, first.Annotations) {
			t.Errorf("again: %+v, want %+v", d, first)
		}
	}
	// A layer that another platform has as it is keeps its table.
	tocs := newTOCs()
	info, err := cs.Info(t.Context(), made.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		desc := *made
		if err := tocs.annotate(&desc, info); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []int{1, 0} {
		if tocs.drop(made.Digest); len(tocs.of) != want {
			t.Errorf("%d tables of contents, want %d", len(tocs.of), want)
		}
	}
}

// What BuildKit would log, and export as it was, is an error.
func TestRewriteFails(t *testing.T) {
	missing := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: digest.FromString("missing"), Size: 7}
	cs := contentStore(t)
	r := &rewriting{epoch: time.Unix(1, 0), store: cs}
	remote := &solver.Remote{Descriptors: []ocispecs.Descriptor{missing}, Provider: cs}
	_, err := r.do(t.Context(), remote, remote.Descriptors, ours(estargz.WriteOptions{}))
	if err == nil || !strings.Contains(err.Error(), missing.Digest.String()) {
		t.Errorf("error %v, want one that names the layer", err)
	}
}

func TestRewritings(t *testing.T) {
	type meta = map[string][]byte
	platforms := []byte(`{"Platforms":[{"ID":"linux/amd64","Platform":{"os":"linux","architecture":"amd64"}},{"ID":"linux/arm64","Platform":{"os":"linux","architecture":"arm64"}}]}`)
	config := []byte(`{"rootfs":{"type":"layers","diff_ids":["sha256:` + strings.Repeat("a", 64) + `"]}}`)
	for name, c := range map[string]struct {
		attrs map[string]string
		meta  meta
		refs  []string
		want  map[string]int64
		err   bool
	}{
		"not asked for":       {nil, meta{"source.date.epoch": []byte("5")}, nil, nil, false},
		"false":               {map[string]string{"rewrite-timestamp": "false"}, meta{"source.date.epoch": []byte("5")}, nil, nil, false},
		"nonsense":            {map[string]string{"rewrite-timestamp": "perhaps"}, nil, nil, nil, false}, // BuildKit's to refuse
		"no time":             {map[string]string{"rewrite-timestamp": "true"}, nil, nil, map[string]int64{}, false},
		"the frontend's":      {map[string]string{"rewrite-timestamp": ""}, meta{"source.date.epoch": []byte("5")}, nil, map[string]int64{"": 5}, false},
		"the exporter's":      {map[string]string{"rewrite-timestamp": "1", "source-date-epoch": "7"}, meta{"source.date.epoch": []byte("5")}, nil, map[string]int64{"": 7}, false},
		"several platforms":   {map[string]string{"rewrite-timestamp": "true"}, meta{"source.date.epoch/linux/amd64": []byte("5"), "refs.platforms": platforms}, []string{"linux/amd64", "linux/arm64"}, map[string]int64{"linux/amd64": 5}, false},
		"time is no number":   {map[string]string{"rewrite-timestamp": "true", "source-date-epoch": "noon"}, nil, nil, nil, true},
		"platforms are wrong": {map[string]string{"rewrite-timestamp": "true"}, meta{"refs.platforms": []byte("{")}, nil, nil, true},
		"base is wrong":       {map[string]string{"rewrite-timestamp": "true", "source-date-epoch": "7"}, meta{exptypes.ExporterImageBaseConfigKey: []byte("{")}, nil, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			e := &Exporter{Content: contentStore(t)}
			src := &bkexporter.Source{Metadata: meta{exptypes.ExporterImageBaseConfigKey: config}}
			maps.Copy(src.Metadata, c.meta)
			for _, id := range c.refs {
				if src.Refs == nil {
					src.Refs = map[string]cache.ImmutableRef{}
				}
				src.Refs[id] = &askedRef{}
			}
			got, err := e.rewritings(c.attrs, src)
			if (err != nil) != c.err {
				t.Fatalf("error %v", err)
			}
			times := map[string]int64{}
			for id, r := range got {
				times[id] = r.epoch.Unix()
				if len(r.base) != 1 {
					t.Errorf("%q: %d layers of the base", id, len(r.base))
				}
			}
			if c.want == nil && got != nil || !maps.Equal(times, c.want) && c.want != nil {
				t.Errorf("rewritten to %v, want %v", times, c.want)
			}
		})
	}
}
