package integration

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

const (
	examples    = "../examples"
	dockerfiles = examples + "/dockerfiles"
)

// baker runs the bake file of examples/dockerfiles with docker buildx bake.
type baker struct {
	buildx client.Buildx
	dir    string   // copy of examples/dockerfiles; exports go to dir/out
	env    []string // variables of the bake file
}

// bake runs a group and returns the plain progress and each target's metadata.
func (b baker) bake(t *testing.T, group string, env ...string) (progress string, targets map[string]map[string]json.RawMessage) {
	t.Helper()
	bin, err := daemon.Bin(daemon.BuildxBinary)
	if err != nil {
		t.Fatal(err)
	}
	metadata := filepath.Join(t.TempDir(), "metadata.json")
	cmd := exec.CommandContext(t.Context(), bin, "bake", "--progress=plain", "--metadata-file", metadata, group)
	cmd.Dir = b.dir
	cmd.Env = append(append(append(os.Environ(), "DOCKER_CONFIG="+b.buildx.Config,
		"BUILDX_CONFIG="+filepath.Join(b.buildx.Config, "buildx"), "BUILDX_BUILDER="+b.buildx.Builder), b.env...), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("bake %s: %v\n%s", group, err, out)
	}
	raw, err := os.ReadFile(metadata)
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		t.Fatal(err)
	}
	targets = map[string]map[string]json.RawMessage{}
	for target, raw := range all {
		var m map[string]json.RawMessage
		// What is not an object, such as buildx.build.warnings, is no target.
		if json.Unmarshal(raw, &m) == nil {
			targets[target] = m
		}
	}
	return string(out), targets
}

// TestExamples bakes every Dockerfile of examples/dockerfiles, cold, warm and pushed, and runs what comes out.
func TestExamples(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	goImage, err := baseimage.Go(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	debian, err := baseimage.DebianSmall(t.Context(), cache, func(step string) { t.Log(step) })
	if err != nil {
		t.Fatal(err)
	}
	push(t, reg, "dev/go:estargz", goImage, baseimage.EStargz)
	debianImage, _ := push(t, reg, "dev/debian:estargz", debian, baseimage.EStargz)

	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	b := baker{
		buildx: client.Buildx{Config: t.TempDir(), Builder: "lazy"},
		dir:    t.TempDir(),
		env:    []string{"REGISTRY=" + reg.Host},
	}
	if err := os.CopyFS(b.dir, os.DirFS(dockerfiles)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.buildx.Run(t.Context(), "create", "--name=lazy", "--driver=remote", d.Addr); err != nil {
		t.Fatal(err)
	}

	progress, targets := b.bake(t, "cold")
	wantContains(t, "progress", progress, "mounting layer sha256:", "(estargz)")
	for target, fraction := range map[string]float64{
		// Both on the Go image, of which most is the compiler and the linker, which run.
		"go-service-cold": 0.9, "copy-tree-cold": 0.9,
		"c-static-cold": 0.6, "python-numpy-cold": 0.6,
	} {
		checkLazy(t, target, targets[target], fraction)
	}

	// Warm, and pushed this time: no step runs, and no base layer is read to be pushed back to where it came from.
	reg.Log.Reset()
	progress, targets = b.bake(t, "warm", "OUTPUT=type=image,push=true,compression=estargz,oci-mediatypes=true")
	wantContains(t, "progress of bake warm", progress, "CACHED")
	if n := blobsRead(t, reg, debianImage); n > 0 {
		t.Errorf("baking warm and pushing read %d bytes of the base", n)
	}
	ref, err := name.ParseReference(reg.Ref("examples/python-numpy:latest"))
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref, remote.WithContext(t.Context()), remote.WithTransport(reg.Transport()))
	if err != nil {
		t.Fatalf("the pushed image (metadata %v): %v", targets["python-numpy"], err)
	}
	pushed, base := layerDigests(t, img), layerDigests(t, debianImage)
	if len(pushed) <= len(base) {
		t.Fatalf("the pushed image has %d layers, its base %d", len(pushed), len(base))
	}
	for i := range base {
		if pushed[i] != base[i] {
			t.Errorf("layer %d of the pushed image is %s, want its base's %s", i, pushed[i], base[i])
		}
	}

	b.bake(t, "check")
	out := filepath.Join(b.dir, "out")
	checkQuotes(t, filepath.Join(out, "go-service", "quotes"))

	wordfreq := exec.CommandContext(t.Context(), filepath.Join(out, "c-static", "wordfreq"), "2")
	wordfreq.Stdin = strings.NewReader("one two, two; three three THREE")
	if got, err := wordfreq.Output(); err != nil || string(got) != "3 three\n2 two\n" {
		t.Errorf("wordfreq printed %q, %v", got, err)
	}
	if got, err := os.ReadFile(filepath.Join(out, "python-numpy", "predictions.txt")); err != nil || string(got) != "0 -1.0\n2 4.0\n10 24.0\n" {
		t.Errorf("predictions are %q, %v", got, err)
	}
	checkTree(t, d, reg, out)
}

// checkLazy checks that a target's report has every layer lazy or unused, and less than the fraction of all bytes fetched.
func checkLazy(t *testing.T, target string, metadata map[string]json.RawMessage, fraction float64) {
	t.Helper()
	raw, ok := metadata["lazy.report"]
	if !ok {
		t.Errorf("the metadata of %s has no lazy.report", target)
		return
	}
	var r lazyReport
	if err := json.Unmarshal(raw, &r); err != nil {
		t.Errorf("lazy.report of %s: %v", target, err)
		return
	}
	if len(r.Images) == 0 || r.Size == 0 || r.Fetched == 0 {
		t.Errorf("lazy.report of %s has no images or no bytes: %s", target, raw)
	}
	for _, im := range r.Images {
		for _, l := range im.Layers {
			if l.Mode == "eager" {
				t.Errorf("%s: layer %s of %s is eager: %s", target, l.Digest, im.Ref, l.Reason)
			}
		}
	}
	if got := float64(r.Fetched) / float64(r.Size); got > fraction {
		t.Errorf("%s fetched %d of %d bytes, %.2f, want at most %.2f", target, r.Fetched, r.Size, got, fraction)
	}
	t.Logf("%s fetched %d of %d bytes", target, r.Fetched, r.Size)
}

// checkQuotes runs the Go service and asks it for a quote.
func checkQuotes(t *testing.T, bin string) {
	t.Helper()
	addr := freePort(t)
	service := exec.CommandContext(t.Context(), bin, "-addr", addr)
	var said bytes.Buffer
	service.Stdout, service.Stderr = &said, &said
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = service.Process.Signal(os.Interrupt)
		if err := service.Wait(); err != nil {
			t.Errorf("the service ended with %v\n%s", err, &said)
		}
	}()
	var quote struct{ Text, Author string }
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			if time.Now().After(deadline) {
				t.Errorf("the service does not answer: %v\n%s", err, &said)
				return
			}
			continue
		}
		err = json.NewDecoder(resp.Body).Decode(&quote)
		resp.Body.Close()
		if err != nil || quote.Text == "" || quote.Author == "" {
			t.Errorf("the service answered %+v, %v", quote, err)
		}
		return
	}
}

