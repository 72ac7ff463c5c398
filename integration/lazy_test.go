package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// lazyReport is what lazy.report in a metadata file holds.
type lazyReport struct {
	Images []struct {
		Ref     string        `json:"ref"`
		Digest  digest.Digest `json:"digest"`
		Lazy    int           `json:"lazy"`
		Size    int64         `json:"size"`
		Fetched int64         `json:"fetched"`
		Layers  []struct {
			Digest  digest.Digest `json:"digest"`
			Size    int64         `json:"size"`
			Mode    string        `json:"mode"`
			Format  string        `json:"format"`
			Reason  string        `json:"reason"`
			Fetched int64         `json:"fetched"`
		} `json:"layers"`
	} `json:"images"`
	Size        int64   `json:"size"`
	Fetched     int64   `json:"fetched"`
	WaitSeconds float64 `json:"waitSeconds"`
}

// reportOf returns the lazy.report of a build.
func reportOf(t *testing.T, res *client.Result) lazyReport {
	t.Helper()
	raw, ok := res.Metadata["lazy.report"]
	if !ok {
		t.Fatalf("the metadata file has no lazy.report: %v", keys(res.Metadata))
	}
	var rep lazyReport
	if err := json.Unmarshal(raw, &rep); err != nil {
		t.Fatalf("lazy.report is not the JSON it should be: %v\n%s", err, raw)
	}
	return rep
}

func keys(m map[string]json.RawMessage) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	return out
}

// summary finds the line under FROM.
var summary = regexp.MustCompile(`lazy (\d+) of (\d+) layers, [\d.]+ ?[kMG]?B of [\d.]+ ?[kMG]?B fetched`)

// blobsRead returns how many bytes of the image's layers were sent by the registry.
func blobsRead(t *testing.T, reg *registry.Registry, img v1.Image) int64 {
	t.Helper()
	var n int64
	sent := reg.Log.BlobBytes()
	for _, d := range layerDigests(t, img) {
		n += sent[d]
	}
	return n
}

func imageSize(t *testing.T, img v1.Image) int64 {
	t.Helper()
	n, err := baseimage.CompressedSize(img)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestLazyFROM builds on an image of which a step reads one file, and looks at it from every side:
// the step's output, the registry's log, the raw progress and the report.
func TestLazyFROM(t *testing.T) { eachDoor(t, testLazyFROM) }

func testLazyFROM(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, dgst := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 32<<20)), baseimage.EStargz)
	size := imageSize(t, img)
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	dockerfile := "FROM " + reg.Ref("base:estargz") + "\nRUN sha256sum /big/7\n"
	res := build(t, d, client.Solve{Dockerfile: dockerfile})

	wantContains(t, "output", res.Output(), digest.FromString(noise(7, 1<<20)).Encoded())
	if read := blobsRead(t, reg, img); read < 1<<20 || read > size/4 {
		t.Errorf("the registry sent %d bytes of layers of %d; the step reads 1 MiB and a shell", read, size)
	}
	layers := layerDigests(t, img)
	from := res.Vertex("[1/2] FROM")
	if from == nil {
		t.Fatal("no FROM step in the progress")
	}
	ids := strings.Join(from.StatusIDs(), "\n")
	for _, l := range layers {
		wantContains(t, "progress of FROM", ids, fmt.Sprintf("mounting layer %s (estargz)", l))
	}
	if m := summary.FindStringSubmatch(ids); m == nil || m[1] != "2" || m[2] != "2" {
		t.Errorf("no summary of 2 lazy layers of 2 in the progress of FROM:\n%s", ids)
	}

	rep := reportOf(t, res)
	if len(rep.Images) != 1 {
		t.Fatalf("lazy.report has %d images, want 1: %+v", len(rep.Images), rep)
	}
	got := rep.Images[0]
	if got.Digest != dgst || got.Lazy != 2 || len(got.Layers) != 2 || got.Size != size {
		t.Errorf("lazy.report: image %+v; want digest %s, 2 lazy layers, %d bytes", got, dgst, size)
	}
	if !strings.Contains(got.Ref, reg.Ref("base:estargz")) {
		t.Errorf("lazy.report: ref %q, want %q", got.Ref, reg.Ref("base:estargz"))
	}
	for i, l := range got.Layers {
		if l.Digest != layers[i] || l.Mode != "lazy" || l.Format != "estargz" {
			t.Errorf("lazy.report: layer %d is %+v, want a lazy one of %s", i, l, layers[i])
		}
	}
	// The filesystem fetches some in the background of the last read: the figures are not the same moment's.
	if sent := blobsRead(t, reg, img); rep.Fetched <= 1<<20 || rep.Fetched > sent+sent/10 {
		t.Errorf("lazy.report: %d bytes fetched, the registry sent %d", rep.Fetched, sent)
	}
	if rep.WaitSeconds <= 0 {
		t.Errorf("lazy.report: waited %v s for %d bytes", rep.WaitSeconds, rep.Fetched)
	}
}

