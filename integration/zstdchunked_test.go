package integration

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"
	graphdriver "go.podman.io/storage/drivers"
	"go.podman.io/storage/pkg/chunked"
	"go.podman.io/storage/pkg/chunked/toc"
	storagetypes "go.podman.io/storage/types"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestZstdChunkedBase builds FROM a zstd:chunked image of each dialect: it's lazy, reports call it by its name, and what is exported of it is
// lazy for the next build too.
func TestZstdChunkedBase(t *testing.T) { eachDoor(t, testZstdChunkedBase) }

func testZstdChunkedBase(t *testing.T) {
	for _, format := range []baseimage.Format{baseimage.ZstdChunked, baseimage.StargzChunked} {
		t.Run(string(format), func(t *testing.T) {
			reg := startRegistry(t, registry.Options{})
			base, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), format)
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			res := build(t, d, client.Solve{
				Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/1 > /sum && cat /sum\n",
				Outputs:    []string{"type=image,push=true,registry.insecure=true,compression=zstdchunked,name=" + reg.Ref("app:1")},
			})
			wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
			rep := reportOf(t, res)
			if rep.Images[0].Lazy != 2 {
				t.Errorf("%d lazy layers, want 2", rep.Images[0].Lazy)
			}
			for _, l := range rep.Images[0].Layers {
				if l.Format != "zstd:chunked" {
					t.Errorf("layer %s is of format %q", l.Digest, l.Format)
				}
			}
			img := pull(t, reg, "app:1")
			wantBaseKept(t, img, base)
			other := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			res = build(t, other, client.Solve{Dockerfile: "FROM " + reg.Ref("app:1") + "\nRUN cat /sum\n"})
			wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
			if rep := reportOf(t, res); rep.Images[0].Lazy != 3 {
				t.Errorf("%d lazy layers of what was exported, want 3: %+v", rep.Images[0].Lazy, rep.Images[0])
			}
		})
	}
}

// wantBaseKept wants the layers of a base image in another one, with all that makes them lazy and nothing that was not there.
func wantBaseKept(t *testing.T, img, base v1.Image) {
	t.Helper()
	got, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	want, err := base.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range want.Layers {
		if got.Layers[i].Digest != l.Digest {
			t.Errorf("layer %d is %s, want %s", i, got.Layers[i].Digest, l.Digest)
		}
		for k, v := range got.Layers[i].Annotations {
			if l.Annotations[k] != v {
				t.Errorf("layer %d: annotation %s is %q, in the base image %q", i, k, v, l.Annotations[k])
			}
		}
		for k, v := range l.Annotations {
			if k != "io.containers.zstd-chunked.manifest-checksum" && got.Layers[i].Annotations[k] != v {
				t.Errorf("layer %d: annotation %s is %q, in the base image %q", i, k, got.Layers[i].Annotations[k], v)
			}
		}
	}
}

