package integration

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

const (
	manyLayers = 20
	manyFiles  = 30_000 // in a layer
	// residentLimit is what a daemon may have in memory, in bytes, with manyLayers of manyFiles mounted: one that has mounted nothing
	// has about 50 MB, of which 40 are its binary.
	residentLimit = 150 << 20
)

// manyFilesIn returns the name of a file of one of these layers, and what it says.
func manyFilesIn(layer, file int) (name, content string) {
	name = fmt.Sprintf("many%02d/usr/lib/python3/dist-packages/package%d/module_%d.py", layer, file/25, file)
	return name, fmt.Sprintf("module %d\n%s", file, noise(uint64(file), 100+file%1500))
}

// pushManyLayers pushes an image of busybox and manyLayers of manyFiles. They are one layer, whose files have other names in each
// one's table of contents: compressing them all would take minutes.
func pushManyLayers(t *testing.T, reg *registry.Registry, tag string) {
	t.Helper()
	var entries []baseimage.Entry
	for dir := range strings.SplitSeq("many00 many00/usr many00/usr/lib many00/usr/lib/python3 many00/usr/lib/python3/dist-packages", " ") {
		entries = append(entries, baseimage.Dir(dir))
	}
	for i := range manyFiles {
		name, content := manyFilesIn(0, i)
		if i%25 == 0 {
			entries = append(entries, baseimage.Dir(path.Dir(name)))
		}
		entries = append(entries, baseimage.File(name, content))
	}
	im := busybox(t, layer(t, "many", entries...))
	img, err := im.Build(t.Context(), baseimage.EStargz)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	blob := compressed(t, layers[1])
	start, _, err := estargz.OpenFooter(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < manyLayers; i++ {
		toc, _, err := new(estargz.GzipDecompressor).ParseTOC(bytes.NewReader(blob[start:]))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range toc.Entries {
			e.Name = strings.Replace(e.Name, "many00", fmt.Sprintf("many%02d", i), 1)
		}
		out := bytes.NewBuffer(bytes.Clone(blob[:start]))
		tocDigest, err := estargz.NewGzipCompressor().WriteTOCAndFooter(out, start, toc, nil)
		if err != nil {
			t.Fatal(err)
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(out.Bytes())), nil },
			tarball.WithMediaType(types.OCILayer))
		if err == nil {
			img, err = mutate.Append(img, mutate.Addendum{
				Layer: l, MediaType: types.OCILayer, Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: tocDigest.String()},
				History: v1.History{CreatedBy: "many", Created: v1.Time{Time: time.Unix(0, 0).UTC()}},
			})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := baseimage.Push(t.Context(), reg, tag, img); err != nil {
		t.Fatal(err)
	}
}

// TestResidentMemory mounts 20 layers of 30,000 files, reads of each, and looks at what the daemon has in memory.
func TestResidentMemory(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	pushManyLayers(t, reg, "many")
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		debug := freePort(t)
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door, Args: []string{"--debugaddr", debug}})
		idle := memoryOf(t, d)
		var read, want strings.Builder
		for i := range manyLayers {
			for _, file := range []int{0, manyFiles / 2, manyFiles - 1} {
				name, content := manyFilesIn(i, file)
				fmt.Fprintf(&read, " /%s", name)
				first, _, _ := strings.Cut(content, "\n")
				fmt.Fprintln(&want, first)
			}
		}
		res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("many") + "\nRUN head -q -n 1" + read.String() + "\n"})
		wantContains(t, "output", res.Output(), want.String())
		if rep := reportOf(t, res); rep.Images[0].Lazy != manyLayers+1 {
			t.Fatalf("%d layers are lazy, want %d", rep.Images[0].Lazy, manyLayers+1)
		}
		after := memoryOf(t, d)
		// BuildKit ends a build some seconds later.
		var settled memory
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Second) {
			if settled = memoryOf(t, d); settled.resident < residentLimit || time.Now().After(deadline) {
				break
			}
		}
		h := holds(t, d, debug)
		t.Logf("without layers %v, after the build %v, then %v; %d bytes of heap are in use", idle, after, settled, h.Heap)
		if h.Mounts < manyLayers+1 {
			t.Fatalf("%d mounts, want those of %d layers", h.Mounts, manyLayers+1)
		}
		if settled.resident >= residentLimit {
			t.Errorf("%d bytes are resident, want less than %d", settled.resident, residentLimit)
		}
	})
}

// memory is what a process has, in bytes.
type memory struct{ resident, anonymous, files, most int64 }

func (m memory) String() string {
	return fmt.Sprintf("%.1f MB (%.1f MB anonymous, %.1f MB of files, at most %.1f MB)",
		float64(m.resident)/(1<<20), float64(m.anonymous)/(1<<20), float64(m.files)/(1<<20), float64(m.most)/(1<<20))
}

func memoryOf(t *testing.T, d *daemon.Daemon) memory {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	kib := func(name string) int64 { return number(t, `(?m)^`+name+`:\s+(\d+) kB`, string(b)) << 10 }
	return memory{kib("VmRSS"), kib("RssAnon"), kib("RssFile"), kib("VmHWM")}
}