// TestPlainProgress reads what a person sees with --progress=plain.
func TestPlainProgress(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	im := busybox(t, bigLayer(t, 4<<20))
	push(t, reg, "base:mixed", im, baseimage.EStargz, baseimage.Gzip)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:mixed") + "\nRUN cat /big/0 | wc -c\n", Plain: true})
	for _, re := range []string{
		`(?m)^#\d+ mounting layer sha256:[0-9a-f]{64} \(estargz\)`,
		`(?m)^#\d+ pulling layer sha256:[0-9a-f]{64} : no table of contents`,
		`(?m)^#\d+ lazy 1 of 2 layers, [\d.]+ ?[kM]?B of [\d.]+ ?MB fetched`,
	} {
		if !regexp.MustCompile(re).MatchString(res.Plain) {
			t.Errorf("plain progress has no line %s:\n%s", re, res.Plain)
		}
	}
}

// TestNothingIsFetchedForMetadata builds with steps that need the image's configuration only.
func TestNothingIsFetchedForMetadata(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 8<<20)), baseimage.EStargz)
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nENV A=1\nWORKDIR /\nCMD [\"true\"]\n"})
	if read := blobsRead(t, reg, img); read > 1<<20 {
		t.Errorf("a build without a step that reads fetched %d bytes of layers", read)
	}
}

// TestCopyFromLazyImage copies one file out of a stage that is a lazy image.
func TestCopyFromLazyImage(t *testing.T) { eachDoor(t, testCopyFromLazyImage) }

func testCopyFromLazyImage(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 32<<20)), baseimage.EStargz)
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	out := t.TempDir()
	build(t, d, client.Solve{
		Dockerfile: "FROM " + reg.Ref("base:estargz") + " AS base\nFROM scratch\nCOPY --from=base /big/3 /three\n",
		Outputs:    []string{"type=local,dest=" + out},
	})
	got, err := os.ReadFile(filepath.Join(out, "three"))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != noise(3, 1<<20) {
		t.Errorf("the copied file has %d bytes that are not those of the layer", len(got))
	}
	if read, size := blobsRead(t, reg, img), imageSize(t, img); read > size/2 {
		t.Errorf("copying 1 MiB fetched %d bytes of %d", read, size)
	}
}

// TestSecondBuildIsCached builds twice: the second fetches nothing and runs nothing.
func TestSecondBuildIsCached(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN sha256sum /big/1 && date\n"}
	build(t, d, s)
	reg.Log.Reset()
	res := build(t, d, s)
	if run := res.Vertex("sha256sum"); run == nil || !run.Cached {
		t.Errorf("the step ran again: %+v", run)
	}
	if read := blobsRead(t, reg, img); read > 0 {
		t.Errorf("the second build fetched %d bytes of layers", read)
	}
}

