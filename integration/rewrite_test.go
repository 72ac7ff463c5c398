package integration

import (
	"archive/tar"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// tarHeader is what a layer says about an entry, as far as every writer says the same.
type tarHeader struct {
	name, link string
	kind       byte
	mode       int64
	size       int64
	time       time.Time
	sum        digest.Digest
}

// layerHeaders are the entries of a layer, without what the format adds.
func layerHeaders(t *testing.T, img v1.Image, d v1.Hash) (headers []tarHeader) {
	t.Helper()
	l, err := img.LayerByDigest(d)
	if err != nil {
		t.Fatal(err)
	}
	rc, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	tr := tar.NewReader(rc)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return headers
		}
		if err != nil {
			t.Fatal(err)
		}
		sum, err := digest.FromReader(tr)
		if err != nil {
			t.Fatal(err)
		}
		if h.Name != estargz.TOCTarName {
			headers = append(headers, tarHeader{h.Name, h.Linkname, h.Typeflag, h.Mode, h.Size, h.ModTime.UTC(), sum})
		}
	}
}

// TestRewriteTimestamp clamps the times of new layers to SOURCE_DATE_EPOCH: their content is what it is with stock, two daemons write the same,
// and one writes it once.
func TestRewriteTimestamp(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 2<<20)), baseimage.EStargz)
	epoch := time.Unix(1_600_000_000, 0).UTC()
	s := client.Solve{
		Dockerfile: "FROM " + reg.Ref("base:estargz") + `
RUN mkdir /new && echo a > /new/a && ln /new/a /new/hard && ln -s a /new/soft && head -c 300000 /dev/zero > /new/zero && touch -t 200001010000 /new/old
RUN rm /new/hard && echo b > /new/b
`,
		BuildArgs: []string{"SOURCE_DATE_EPOCH=1600000000"},
	}
	export := func(t *testing.T, d *daemon.Daemon, tag, attrs string) v1.Image {
		t.Helper()
		s := s
		s.Outputs = []string{"type=image,name=" + reg.Ref(tag) + ",push=true,rewrite-timestamp=true" + attrs}
		build(t, d, s)
		return pull(t, reg, tag)
	}
	stock := startDaemon(t, daemon.Options{Kind: daemon.StockOverlay, Config: plainHTTP(reg)})
	opt := daemon.Options{Config: "debug = true\n" + plainHTTP(reg), Root: t.TempDir()}
	first, second := startDaemon(t, opt), startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	for name, attrs := range map[string]string{"estargz": ",compression=estargz", "gzip": ",compression=gzip", "zstdchunked": ",compression=zstdchunked"} {
		t.Run(name, func(t *testing.T) {
			theirs := export(t, stock, "stock:"+name, strings.TrimSuffix(attrs, "chunked"))
			ours := export(t, first, "ours:"+name, attrs)
			switch name {
			case "estargz":
				wantEStargz(t, ours)
			case "zstdchunked":
				wantZstdChunked(t, ours, 2)
			}
			got, want := layerDigests(t, ours), layerDigests(t, theirs)
			if len(got) != 4 || len(want) != 4 || !slices.Equal(got[:2], layerDigests(t, base)) {
				t.Fatalf("layers %v, of stock %v", got, want)
			}
			for i := 2; i < 4; i++ {
				g, w := layerHeaders(t, ours, hash(t, got[i])), layerHeaders(t, theirs, hash(t, want[i]))
				if !slices.Equal(g, w) {
					t.Errorf("layer %d: %v\nstock has %v", i, g, w)
				}
				for _, h := range g {
					if h.time.After(epoch) {
						t.Errorf("layer %d: %s is of %s", i, h.name, h.time)
					}
				}
			}
			if other := layerDigests(t, export(t, second, "second:"+name, attrs)); !slices.Equal(other, got) {
				t.Errorf("another daemon wrote %v, this one %v", other, got)
			}
			before := conversions(first)
			if again := layerDigests(t, export(t, first, "again:"+name, attrs)); !slices.Equal(again, got) {
				t.Errorf("layers %v, before there were %v", again, got)
			}
			if n := conversions(first) - before; n != 0 {
				t.Errorf("%d layers were written again", n)
			}
		})
	}
	t.Run("forced", func(t *testing.T) {
		push(t, reg, "base:gzip", busybox(t, bigLayer(t, 2<<20)), baseimage.Gzip)
		s := s
		s.Dockerfile = "FROM " + reg.Ref("base:gzip") + "\nRUN echo a > /a\n"
		layers := func(d *daemon.Daemon, tag, attrs string) []digest.Digest {
			s.Outputs = []string{"type=image,name=" + reg.Ref(tag) + ",push=true,force-compression=true,compression=" + attrs}
			build(t, d, s)
			return layerDigests(t, pull(t, reg, tag))
		}
		for _, format := range []string{"estargz", "zstdchunked"} {
			want, got := layers(first, "forced:"+format, format), layers(first, "forced:"+format+"-rewritten", format+",rewrite-timestamp=true")
			if len(got) != 3 || !slices.Equal(got[:2], want[:2]) || got[2] == want[2] {
				t.Errorf("%s: layers %v, with the times as they were %v", format, got, want)
			}
		}
	})
	t.Run("the cache keeps its own", func(t *testing.T) {
		s := s
		s.Outputs = []string{"type=image,name=" + reg.Ref("plain:1") + ",push=true,compression=estargz"}
		build(t, first, s)
		late := false
		img := pull(t, reg, "plain:1")
		for _, h := range layerHeaders(t, img, hash(t, layerDigests(t, img)[3])) {
			late = late || h.time.After(epoch)
		}
		if !late {
			t.Error("an export without rewrite-timestamp has the times of one with it")
		}
	})
	t.Run("after a restart", func(t *testing.T) {
		stopDaemon(t, first)
		first = startDaemon(t, opt)
		export(t, first, "restarted:1", ",compression=estargz")
		if n := conversions(first); n != 0 {
			t.Errorf("%d layers were written again", n)
		}
	})
}
