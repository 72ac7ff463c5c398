package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// A tool is one of the binary's commands, run by a user with a home of his own.
type tool struct {
	status         int
	stdout, stderr string
}

// toolCommand is a command of the binary, such as convert; home is where it finds credentials, and remembers.
func toolCommand(t *testing.T, home string, args ...string) *exec.Cmd {
	t.Helper()
	bin, err := daemon.Bin(daemon.OursBinary)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, args...)
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CACHE_HOME="+filepath.Join(home, "cache"), "DOCKER_CONFIG="+filepath.Join(home, "docker"))
	return cmd
}

func runTool(t *testing.T, home string, args ...string) tool {
	t.Helper()
	cmd := toolCommand(t, home, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return tool{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// homeOf returns a home with the registry's credentials.
func homeOf(t *testing.T, reg *registry.Registry) string {
	t.Helper()
	home := t.TempDir()
	dir := filepath.Join(home, "docker")
	if err := errors.Join(os.MkdirAll(dir, 0o700), reg.DockerConfig(dir)); err != nil {
		t.Fatal(err)
	}
	return home
}

// layerTraffic lists requests that read more of blobs than a configuration has, or write blobs.
func layerTraffic(reg *registry.Registry) (moved []registry.Entry) {
	return reg.Log.Entries(func(e registry.Entry) bool {
		return e.Blob() && e.Method == http.MethodGet && e.Bytes > 16<<10 || e.Method == http.MethodPatch
	})
}

// TestConvert makes a lazy image of a plain one and builds on it; a second conversion, by somebody who knows nothing of the first, moves no
// bytes of layers.
func TestConvert(t *testing.T) {
	reg := startRegistry(t, registry.Options{Auth: registry.Token, Username: "user", Password: "secret"})
	home := homeOf(t, reg)
	base, _ := push(t, reg, "team/base:plain", busybox(t, bigLayer(t, 16<<20)), baseimage.Gzip)
	src, dst := reg.Ref("team/base:plain"), reg.Ref("team/lazy:1")
	reg.Log.Reset()

	if r := runTool(t, home, "inspect", "--fail-if-eager", src); r.status != 2 {
		t.Errorf("inspect --fail-if-eager of a plain image: %+v", r)
	} else {
		wantContains(t, "inspect", r.stderr, layerDigests(t, base)[1].String(), "no table of contents")
	}
	if r := runTool(t, t.TempDir(), "convert", src, dst); r.status != 1 || len(layerTraffic(reg)) > 0 {
		t.Errorf("convert without credentials: %+v", r)
	}
	first := runTool(t, home, "convert", "--progress=plain", src, dst)
	if first.status != 0 || !strings.HasPrefix(first.stdout, dst+"@sha256:") {
		t.Fatalf("convert: %+v", first)
	}
	wantContains(t, "progress", first.stderr, "convert layer "+layerDigests(t, base)[1].String(), "DONE")
	if r := runTool(t, home, "inspect", "--fail-if-eager", dst); r.status != 0 {
		t.Errorf("inspect --fail-if-eager of a converted image: %+v", r)
	}
	wantEStargz(t, pull(t, reg, "team/lazy:1"))

	// It is lazy for builds.
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + dst + "\nRUN sha256sum /big/5\n", Plain: true, Env: []string{"DOCKER_CONFIG=" + filepath.Join(home, "docker")}})
	wantContains(t, "progress", res.Plain, digest.FromString(noise(5, 1<<20)).Encoded(), "lazy 2 of 2 layers")
	if read, size := blobsRead(t, reg, pull(t, reg, "team/lazy:1")), imageSize(t, base); read > size/2 {
		t.Errorf("reading 1 MiB fetched %d bytes of %d", read, size)
	}

	for to, args := range map[string][]string{
		dst:                    nil,
		reg.Ref("team/lazy:2"): {"--cache-from", dst},
	} {
		reg.Log.Reset()
		again := runTool(t, homeOf(t, reg), append(append([]string{"convert", "--format", "{{.Digest}}"}, args...), src, to)...)
		if again.status != 0 || !strings.HasSuffix(first.stdout, "@"+again.stdout) {
			t.Errorf("convert again to %s: %+v, want the digest of %s", to, again, first.stdout)
		}
		if moved := layerTraffic(reg); len(moved) > 0 {
			t.Errorf("convert again to %s moved bytes of layers: %+v", to, moved)
		}
	}
	// What is lazy already is mounted from where it is.
	reg.Log.Reset()
	if r := runTool(t, homeOf(t, reg), "convert", dst, reg.Ref("other:1")); r.status != 0 || !strings.HasSuffix(first.stdout, r.stdout[strings.LastIndexByte(r.stdout, '@'):]) {
		t.Errorf("convert of a converted image: %+v", r)
	}
	for _, e := range reg.Log.Entries() {
		if e.Method == http.MethodPatch {
			t.Errorf("convert of a converted image uploads: %+v", e)
		}
	}
}

// TestConvertInterrupted ends a conversion by SIGINT while its second layer is read. The next one doesn't read the first again.
func TestConvertInterrupted(t *testing.T) {
	storage := t.TempDir()
	reg := startRegistry(t, registry.Options{Dir: storage})
	base, _ := push(t, reg, "base:plain", busybox(t, bigLayer(t, 8<<20)), baseimage.Gzip)
	layers := layerDigests(t, base)
	home, src, dst := t.TempDir(), reg.Ref("base:plain"), reg.Ref("lazy:1")
	remove := reg.Faults.Add(registry.Fault{Kind: registry.Stall, Match: registry.MatchBlob(layers[1])})
	cmd := toolCommand(t, home, "convert", "--jobs=1", "--progress=plain", src, dst)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); reg.Faults.Hits() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the second layer is never read")
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the status says it
	if status := cmd.ProcessState.ExitCode(); status != 130 {
		t.Errorf("status %d, want 130: %s", status, &stderr)
	}
	wantContains(t, "stderr", stderr.String(), dst+" is not written: stopped by signal interrupt")
	remove()
	// Distribution keeps the state of a digest when it has removed the rest of an upload.
	uploads, err := filepath.Glob(filepath.Join(storage, "docker/registry/v2/repositories/lazy/_uploads/*/data"))
	if err != nil || len(uploads) > 0 {
		t.Errorf("uploads are left: %q, %v", uploads, err)
	}
	if _, err := remote.Head(reference(t, dst), remote.WithContext(t.Context())); err == nil {
		t.Error("the destination is named")
	}

	reg.Log.Reset()
	if r := runTool(t, home, "convert", src, dst); r.status != 0 {
		t.Fatalf("convert again: %+v", r)
	}
	if read := reg.Log.BlobBytes(); read[layers[0]] > 0 || read[layers[1]] == 0 {
		t.Errorf("%d bytes of the first layer were read again, and %d of the second", read[layers[0]], read[layers[1]])
	}
	wantEStargz(t, pull(t, reg, "lazy:1"))
}