// checkTree compares what copy-tree made with the toolchain that the base image was made of.
func checkTree(t *testing.T, d *daemon.Daemon, reg *registry.Registry, out string) {
	t.Helper()
	goroot, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	src := filepath.Join(strings.TrimSpace(string(goroot)), "src", "net")
	want := map[string][]byte{}
	err = filepath.WalkDir(src, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		want[rel], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	listing, err := os.ReadFile(filepath.Join(out, "copy-tree", "files.txt"))
	if err != nil {
		t.Fatal(err)
	}
	listed := strings.Fields(string(listing))
	if len(listed) != len(want) {
		t.Errorf("copy-tree listed %d files, want %d", len(listed), len(want))
	}
	for _, f := range listed {
		if _, ok := want[strings.TrimPrefix(f, "./")]; !ok {
			t.Errorf("copy-tree listed %s, which is not in %s", f, src)
		}
	}

	args := []string{"BASE=" + reg.Ref("dev/go:estargz")}
	context := filepath.Join(dockerfiles, "copy-tree")
	tree := t.TempDir()
	build(t, d, client.Solve{Context: context, Target: "tree", BuildArgs: args, Outputs: []string{"type=local,dest=" + tree}})
	for rel, content := range want {
		got, err := os.ReadFile(filepath.Join(tree, rel))
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("copied %s: %d bytes, %v, want %d", rel, len(got), err, len(content))
		}
	}

	whole := t.TempDir()
	build(t, d, client.Solve{Context: context, Target: "whole", BuildArgs: args, Outputs: []string{"type=local,dest=" + whole}})
	size, err := os.ReadFile(filepath.Join(whole, "size.txt"))
	if err != nil {
		t.Fatal(err)
	}
	// The toolchain is well over 100 MB whatever its version.
	if n, err := strconv.ParseInt(strings.TrimSpace(string(size)), 10, 64); err != nil || n < 100<<20 {
		t.Errorf("reading everything read %q bytes, %v", size, err)
	}
}
