package integration

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// prioritized is a build with a layer of many files, 20 KB each, that don't shrink.
func prioritized(base string) string {
	return "FROM " + base + `
RUN mkdir -p /app/lib && for i in $(seq 10 59); do head -c 20000 /dev/urandom > /app/lib/$i; done && ln /app/lib/40 /app/link && echo x > /app/last
RUN echo unlisted > /other
`
}

// inOrder returns the names of a layer's tar, in order, without directories and the table of contents.
func inOrder(t *testing.T, img v1.Image, n int) (names []string) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(gunzip(t, layerBlob(t, img, hash(t, layerDigests(t, img)[n])))))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		if name := h.Name; h.Typeflag != tar.TypeDir && name != estargz.TOCTarName {
			names = append(names, name)
		}
	}
}

// wantFirst looks whether some files, and a landmark behind them, are in front of a layer.
func wantFirst(t *testing.T, img v1.Image, layer int, want ...string) {
	t.Helper()
	if got := inOrder(t, img, layer); !slices.Equal(got[:min(len(want), len(got))], want) {
		t.Errorf("layer %d begins with %q, want %q", layer, got[:min(len(want)+2, len(got))], want)
	}
}

// imageTo is the image exporter's output.
func imageTo(reg *registry.Registry, tag, attrs string) []string {
	return []string{"type=image,name=" + reg.Ref(tag) + ",push=true,compression=estargz" + attrs}
}

// TestPrioritize puts files first in a layer, which whoever is FROM it then prefetches, these and no others, in one request.
func TestPrioritize(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	dir := t.TempDir()
	writeFile(t, dir, "lists/first", "# what a step reads\n/app/last\n/app/link\n/app/lib/2[0-9]\n/nowhere\n")
	solve := client.Solve{Dockerfile: prioritized(reg.Ref("base:estargz")), Context: dir, Outputs: imageTo(reg, "app:1", ",lazy-prioritize=lists/first"), Plain: true}
	if res := build(t, d, solve); strings.Contains(res.Plain, "lazy-prioritize") {
		t.Errorf("there is a warning:\n%s", res.Plain)
	}
	img := pull(t, reg, "app:1")
	wantFile(t, wantEStargz(t, img), "app/lib/40")
	want := []string{"app/last", "app/lib/40", "app/link"}
	for i := range 10 {
		want = append(want, fmt.Sprint("app/lib/", 20+i))
	}
	wantFirst(t, img, 1, append(want, estargz.PrefetchLandmark, "app/lib/10")...)
	wantFirst(t, img, 2, estargz.NoPrefetchLandmark, "other")

	t.Run("prefetched", func(t *testing.T) {
		layer := layerDigests(t, img)[1]
		blob := layerBlob(t, img, hash(t, layer))
		r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
		if err != nil {
			t.Fatal(err)
		}
		first, ok := r.Lookup("app/last")
		landmark, ok2 := r.Lookup(estargz.PrefetchLandmark)
		if !ok || !ok2 {
			t.Fatal("the table of contents lacks the file, or the landmark")
		}
		o := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "\n[lazy]\nprefetch = true\nbackground-fetch = false\n"})
		reg.Log.Reset()
		build(t, o, client.Solve{Dockerfile: "FROM " + reg.Ref("app:1") + "\nRUN true\n"})
		// Asked for at once, the frames come in a few pieces, beside each other, as reads ahead do.
		var pieces [][2]int64
		complete := func() bool {
			pieces = nil
			for _, e := range reg.Log.Entries(registry.Entry.Blob) {
				var from, to int64
				if _, err := fmt.Sscanf(e.Range, "bytes=%d-%d", &from, &to); err == nil && e.Digest() == layer && to < int64(len(blob))-1 {
					pieces = append(pieces, [2]int64{from, to + 1}) // the other one is the table of contents'
				}
			}
			slices.SortFunc(pieces, func(a, b [2]int64) int { return int(a[0] - b[0]) })
			at := first.Offset
			for _, p := range pieces {
				if p[0] == at {
					at = p[1]
				}
			}
			return at == landmark.Offset
		}
		for end := time.Now().Add(60 * time.Second); !complete() && time.Now().Before(end); {
			time.Sleep(50 * time.Millisecond)
		}
		if !complete() || len(pieces) > 4 || pieces[0][0] != first.Offset || pieces[len(pieces)-1][1] != landmark.Offset {
			t.Errorf("of the layer, %v was read, want %d to %d", pieces, first.Offset, landmark.Offset)
		}
	})
	t.Run("stock reads it", func(t *testing.T) {
		s := startDaemon(t, daemon.Options{Kind: daemon.StockStargz, Config: plainHTTP(reg)})
		res := build(t, s, client.Solve{Dockerfile: "FROM " + reg.Ref("app:1") + "\nRUN cat /other /app/last && cmp /app/link /app/lib/40 && ls -A / /app/lib | wc -l\n"})
		wantContains(t, "output", res.Output(), "unlisted\nx\n")
		if strings.Contains(res.Output(), "landmark") {
			t.Errorf("the landmark is to be seen:\n%s", res.Output())
		}
	})
}

