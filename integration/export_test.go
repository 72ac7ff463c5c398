package integration

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// exportDockerfile adds two layers to a base.
func exportDockerfile(base string) string {
	return "FROM " + base + `
RUN mkdir /new && echo from the first step > /new/a && ln /new/a /new/hard && ln -s a /new/soft && head -c 300000 /dev/urandom > /new/random
RUN rm /new/hard && echo from the second step > /new/b
`
}

// TestExportImageEStargz pushes an image built on a lazy base and looks at it with others' readers.
// The base must not be downloaded in order to push.
func TestExportImageEStargz(t *testing.T) { eachDoor(t, testExportImageEStargz) }

func testExportImageEStargz(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{
		Dockerfile: exportDockerfile(reg.Ref("base:estargz")),
		Outputs:    []string{"type=image,name=" + reg.Ref("app:1") + ",push=true,compression=estargz,oci-mediatypes=true"},
	})

	// First the log: what follows reads blobs too.
	sent := reg.Log.BlobBytes()
	for i, l := range layerDigests(t, base) {
		st, err := base.LayerByDigest(hash(t, l))
		if err != nil {
			t.Fatal(err)
		}
		size, err := st.Size()
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 && sent[l] > size/10 { // the steps read nothing of it
			t.Errorf("the registry sent %d bytes of base layer %d of %d", sent[l], i, size)
		}
		if sent[l] > size { // the shell's layer is small enough to be read whole, once
			t.Errorf("the registry sent base layer %d more than once (%d of %d bytes)", i, sent[l], size)
		}
	}
	// The base is in another repository: its layers are mounted across, not uploaded.
	for _, e := range reg.Log.Entries() {
		if e.Method == http.MethodPut && strings.Contains(e.Path, "/blobs/uploads/") {
			for _, l := range layerDigests(t, base) {
				if strings.Contains(e.Path, l.Encoded()) {
					t.Errorf("base layer %s was uploaded: %s %s", l, e.Method, e.Path)
				}
			}
		}
	}

	img := pull(t, reg, "app:1")
	files := wantEStargz(t, img)
	for _, f := range []string{"new/a", "new/soft", "new/b", "bin/busybox", "big/3"} {
		wantFile(t, files, f)
	}
	got := layerDigests(t, img)
	for i, l := range layerDigests(t, base) {
		if got[i] != l {
			t.Errorf("layer %d of the pushed image is %s, not the base's %s", i, got[i], l)
		}
	}
	dgst, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if raw := string(res.Metadata["containerimage.digest"]); raw != strconv.Quote(dgst.String()) {
		t.Errorf("metadata file: containerimage.digest %s, the registry has %s", raw, dgst)
	}

	t.Run("stock builds on it", func(t *testing.T) {
		for _, kind := range []daemon.Kind{daemon.StockOverlay, daemon.StockStargz} {
			s := startDaemon(t, daemon.Options{Kind: kind, Config: plainHTTP(reg)})
			res := build(t, s, client.Solve{Dockerfile: "FROM " + reg.Ref("app:1") + "\nRUN cat /new/a /new/b && readlink /new/soft && ls /new && sha256sum /big/2\n"})
			wantContains(t, "output of "+string(kind), res.Output(), "from the first step", "from the second step", digest.FromString(noise(2, 1<<20)).Encoded())
			if strings.Contains(res.Output(), "hard") {
				t.Errorf("%s sees the deleted hardlink:\n%s", kind, res.Output())
			}
		}
	})
	t.Run("ours builds on it lazily", func(t *testing.T) {
		o := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
		res := build(t, o, client.Solve{Dockerfile: "FROM " + reg.Ref("app:1") + "\nRUN cat /new/a\n"})
		if rep := reportOf(t, res); rep.Images[0].Lazy != 4 {
			t.Errorf("%d lazy layers, want 4: %+v", rep.Images[0].Lazy, rep)
		}
	})
}