// TestZstdChunkedExport has Podman's storage library read what the exporter writes, by the table of contents, and make the tar of it that the
// DiffID is of. To stock BuildKit it's zstd.
func TestZstdChunkedExport(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	// Not all that a layer can hold: Podman fails where one has a whiteout and a file of the same name.
	push(t, reg, "base:1", busybox(t, bigLayer(t, 8<<20), layer(t, "odd",
		baseimage.Dir("s").Mode(0o1777), baseimage.File("s/setuid", "#!/bin/sh\n").Mode(0o4755).Owner(1000, 1001), baseimage.File("s/empty", ""),
		baseimage.File("s/zeros", strings.Repeat("\x00", 3<<20)+"end"), baseimage.File("s/first", "many names\n"), baseimage.Hardlink("s/second", "s/first"),
		baseimage.Symlink("s/dangling", "/does/not/exist"), baseimage.File("s/attrs", "a").Xattr("user.binary", "\x00\xff\x01"),
		baseimage.Node("s/null", 'c', 1, 3), baseimage.Node("s/fifo", 'p', 0, 0), baseimage.File("s/ümläut-日本-🎈", "2"), baseimage.Whiteout("s/gone"),
	)), baseimage.Gzip)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	for _, attrs := range []string{"", ",zstdchunked-chunk-size=64k", ",compression-level=1"} {
		tag := "app:1" + strings.NewReplacer(",", "-", "=", "-").Replace(attrs)
		build(t, d, client.Solve{
			Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN head -c 3000000 /bin/busybox > /more; head -c 500000 /dev/zero > /zeros; ln /more /link\n",
			Outputs:    []string{"type=image,push=true,registry.insecure=true,force-compression=true,compression=zstdchunked" + attrs + ",name=" + reg.Ref(tag)},
		})
		wantZstdChunked(t, pull(t, reg, tag), 0)
	}
	for _, kind := range []daemon.Kind{daemon.StockOverlay, daemon.StockStargz} {
		s := startDaemon(t, daemon.Options{Kind: kind, Config: plainHTTP(reg)})
		res := build(t, s, client.Solve{Dockerfile: "FROM " + reg.Ref("app:1") + "\nRUN sha256sum /big/1 && cmp /more /link && readlink /s/dangling\n"})
		wantContains(t, "output of "+string(kind), res.Output(), digest.FromString(noise(1, 1<<20)).Encoded(), "/does/not/exist")
	}
}

// wantZstdChunked wants the layers of an image from one on to be what Podman takes for zstd:chunked, and to be zstd with their DiffIDs to others.
func wantZstdChunked(t *testing.T, img v1.Image, from int) {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range m.Layers {
		if i < from {
			continue
		}
		if l.MediaType != types.OCILayerZStd {
			t.Errorf("layer %d: media type %s", i, l.MediaType)
		}
		blob := layerBlob(t, img, l.Digest)
		dec, err := zstd.NewReader(bytes.NewReader(blob))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(dec)
		dec.Close()
		if want := cf.RootFS.DiffIDs[i].String(); err != nil || digest.FromBytes(plain).String() != want {
			t.Errorf("layer %d: decompresses to another DiffID than %s (%v)", i, want, err)
		}
		podmanReads(t, blob, l.Annotations, cf.RootFS.DiffIDs[i].String())
	}
}

// randomEntries makes up a layer.
func randomEntries(r *rand.Rand) (entries []baseimage.Entry) {
	const odd = "abcXYZ019._-~ \\<&>\"'*é世%"
	runes := []rune(odd)
	dirs, files := []string{""}, []baseimage.Entry(nil)
	for i := range 5 + r.IntN(60) {
		name := dirs[r.IntN(len(dirs))] + strconv.Itoa(i)
		for range r.IntN(10) {
			name += string(runes[r.IntN(len(runes))])
		}
		var e baseimage.Entry
		switch kind := r.IntN(10); {
		case kind < 2:
			e = baseimage.Dir(name)
			dirs = append(dirs, name+"/")
		case kind == 2:
			e = baseimage.Symlink(name, strings.Repeat("../", r.IntN(3))+"target")
		case kind == 3:
			e = baseimage.Node(name, "cbp"[r.IntN(3)], int64(1+r.IntN(100)), int64(r.IntN(1000)))
		case kind == 4 && files != nil:
			e = files[r.IntN(len(files))]
			e.Header.Typeflag, e.Header.Linkname, e.Header.Name, e.Content = tar.TypeLink, e.Header.Name, name, ""
			entries = append(entries, e)
			continue
		case kind == 5:
			entries = append(entries, baseimage.Whiteout(name))
			continue
		default:
			e = baseimage.File(name, noise(r.Uint64(), r.IntN(200_000))+strings.Repeat("\x00", r.IntN(100_000))+strings.Repeat("text ", r.IntN(10_000)))
			if r.IntN(4) == 0 {
				e.Content = ""
			}
			if r.IntN(4) == 0 {
				e = e.Xattr("user.any", noise(r.Uint64(), 1+r.IntN(100)))
			}
		}
		e = e.Mode(int64(r.IntN(0o10000))).Owner(r.IntN(3)*1000, r.IntN(70_000))
		e.Header.ModTime = time.Unix(r.Int64N(2e9), r.Int64N(1e9))
		if entries = append(entries, e); e.Header.Typeflag == tar.TypeReg {
			files = append(files, e)
		}
	}
	return entries
}