// TestSecondStepReadsWhatTheFirstFetched reads the same file in two steps.
func TestSecondStepReadsWhatTheFirstFetched(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 8<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	from := "FROM " + reg.Ref("base:estargz") + "\n"
	build(t, d, client.Solve{Dockerfile: from + "RUN sha256sum /big/5\n"})
	reg.Log.Reset()
	res := build(t, d, client.Solve{Dockerfile: from + "RUN echo again && sha256sum /big/5\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(5, 1<<20)).Encoded())
	if read := blobsRead(t, reg, img); read > 0 {
		t.Errorf("reading a file that has been read fetched %d bytes", read)
	}
}

// TestBackgroundFill reads little of a layer, and finds the rest there some time later.
func TestBackgroundFill(t *testing.T) { eachDoor(t, testBackgroundFill) }

func testBackgroundFill(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 8<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[lazy]\nbackground-fetch = true\n"})
	from := "FROM " + reg.Ref("base:estargz") + "\n"
	build(t, d, client.Solve{Dockerfile: from + "RUN head -c 1 /big/5\n"})
	// All but what no file is in: the ends of tars.
	size, deadline := imageSize(t, img)-64<<10, time.Now().Add(30*time.Second)
	for blobsRead(t, reg, img) < size && time.Now().Before(deadline) {
		time.Sleep(100 * time.Millisecond)
	}
	if read := blobsRead(t, reg, img); read < size || read > size*11/10 {
		t.Errorf("%d bytes of %d were fetched", read, size)
	}
	reg.Log.Reset()
	res := build(t, d, client.Solve{Dockerfile: from + "RUN sha256sum /big/3\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(3, 1<<20)).Encoded())
	if read := blobsRead(t, reg, img); read > 0 {
		t.Errorf("a file of a layer that is there: %d bytes fetched", read)
	}
}

// TestConcurrentBuilds runs builds on one cold image at the same time. Whoever comes first, no byte of a layer is fetched twice.
func TestConcurrentBuilds(t *testing.T) { eachDoor(t, testConcurrentBuilds) }

func testConcurrentBuilds(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	// Time for the builds to want the same at the same time.
	reg.Faults.Add(registry.Fault{Kind: registry.Slow, Delay: 30 * time.Millisecond})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	reg.Log.Reset()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			order := []int{9, i, 11 + i%2, 15 - i}
			files := ""
			for _, f := range order {
				files += fmt.Sprintf(" /big/%d", f)
			}
			res, err := client.Buildctl{Addr: d.Addr}.Build(t.Context(), client.Solve{Dockerfile: fmt.Sprintf("FROM %s\nRUN echo %d && sha256sum%s\n", reg.Ref("base:estargz"), i, files)})
			if err != nil || res.Err != "" {
				t.Errorf("build %d: %v %s", i, err, res.Err)
				return
			}
			for _, f := range order {
				wantContains(t, "output", res.Output(), digest.FromString(noise(uint64(f), 1<<20)).Encoded())
			}
		})
	}
	wg.Wait()
	for _, l := range layerDigests(t, img) {
		if once, again := reg.Log.Sent(l); once == 0 || again > 0 {
			t.Errorf("layer %s: %d bytes were fetched, and %d of them again", l, once, again)
		}
	}
}

// TestWritesAboveLazyLayers changes, deletes and replaces what lies in lazy layers.
func TestWritesAboveLazyLayers(t *testing.T) { eachDoor(t, testWritesAboveLazyLayers) }

func testWritesAboveLazyLayers(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base := layer(t, "base",
		baseimage.Dir("d"), baseimage.File("d/append", "one\n"), baseimage.File("d/delete", "x"), baseimage.File("d/chmod", "y"),
		baseimage.Dir("d/sub"), baseimage.File("d/sub/f", "z"), baseimage.Symlink("d/link", "append"))
	push(t, reg, "base:estargz", busybox(t, base), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	out := t.TempDir()
	build(t, d, client.Solve{
		Dockerfile: "FROM " + reg.Ref("base:estargz") + ` AS work
RUN echo two >> /d/append && rm /d/delete && chmod 750 /d/chmod && mv /d/sub /d/moved && ln -sf chmod /d/link && ls -R /d
FROM scratch
COPY --from=work /d /
`,
		Outputs: []string{"type=local,dest=" + out},
	})
	if got, err := os.ReadFile(filepath.Join(out, "append")); err != nil || string(got) != "one\ntwo\n" {
		t.Errorf("append: %q, %v", got, err)
	}
	if _, err := os.Lstat(filepath.Join(out, "delete")); err == nil {
		t.Error("the deleted file is still there")
	}
	if st, err := os.Stat(filepath.Join(out, "chmod")); err != nil || st.Mode().Perm() != 0o750 {
		t.Errorf("chmod: %v, %v", st, err)
	}
	if got, err := os.ReadFile(filepath.Join(out, "moved/f")); err != nil || string(got) != "z" {
		t.Errorf("moved/f: %q, %v", got, err)
	}
	if got, err := os.Readlink(filepath.Join(out, "link")); err != nil || got != "chmod" {
		t.Errorf("link: %q, %v", got, err)
	}
}

// TestLazyOff builds eagerly when the configuration says so.
func TestLazyOff(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[lazy]\nmount = \"off\"\n"})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN sha256sum /big/1\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
	if read, size := blobsRead(t, reg, img), imageSize(t, img); read < size {
		t.Errorf("with mount = off, %d bytes of %d were fetched", read, size)
	}
	if mounts, err := d.Mounts(); err != nil || len(mounts) > 0 {
		t.Errorf("mounts below the state directory: %q, %v", mounts, err)
	}
}

// TestRestart restarts the daemon between builds: the second works, and finds its cache.
func TestRestart(t *testing.T) { eachDoor(t, testRestart) }

func testRestart(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	root := t.TempDir()
	s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN sha256sum /big/1\n"}
	first := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Root: root})
	build(t, first, s)
	stopDaemon(t, first)
	second := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Root: root})
	build(t, second, s)
	res := build(t, second, client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN echo new && sha256sum /big/2\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(2, 1<<20)).Encoded())
}

// TestRestartAfterKill does the same after SIGKILL.
func TestRestartAfterKill(t *testing.T) { eachDoor(t, testRestartAfterKill) }

func testRestartAfterKill(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	root := t.TempDir()
	s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN sha256sum /big/1\n"}
	first := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Root: root})
	build(t, first, s)
	first.Kill()
	second := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Root: root})
	res := build(t, second, client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN echo new && sha256sum /big/2\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(2, 1<<20)).Encoded())
}