// TestExportSameRepository pushes to the repository that holds the base.
func TestExportSameRepository(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "app:base", busybox(t, bigLayer(t, 8<<20)), baseimage.EStargz)
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, d, client.Solve{
		Dockerfile: exportDockerfile(reg.Ref("app:base")),
		Outputs:    []string{"type=image,name=" + reg.Ref("app:2") + ",push=true,compression=estargz"},
	})
	if read, size := blobsRead(t, reg, base), imageSize(t, base); read > size/2 {
		t.Errorf("the registry sent %d bytes of the base's %d", read, size)
	}
	wantEStargz(t, pull(t, reg, "app:2"))
}

// TestExportForceCompression converts a gzip base.
func TestExportForceCompression(t *testing.T) { eachDoor(t, testExportForceCompression) }

func testExportForceCompression(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:gzip", busybox(t, bigLayer(t, 2<<20)), baseimage.Gzip)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	for _, level := range []string{"1", "9"} {
		tag := "forced:" + level
		build(t, d, client.Solve{
			Dockerfile: exportDockerfile(reg.Ref("base:gzip")),
			Outputs:    []string{"type=image,name=" + reg.Ref(tag) + ",push=true,compression=estargz,force-compression=true,compression-level=" + level},
		})
		wantFile(t, wantEStargz(t, pull(t, reg, tag)), "big/1")
	}
	t.Run("and back", func(t *testing.T) {
		build(t, d, client.Solve{
			Dockerfile: "FROM " + reg.Ref("forced:1") + "\nRUN echo more > /new/c\n",
			Outputs:    []string{"type=image,name=" + reg.Ref("forced:zstd") + ",push=true,compression=zstd,force-compression=true,oci-mediatypes=true"},
		})
		img := pull(t, reg, "forced:zstd")
		wantZstdDiffIDs(t, img) // validate.Image takes every layer for gzip
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range m.Layers {
			if l.MediaType != types.OCILayerZStd {
				t.Errorf("layer %d: %s", i, l.MediaType)
			}
			if v, ok := l.Annotations[estargz.TOCJSONDigestAnnotation]; ok {
				t.Errorf("layer %d is zstd and has a TOC digest annotation %s", i, v)
			}
		}
	})
}