// TestPrioritizeAgain exports the same build with one list after another: what is in the cache from before doesn't matter.
func TestPrioritizeAgain(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 2<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	dir := t.TempDir()
	writeFile(t, dir, "one", "/app/lib/30\n")
	writeFile(t, dir, "two.json", `["/app/lib/31", "/big/1"]`)
	export := func(t *testing.T, tag, attrs string) v1.Image {
		t.Helper()
		build(t, d, client.Solve{Dockerfile: prioritized(reg.Ref("base:estargz")), Context: dir, Outputs: imageTo(reg, tag, attrs)})
		img := pull(t, reg, tag)
		wantEStargz(t, img)
		return img
	}
	n := len(layerDigests(t, base))
	wantBase := func(t *testing.T, img v1.Image) {
		t.Helper()
		if got := layerDigests(t, img)[:n]; !slices.Equal(got, layerDigests(t, base)) {
			t.Errorf("the base's layers are %v", got)
		}
	}
	plain := export(t, "app:plain", "")
	wantFirst(t, plain, n, "app/last")
	one := export(t, "app:one", ",lazy-prioritize=one")
	wantFirst(t, one, n, "app/lib/30", estargz.PrefetchLandmark, "app/last", "app/lib/10")
	wantBase(t, one)
	two := export(t, "app:two", ",lazy-prioritize=two.json")
	wantFirst(t, two, n, "app/lib/31", estargz.PrefetchLandmark, "app/last", "app/lib/10")
	wantBase(t, two)
	if again := export(t, "app:one", ",lazy-prioritize=/one"); !slices.Equal(layerDigests(t, again), layerDigests(t, one)) {
		t.Errorf("the first list makes %v now, it was %v", layerDigests(t, again), layerDigests(t, one))
	}
	t.Run("the base, too", func(t *testing.T) {
		img := export(t, "app:forced", ",force-compression=true,lazy-prioritize=two.json")
		wantFirst(t, img, n-1, "big/1", estargz.PrefetchLandmark)
		wantFirst(t, img, 0, estargz.NoPrefetchLandmark)
		if got := layerDigests(t, img)[n:]; !slices.Equal(got, layerDigests(t, two)[n:]) {
			t.Errorf("layers %v, want %v", got, layerDigests(t, two)[n:])
		}
	})
	t.Run("on top of it", func(t *testing.T) {
		// What was exported is a base now, although this daemon has made it.
		build(t, d, client.Solve{
			Dockerfile: "FROM " + reg.Ref("app:two") + "\nRUN echo new > /app/new && echo old > /app/old\n", Context: dir,
			Outputs: imageTo(reg, "app:three", ",lazy-prioritize=one"),
		})
		img := pull(t, reg, "app:three")
		if got := layerDigests(t, img)[:n+2]; !slices.Equal(got, layerDigests(t, two)) {
			t.Errorf("the base's layers are %v, want %v", got, layerDigests(t, two))
		}
		wantFirst(t, img, n+2, estargz.NoPrefetchLandmark, "app/new")
	})
}