func reference(t *testing.T, s string) name.Reference {
	t.Helper()
	ref, err := name.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// TestConvertIndex converts what a build for two platforms has pushed, with provenance, by way of an OCI layout.
func TestConvertIndex(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	context := t.TempDir()
	writeFile(t, context, "file", noise(1, 1<<20))
	build(t, d, client.Solve{
		Dockerfile: "FROM scratch\nCOPY file /\n", Context: context,
		Outputs: []string{"type=image,name=" + reg.Ref("app:plain") + ",push=true"},
		Args:    []string{"--opt", "platform=linux/amd64,linux/arm64", "--opt", "attest:provenance=mode=max"},
	})
	dir := t.TempDir()
	for _, step := range [][2]string{{reg.Ref("app:plain"), "oci-layout://" + dir + ":x"}, {"oci-layout://" + dir + ":x", reg.Ref("app:lazy")}} {
		if r := runTool(t, t.TempDir(), "convert", step[0], step[1]); r.status != 0 {
			t.Fatalf("convert %s %s: %+v", step[0], step[1], r)
		}
	}
	if r := runTool(t, t.TempDir(), "inspect", "--fail-if-eager", reg.Ref("app:lazy")); r.status != 0 {
		t.Errorf("inspect: %+v", r)
	} else {
		wantContains(t, "inspect", r.stdout, "linux/amd64: lazy 1 of 1 layers", "linux/arm64: lazy 1 of 1 layers")
	}
	index, err := remote.Index(reference(t, reg.Ref("app:lazy")), remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	images, about := map[string]bool{}, map[string]int{}
	for _, desc := range m.Manifests {
		if of := desc.Annotations["vnd.docker.reference.digest"]; of != "" {
			about[of]++
			wantStatement(t, index, desc.Digest)
		} else {
			images[desc.Digest.String()] = true
			img, err := index.Image(desc.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if err := validate.Image(img); err != nil {
				t.Errorf("go-containerregistry's validation: %v", err)
			}
		}
	}
	for of := range about {
		if !images[of] {
			t.Errorf("an attestation is about %s, which isn't in the index", of)
		}
	}
	if len(images) != 2 || len(about) != 2 {
		t.Errorf("%d images, and attestations of %d; want 2 and 2", len(images), len(about))
	}
}

// wantStatement fails the test if a manifest has no provenance.
func wantStatement(t *testing.T, index v1.ImageIndex, d v1.Hash) {
	t.Helper()
	img, err := index.Image(d)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	h, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	var statement struct{ PredicateType string }
	if err := json.Unmarshal(layerBlob(t, img, h), &statement); err != nil || !strings.HasPrefix(statement.PredicateType, "https://slsa.dev/provenance/") {
		t.Errorf("statement of type %q, %v", statement.PredicateType, err)
	}
}

// TestConvertDiskFull converts into a layout on a disk without room: nothing refers to what was written, and nothing else of it is left.
func TestConvertDiskFull(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:plain", busybox(t, bigLayer(t, 8<<20)), baseimage.Gzip)
	dir := t.TempDir()
	mountTmpfs(t, dir, 0, "size=4m")
	r := runTool(t, t.TempDir(), "convert", "--progress=quiet", reg.Ref("base:plain"), "oci-layout://"+dir+":x")
	if r.status != 1 {
		t.Errorf("%+v", r)
	}
	wantContains(t, "stderr", r.stderr, "no space left on device; make room and convert it again")
	for _, left := range []string{"index.json", "ingest"} {
		if _, err := os.Stat(filepath.Join(dir, left)); err == nil {
			t.Errorf("%s is left", left)
		}
	}
}

// TestConvertPrioritize puts the files of a list first, and says so if there are none.
func TestConvertPrioritize(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	home := t.TempDir()
	push(t, reg, "base:plain", busybox(t, bigLayer(t, 4<<20)), baseimage.Gzip)
	src, dst := reg.Ref("base:plain"), reg.Ref("lazy:1")
	list := writeFile(t, t.TempDir(), "list", "# what is read first\n/big/2\n/big/1\n")
	if r := runTool(t, home, "convert", "--lazy-prioritize", list, src, dst); r.status != 0 || strings.Contains(r.stderr, "lazy-prioritize") {
		t.Fatalf("convert: %+v", r)
	}
	img := pull(t, reg, "lazy:1")
	wantEStargz(t, img)
	wantFirst(t, img, 0, ".no.prefetch.landmark")
	wantFirst(t, img, 1, "big/2", "big/1", ".prefetch.landmark", "big/0")

	none := writeFile(t, t.TempDir(), "none", `["/not/there"]`)
	for name, c := range map[string]struct {
		args   []string
		status int
		says   string
	}{
		"nothing first":   {[]string{"--lazy-prioritize", none, src, reg.Ref("lazy:2")}, 0, "none of its paths is in a layer that was converted"},
		"all lazy":        {[]string{"--lazy-prioritize", list, dst, reg.Ref("lazy:3")}, 0, "those that are lazy already stay as they are"},
		"no such file":    {[]string{"--lazy-prioritize", none + "s", src, reg.Ref("lazy:4")}, 1, none + "s: no such file"},
		"empty":           {[]string{"--lazy-prioritize", writeFile(t, t.TempDir(), "empty", "#\n"), src, reg.Ref("lazy:4")}, 1, "the list of files is empty"},
		"for zstdchunked": {[]string{"--compression", "zstdchunked", "--lazy-prioritize", list, src, reg.Ref("lazy:4")}, 1, "is for --compression=estargz only"},
	} {
		if r := runTool(t, home, append([]string{"convert"}, c.args...)...); r.status != c.status || !strings.Contains(r.stderr, c.says) {
			t.Errorf("%s: %+v, want status %d and %q", name, r, c.status, c.says)
		}
	}
}