// TestExportChunkSizes asks for chunks of other sizes, in all exporters and in caches.
func TestExportChunkSizes(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:gzip", busybox(t, bigLayer(t, 2<<20)), baseimage.Gzip)
	dockerfile := exportDockerfile(reg.Ref("base:gzip")) + "RUN mkdir /small && for i in $(seq 100); do echo file $i > /small/$i; done\n"
	// chunks counts the frames and chunks of the files of a layer.
	chunks := func(t *testing.T, l v1.Layer) (frames, chunks int) {
		t.Helper()
		blob := compressed(t, l)
		sr := io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob)))
		offset, _, err := estargz.OpenFooter(sr)
		if err != nil {
			t.Fatal(err)
		}
		toc, _, err := new(estargz.GzipDecompressor).ParseTOC(io.NewSectionReader(sr, offset, sr.Size()-offset))
		if err != nil {
			t.Fatal(err)
		}
		seen := map[int64]bool{}
		for _, e := range toc.Entries {
			if e.ChunkDigest != "" {
				seen[e.Offset] = true
				chunks++
			}
		}
		return len(seen), chunks
	}
	for _, c := range []struct {
		attrs          string
		frames, chunks int // of the last layer, 100 small files; and of the one with 300,000 random bytes
		large          int
	}{
		{"", 2, 100, 2}, // with the headers
		{",estargz-min-chunk-size=0", 100, 100, 2},
		{",estargz-chunk-size=64k,estargz-min-chunk-size=0", 100, 100, 6},
		{",estargz-chunk-size=64k,estargz-min-chunk-size=200k", 1, 100, 6},
	} {
		t.Run(c.attrs, func(t *testing.T) {
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)}) // what another export has written would be taken as it is
			build(t, d, client.Solve{
				Dockerfile: dockerfile,
				Outputs:    []string{"type=image,name=" + reg.Ref("chunks:1") + ",push=true,compression=estargz" + c.attrs},
			})
			img := pull(t, reg, "chunks:1")
			layers, err := img.Layers()
			if err != nil {
				t.Fatal(err)
			}
			if frames, chunks := chunks(t, layers[len(layers)-1]); frames != c.frames || chunks != c.chunks {
				t.Errorf("%d chunks in %d frames, want %d in %d", chunks, frames, c.chunks, c.frames)
			}
			if _, chunks := chunks(t, layers[len(layers)-3]); chunks != c.large {
				t.Errorf("%d chunks, want %d", chunks, c.large)
			}
		})
	}
	t.Run("forced", func(t *testing.T) {
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
		build(t, d, client.Solve{
			Dockerfile: dockerfile,
			Outputs:    []string{"type=image,name=" + reg.Ref("chunks:2") + ",push=true,force-compression=true,compression=estargz,estargz-chunk-size=64k,estargz-min-chunk-size=64k"},
		})
		files := wantEStargz(t, pull(t, reg, "chunks:2"))
		wantFile(t, files, "small/100")
		t.Run("stock builds on it", func(t *testing.T) {
			s := startDaemon(t, daemon.Options{Kind: daemon.StockStargz, Config: plainHTTP(reg)})
			res := build(t, s, client.Solve{Dockerfile: "FROM " + reg.Ref("chunks:2") + "\nRUN cat /small/* | sha256sum && sha256sum /big/1\n"})
			var small strings.Builder
			for _, name := range sortedNumbers(100) {
				small.WriteString("file " + name + "\n")
			}
			wantContains(t, "output of stock", res.Output(), digest.FromString(small.String()).Encoded(), digest.FromString(noise(1, 1<<20)).Encoded())
		})
	})
}

// sortedNumbers are 1 to n as a shell sorts them.
func sortedNumbers(n int) (names []string) {
	for i := range n {
		names = append(names, strconv.Itoa(i+1))
	}
	slices.Sort(names)
	return names
}

// TestExportReservedName has a layer that can't be eStargz, and can be zstd:chunked.
func TestExportReservedName(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:gzip", busybox(t), baseimage.Gzip)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	for _, name := range []string{"stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"} {
		s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:gzip") + "\nRUN echo x > /" + name + "\n"}
		archive := ",dest=" + filepath.Join(t.TempDir(), "x.tar")
		for _, to := range []string{"type=image,name=" + reg.Ref("never:1") + ",push=true", "type=oci" + archive, "type=docker" + archive} {
			s.Outputs = []string{to + ",compression=estargz"}
			wantContains(t, to+": error", buildFails(t, d, s), name, "reserved", "choose zstdchunked")
		}
		s.Outputs = []string{"type=image,name=" + reg.Ref("chunked:1") + ",push=true,compression=zstdchunked"}
		build(t, d, s)
		wantZstdOnTop(t, pull(t, reg, "chunked:1"))
	}
}

// TestExportDefault exports without a word about compression: a lazy base stays as it is,
// new layers are gzip, and no client is surprised.
func TestExportDefault(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 2<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, d, client.Solve{
		Dockerfile: exportDockerfile(reg.Ref("base:estargz")),
		Outputs:    []string{"type=image,name=" + reg.Ref("plain:1") + ",push=true"},
	})
	img := pull(t, reg, "plain:1")
	if err := validate.Image(img); err != nil {
		t.Error(err)
	}
	got := layerDigests(t, img)
	for i, l := range layerDigests(t, base) {
		if got[i] != l {
			t.Errorf("layer %d is %s, the base's is %s", i, got[i], l)
		}
	}
}