// TestPrioritizeExporters has lists in all exporters of layers, from all places where they may be.
func TestPrioritizeExporters(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:gzip", busybox(t), baseimage.Gzip)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	dir := t.TempDir()
	writeFile(t, dir, "Dockerfile", prioritized(reg.Ref("base:gzip")))
	writeFile(t, dir, "first", `{"path":"app/lib/33","manifestDigest":"sha256:0","layerIndex":7}`+"\n")
	writeFile(t, dir, "nothing", "/usr/bin/absent\n")
	writeFile(t, dir, "directories", "/app/lib\n")
	writeFile(t, dir, "empty", "# nothing\n")
	writeFile(t, dir, "damaged", "{\"path\":\n")
	want := []string{"app/lib/33", estargz.PrefetchLandmark, "app/last"}
	unpack := func(t *testing.T, file string) v1.Image {
		t.Helper()
		to := t.TempDir()
		if out, err := exec.CommandContext(t.Context(), "tar", "-xf", file, "-C", to).CombinedOutput(); err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
		return onlyImage(t, to)
	}
	t.Run("oci", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "image.tar")
		build(t, d, client.Solve{Context: dir, Outputs: []string{"type=oci,compression=estargz,lazy-prioritize=first,dest=" + out}})
		wantFirst(t, unpack(t, out), 1, want...)
	})
	t.Run("docker", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "image.tar")
		build(t, d, client.Solve{Context: dir, Outputs: []string{"type=docker,name=pushed:1,compression=estargz,lazy-prioritize=first,dest=" + out}})
		wantFirst(t, unpack(t, out), 1, want...)
	})
	t.Run("buildx", func(t *testing.T) {
		res, err := buildx(t, d.Addr).Build(t.Context(), client.Solve{Context: dir, Outputs: imageTo(reg, "pushed:1", ",lazy-prioritize=first")})
		if err != nil || res.Err != "" {
			t.Fatal(err, res)
		}
		wantFirst(t, pull(t, reg, "pushed:1"), 1, want...)
	})
	t.Run("a context with a name", func(t *testing.T) {
		lists := t.TempDir()
		writeFile(t, lists, "l", "/app/lib/34\n")
		res, err := buildx(t, d.Addr).Build(t.Context(), client.Solve{
			Context: dir, Outputs: imageTo(reg, "pushed:2", ",lazy-prioritize=lists:l"), Args: []string{"--build-context=lists=" + lists},
		})
		if err != nil || res.Err != "" {
			t.Fatal(err, res)
		}
		wantFirst(t, pull(t, reg, "pushed:2"), 1, "app/lib/34", estargz.PrefetchLandmark)
	})
	t.Run("cache", func(t *testing.T) {
		build(t, d, client.Solve{Context: dir, CacheTo: []string{"type=registry,ref=" + reg.Ref("cache:1") + ",mode=max,compression=estargz,lazy-prioritize=first"}})
		fresh := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
		build(t, fresh, client.Solve{
			Context: dir, CacheFrom: []string{"type=registry,ref=" + reg.Ref("cache:1")},
			Outputs: []string{"type=image,name=" + reg.Ref("pushed:3") + ",push=true,oci-mediatypes=true"},
		})
		wantFirst(t, pull(t, reg, "pushed:3"), 1, want...)
	})
	t.Run("nothing is first", func(t *testing.T) {
		res := build(t, d, client.Solve{Context: dir, Outputs: imageTo(reg, "pushed:4", ",lazy-prioritize=nothing"), Plain: true})
		wantContains(t, "progress", res.Plain, "lazy-prioritize=nothing: no file that it names is in a layer that this build has made")
		wantFirst(t, pull(t, reg, "pushed:4"), 1, estargz.NoPrefetchLandmark, "app/last")
	})
	t.Run("only directories are first", func(t *testing.T) {
		res := build(t, d, client.Solve{Context: dir, Outputs: imageTo(reg, "pushed:6", ",lazy-prioritize=directories"), Plain: true})
		wantContains(t, "progress", res.Plain, "lazy-prioritize=directories: no file that it names is in a layer", "DIR/** is what is in it")
	})
	if err := os.Mkdir(filepath.Join(dir, "lists"), 0o755); err != nil {
		t.Fatal(err)
	}
	for value, want := range map[string]string{
		"lists":        "lazy-prioritize=lists: read it from the build context: it is a directory; name a file",
		"absent":       "lazy-prioritize=absent: there is no such file in the build context",
		"../first":     "", // the context is the root
		"lists:x":      "the client offers no local context lists",
		"context:away": "there is no such file in context context",
		"empty":        "lazy-prioritize=empty: the list of files is empty",
		"damaged":      "value 1 of its JSON",
		"/":            `lazy-prioritize="/" names no file`,
	} {
		t.Run(value, func(t *testing.T) {
			s := client.Solve{Context: dir, Outputs: imageTo(reg, "pushed:5", ",lazy-prioritize="+value)}
			if want == "" {
				build(t, d, s)
				return
			}
			wantContains(t, "error", buildFails(t, d, s), want)
		})
	}
}

// onlyImage is the image of an OCI layout.
func onlyImage(t *testing.T, dir string) v1.Image {
	t.Helper()
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}