// TestRandomLayersForOthers converts layers of any content to each format. Podman's storage library makes the very tars again of what it reads of
// zstd:chunked, and stargz-snapshotter's finds every byte of eStargz.
func TestRandomLayersForOthers(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	var im baseimage.Image
	for seed := range uint64(10) {
		im.Layers = append(im.Layers, layer(t, fmt.Sprint("random", seed), randomEntries(rand.New(rand.NewPCG(seed, 5)))...))
	}
	base, _ := push(t, reg, "random:gzip", im, baseimage.Gzip)
	cf, err := base.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	for tag, args := range map[string][]string{
		"estargz": nil, "small-estargz": {"--estargz-chunk-size=4k", "--estargz-min-chunk-size=0"},
		"zstdchunked": {"--compression=zstdchunked"}, "small-zstdchunked": {"--compression=zstdchunked", "--zstdchunked-chunk-size=4k"},
	} {
		if r := runTool(t, t.TempDir(), append(append([]string{"convert"}, args...), reg.Ref("random:gzip"), reg.Ref("random:"+tag))...); r.status != 0 {
			t.Fatalf("convert: %+v", r)
		}
		img := pull(t, reg, "random:"+tag)
		if strings.HasSuffix(tag, "estargz") {
			wantEStargz(t, img)
			continue
		}
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range m.Layers {
			podmanReads(t, layerBlob(t, img, l.Digest), l.Annotations, cf.RootFS.DiffIDs[i].String())
		}
	}
}

// podmanReads has Podman's storage library fetch a layer by its table of contents.
func podmanReads(t *testing.T, blob []byte, annotations map[string]string, diffID string) {
	t.Helper()
	if d, err := toc.GetTOCDigest(annotations); err != nil || d == nil {
		t.Errorf("Podman finds no table of contents: %v", err)
		return
	}
	dir := t.TempDir()
	store, err := storage.GetStore(storagetypes.StoreOptions{
		GraphRoot: dir + "/graph", RunRoot: dir + "/run", GraphDriverName: "overlay",
		PullOptions: map[string]string{"enable_partial_images": "true"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := store.Shutdown(true); err != nil {
			t.Error(err)
		}
	}()
	differ, err := chunked.NewDiffer(t.Context(), store, digest.FromBytes(blob), int64(len(blob)), annotations, ranges(blob))
	if err != nil {
		t.Errorf("Podman doesn't take the layer: %v", err)
		return
	}
	defer differ.Close()
	out, err := store.PrepareStagedLayer(&graphdriver.ApplyDiffWithDifferOpts{}, differ)
	if err != nil {
		t.Errorf("Podman doesn't unpack the layer: %v", err)
		return
	}
	if out.UncompressedDigest.String() != diffID {
		t.Errorf("Podman makes a tar %s of it, want %s", out.UncompressedDigest, diffID)
	}
	if err := store.CleanupStagedLayer(out); err != nil {
		t.Error(err)
	}
}

// ranges is a blob that Podman reads by range.
type ranges []byte

func (b ranges) GetBlobAt(chunks []chunked.ImageSourceChunk) (chan io.ReadCloser, chan error, error) {
	streams, errs := make(chan io.ReadCloser), make(chan error)
	go func() {
		defer close(errs) // which ends it: whoever has not got all streams by then gets no more
		defer close(streams)
		for _, c := range chunks {
			streams <- io.NopCloser(bytes.NewReader(b[c.Offset:][:c.Length]))
		}
	}()
	return streams, errs, nil
}