// TestStoredImageKeepsAnnotations stores an image, then pushes it from the cache by a later build.
func TestStoredImageKeepsAnnotations(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	dockerfile := exportDockerfile(reg.Ref("base:estargz"))
	build(t, d, client.Solve{Dockerfile: dockerfile, Outputs: []string{"type=image,name=" + reg.Ref("stored:1") + ",store=true,compression=estargz"}})
	build(t, d, client.Solve{Dockerfile: dockerfile, Outputs: []string{"type=image,name=" + reg.Ref("stored:1") + ",push=true,compression=estargz"}})
	wantEStargz(t, pull(t, reg, "stored:1"))
}

// TestCacheExport exports caches with eStargz layers and imports them in another daemon.
func TestCacheExport(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 2<<20)), baseimage.EStargz)
	local := t.TempDir()
	for _, c := range []struct{ name, to, from string }{
		{"registry", "type=registry,ref=" + reg.Ref("cache:1") + ",mode=max,compression=estargz,oci-mediatypes=true", "type=registry,ref=" + reg.Ref("cache:1")},
		{"local", "type=local,dest=" + local + ",mode=max,compression=estargz", "type=local,src=" + local},
	} {
		t.Run(c.name, func(t *testing.T) {
			dockerfile := exportDockerfile(reg.Ref("base:estargz"))
			first := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			build(t, first, client.Solve{Dockerfile: dockerfile, CacheTo: []string{c.to}})
			var raw []byte
			if c.name == "registry" {
				ref, err := name.ParseReference(reg.Ref("cache:1"))
				if err != nil {
					t.Fatal(err)
				}
				desc, err := remote.Get(ref, remote.WithTransport(reg.Transport()))
				if err != nil {
					t.Fatal(err)
				}
				raw = desc.Manifest
			} else {
				index, err := layout.ImageIndexFromPath(local)
				if err != nil {
					t.Fatal(err)
				}
				im, err := index.IndexManifest()
				if err != nil {
					t.Fatal(err)
				}
				raw, err = os.ReadFile(filepath.Join(local, "blobs", "sha256", im.Manifests[0].Digest.Hex))
				if err != nil {
					t.Fatal(err)
				}
			}
			wantLazyLayers(t, raw, 4)

			second := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			res := build(t, second, client.Solve{Dockerfile: dockerfile, CacheFrom: []string{c.from}})
			if run := res.Vertex("from the second step"); run == nil || !run.Cached {
				t.Errorf("the step is not cached: %+v", run)
			}
		})
	}
}

// TestSenselessAttributes asks for what cannot be had.
func TestSenselessAttributes(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	t.Cleanup(func() {
		for _, e := range reg.Log.Entries() {
			if strings.Contains(e.Path, "never") {
				t.Errorf("a request for an image that cannot be: %s %s", e.Method, e.Path)
			}
		}
	})
	for _, c := range []struct {
		attrs string
		want  []string
	}{
		{"type=image,compression=estargz,oci-mediatypes=false", []string{"compression=estargz", "oci-mediatypes=false"}},
		{"type=image,compression=estargz,compression-level=77", []string{"compression-level", "77"}},
		{"type=image,compression=estargz,estargz-chunk-size=1", []string{"estargz-chunk-size=1", "out of range"}},
		{"type=image,compression=gzip,estargz-chunk-size=1MiB", []string{"estargz-chunk-size", "compression=estargz"}},
		{"type=image,compression=estargz,estargz-chunks=1", []string{"unknown attribute", "estargz-chunks"}},
		{"type=image,compression=estargz,compression-level=fast", []string{"compression-level", "fast"}},
		{"type=image,compression=uncompressed,compression-level=3", []string{"compression-level", "uncompressed"}},
		{"type=image,compression=snappy", []string{"compression=snappy is unknown", "gzip, estargz, zstd, zstdchunked"}},
		{"type=image,compression=zstdchunked,compression-level=23", []string{"compression-level=23", "0 to 22"}},
		{"type=docker,compression=zstdchunked,zstdchunked-chunk-size=1", []string{"zstdchunked-chunk-size=1", "out of range"}},
		{"type=image,lazy-profle=x", []string{"lazy-profle"}},
		{"type=oci,compression=estargz,oci-mediatypes=false,dest=" + filepath.Join(t.TempDir(), "x.tar"), []string{"compression=estargz", "oci-mediatypes=false"}},
	} {
		t.Run(c.attrs, func(t *testing.T) {
			t.Parallel() // a client takes 5 s to see that its build was refused, of stock buildkitd too
			got := buildFails(t, d, client.Solve{
				Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN true\n",
				Outputs:    []string{c.attrs + ",name=" + reg.Ref("never:1")},
			})
			wantContains(t, "error", got, c.want...)
		})
	}
}

