package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/inspect"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

// putImages adds an image without layers that could be eager, base:lazy, and one that has one, base:eager.
func putImages(t *testing.T, reg *repositorytest.Registry) (eager ocispecs.Descriptor) {
	t.Helper()
	var blob bytes.Buffer
	made, err := estargz.Write(t.Context(), &blob, bytes.NewReader(make([]byte, 1024)), estargz.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eager = ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: reg.PutBlob("base", blob.Bytes()), Size: made.Size}
	lazy := eager
	lazy.Annotations = map[string]string{"containerd.io/snapshot/stargz/toc.digest": made.TOCDigest.String()}
	for tag, layer := range map[string]ocispecs.Descriptor{"lazy": lazy, "eager": eager} {
		config := []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + made.DiffID.String() + `"]}}`)
		reg.PutManifest("base", tag, ocispecs.MediaTypeImageManifest, ocispecs.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, Layers: []ocispecs.Descriptor{layer},
			Config: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageConfig, Digest: reg.PutBlob("base", config), Size: int64(len(config))},
		})
	}
	return eager
}

func TestInspect(t *testing.T) {
	reg := repositorytest.New(t)
	layer := putImages(t, reg)
	inspected := func(args ...string) outcome {
		t.Helper()
		return runDaemon(t, daemonCommand(t, nil, append([]string{"inspect"}, args...)...))
	}
	if o := inspected("--fail-if-eager", reg.Host+"/base:lazy"); o.status != 0 || !strings.Contains(o.stdout, "linux/amd64: lazy 1 of 1 layers") || o.stderr != "" {
		t.Errorf("of a lazy image: %+v", o)
	} else if lines := strings.Split(strings.TrimSpace(o.stdout), "\n"); strings.Join(strings.Fields(lines[4]), " ") != "LAYER FORMAT SIZE TOC ENTRIES CHUNKS LANDMARK LAZY" ||
		!slices.Equal(slices.Delete(strings.Fields(lines[5]), 2, 6), []string{layer.Digest.String(), "estargz", "0", "0", "none", "yes"}) {
		t.Errorf("of a lazy image: %q", lines)
	}
	o := inspected("--fail-if-eager", reg.Host+"/base:eager")
	if o.status != 2 || !strings.Contains(o.stdout, "no: no table of contents") ||
		!strings.Contains(o.lastLine(), "a layer isn't lazy: "+layer.Digest.String()+" of linux/amd64: no table of contents") {
		t.Errorf("of an eager image: %+v", o)
	}
	o = inspected("--format", "json", "--platform", "linux/amd64", reg.Host+"/base:eager")
	var report inspect.Report
	if err := json.Unmarshal([]byte(o.stdout), &report); err != nil || o.status != 0 || report.Images[0].Layers[0].Digest != layer.Digest {
		t.Errorf("as JSON: %+v, %v", o, err)
	}
	if o = inspected("--format", "{{(index .Images 0).Lazy}}", reg.Host+"/base:eager"); o.status != 0 || o.stdout != "0\n" {
		t.Errorf("by a template: %+v", o)
	}
	if o = inspected(reg.Host + "/base:gone"); o.status != 1 || !strings.Contains(o.lastLine(), "base:gone: not found") {
		t.Errorf("of nothing: %+v", o)
	}
}

// Credentials are docker's, also those that a helper keeps.
func TestInspectCredentials(t *testing.T) {
	reg := repositorytest.New(t)
	reg.Token = "t0ken"
	putImages(t, reg)
	helpers, home := t.TempDir(), t.TempDir()
	script := "#!/bin/sh\nread host\necho '{\"ServerURL\":\"'$host'\",\"Username\":\"user\",\"Secret\":\"secret\"}'\n"
	if err := os.WriteFile(filepath.Join(helpers, "docker-credential-test"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, "config.json"), []byte(`{"credHelpers":{"`+reg.Host+`":"test"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"DOCKER_CONFIG=" + home, "PATH=" + helpers + ":" + os.Getenv("PATH")}
	if o := runDaemon(t, daemonCommand(t, env, "inspect", reg.Host+"/base:lazy")); o.status != 0 {
		t.Errorf("%+v", o)
	}
	env[0] = "DOCKER_CONFIG=" + t.TempDir()
	if o := runDaemon(t, daemonCommand(t, env, "inspect", reg.Host+"/base:lazy")); o.status != 1 {
		t.Errorf("without credentials: %+v", o)
	}
}