// TestExportStays exports what is in the cache in another format already: who didn't force it is told that it stays.
func TestExportStays(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:gzip", busybox(t), baseimage.Gzip)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:gzip") + "\nRUN echo a > /a\n", Plain: true}
	image := "type=image,name=" + reg.Ref("app:1") + ",push=true"
	const told = "stays gzip, as it is in the cache; with force-compression=true all layers are converted"
	for _, c := range []struct{ attrs, want string }{
		{"", ""},
		{",compression=estargz", "compression=estargz: a layer that this build has made " + told},
		{",compression=zstdchunked", "compression=zstdchunked: a layer that this build has made " + told},
		{",compression=estargz,force-compression=true", ""},
	} {
		s.Outputs = []string{image + c.attrs}
		res := build(t, d, s)
		if c.want != "" {
			wantContains(t, c.attrs+": progress", res.Plain, c.want)
		} else if strings.Contains(res.Plain, "stays") {
			t.Errorf("%s: progress:\n%s", c.attrs, res.Plain)
		}
	}
	// So it is with caches, also where another daemon has imported them; the layers of the base are no matter. Once a layer is there in both formats, they
	// have the one that is asked for.
	d, s.Outputs = startDaemon(t, daemon.Options{Config: plainHTTP(reg)}), nil
	cache := func(d *daemon.Daemon, ref, attrs, want string) {
		t.Helper()
		s.CacheTo = []string{"type=registry,mode=max,ref=" + reg.Ref(ref) + attrs}
		n := strings.Count(build(t, d, s).Plain, "WARN: "+want)
		if want != "" && n != 1 {
			t.Errorf("%s: %d times %q", attrs, n, want)
		} else if want == "" && n > 0 {
			t.Errorf("%s: %d warnings", attrs, n)
		}
		m, err := pull(t, reg, ref).Manifest()
		if err != nil {
			t.Fatal(err)
		}
		lazy := 0
		for _, l := range m.Layers {
			if l.Annotations[estargz.TOCJSONDigestAnnotation] != "" {
				lazy++
			}
		}
		if (want == "") != (lazy > 0) && attrs != "" {
			t.Errorf("%s: %d layers are lazy", attrs, lazy)
		}
	}
	cache(d, "cache:gzip", "", "")
	cache(d, "cache:stays", ",compression=estargz", "compression=estargz of the registry cache: a layer that this build has made "+told)
	cache(d, "cache:forced", ",compression=estargz,force-compression=true", "")
	cache(d, "cache:both", ",compression=estargz", "")
	d = startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	s.CacheFrom = []string{"type=registry,ref=" + reg.Ref("cache:gzip")}
	cache(d, "cache:imported", ",compression=zstdchunked", "compression=zstdchunked of the registry cache: a layer that this build has made "+told)
	s.CacheFrom = nil
	d = startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	cache(d, "cache:new", ",compression=estargz", "")
	d = startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	s.CacheFrom = []string{"type=registry,ref=" + reg.Ref("cache:new")}
	cache(d, "cache:again", ",compression=estargz", "")
}
