package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// rawLayer is a gzip layer of given bytes.
type rawLayer struct {
	blob []byte
	diff digest.Digest
}

func (l rawLayer) Digest() (v1.Hash, error) { return v1.NewHash(digest.FromBytes(l.blob).String()) }
func (l rawLayer) DiffID() (v1.Hash, error) { return v1.NewHash(l.diff.String()) }
func (l rawLayer) Size() (int64, error)     { return int64(len(l.blob)), nil }
func (l rawLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.blob)), nil
}
func (l rawLayer) Uncompressed() (io.ReadCloser, error) {
	return gzip.NewReader(bytes.NewReader(l.blob))
}
func (l rawLayer) MediaType() (types.MediaType, error) { return types.OCILayer, nil }

// withTopLayer pushes an image whose layers are eStargz and whose topmost has been through change, which gets its
// blob and annotations. The blob's digest is that of the changed bytes: what is wrong is in the image.
func withTopLayer(t *testing.T, reg *registry.Registry, tag string, change func(blob []byte, annotations map[string]string) []byte) v1.Image {
	t.Helper()
	img, err := busybox(t, bigLayer(t, 4<<20)).Build(t.Context(), baseimage.EStargz)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	var adds []mutate.Addendum
	for i, l := range m.Layers {
		blob, ann := layerBlob(t, img, l.Digest), l.Annotations
		if i == len(m.Layers)-1 {
			blob = change(blob, ann)
		}
		adds = append(adds, mutate.Addendum{Layer: rawLayer{blob, digest.FromBytes(gunzip(t, blob))}, Annotations: ann, MediaType: types.OCILayer})
	}
	out, err := mutate.Append(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), adds...)
	if err != nil {
		t.Fatal(err)
	}
	if out, err = mutate.Config(out, cf.Config); err != nil {
		t.Fatal(err)
	}
	ocf, err := out.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	ocf = ocf.DeepCopy()
	ocf.OS, ocf.Architecture = cf.OS, cf.Architecture
	if out, err = mutate.ConfigFile(out, ocf); err != nil {
		t.Fatal(err)
	}
	if _, err := baseimage.Push(t.Context(), reg, tag, out); err != nil {
		t.Fatal(err)
	}
	reg.Log.Reset()
	return out
}

// footer is the size of an eStargz footer: an empty gzip member whose extra field holds
// the TOC's offset as 16 hexadecimal digits and "STARGZ"
// (https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md).
const footer = estargz.FooterSize

// tocOffset returns where the TOC's gzip member starts.
func tocOffset(t *testing.T, blob []byte) int64 {
	t.Helper()
	f := blob[len(blob)-footer:]
	i := bytes.Index(f, []byte("STARGZ"))
	if i < 16 {
		t.Fatalf("no eStargz footer: %q", f)
	}
	off, err := strconv.ParseInt(string(f[i-16:i]), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return off
}

// replaceTOC puts another TOC into a layer.
func replaceTOC(t *testing.T, blob, toc []byte) []byte {
	t.Helper()
	out := bytes.NewBuffer(bytes.Clone(blob[:tocOffset(t, blob)]))
	zw := gzip.NewWriter(out)
	tw := tar.NewWriter(zw)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.TOCTarName, Size: int64(len(toc))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(toc); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	out.Write(blob[len(blob)-footer:])
	return out.Bytes()
}

// TestCorruptTOCIsPulledEagerly has layers whose TOC cannot be read while their content is fine: the layer is pulled,
// the user is told why, the build succeeds.
func TestCorruptTOCIsPulledEagerly(t *testing.T) { eachDoor(t, testCorruptTOCIsPulledEagerly) }

func testCorruptTOCIsPulledEagerly(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, blob []byte, ann map[string]string) []byte{
		"no JSON": func(t *testing.T, blob []byte, ann map[string]string) []byte {
			toc := []byte("this is not JSON")
			ann[estargz.TOCJSONDigestAnnotation] = digest.FromBytes(toc).String()
			return replaceTOC(t, blob, toc)
		},
		"offset into content": func(t *testing.T, blob []byte, _ map[string]string) []byte {
			return bytes.Replace(blob, fmt.Appendf(nil, "%016xSTARGZ", tocOffset(t, blob)), fmt.Appendf(nil, "%016xSTARGZ", 4096), 1)
		},
		"offset outside": func(t *testing.T, blob []byte, _ map[string]string) []byte {
			return bytes.Replace(blob, fmt.Appendf(nil, "%016xSTARGZ", tocOffset(t, blob)), fmt.Appendf(nil, "%016xSTARGZ", len(blob)+5), 1)
		},
		"no footer": func(t *testing.T, blob []byte, _ map[string]string) []byte {
			return bytes.Replace(blob, []byte("STARGZ"), []byte("STARGX"), 1)
		},
		"annotation is no digest": func(_ *testing.T, blob []byte, ann map[string]string) []byte {
			ann[estargz.TOCJSONDigestAnnotation] = "sha256:short"
			return blob
		},
	} {
		t.Run(name, func(t *testing.T) {
			reg := startRegistry(t, registry.Options{})
			img := withTopLayer(t, reg, "bad:1", func(blob []byte, ann map[string]string) []byte { return change(t, blob, ann) })
			top := layerDigests(t, img)[1]
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("bad:1") + "\nRUN sha256sum /big/3\n"})
			wantContains(t, "output", res.Output(), digest.FromString(noise(3, 1<<20)).Encoded())
			ids := strings.Join(res.Vertex("[1/2] FROM").StatusIDs(), "\n")
			wantContains(t, "progress of FROM", ids, "pulling layer "+top.String()+" : ", "lazy 1 of 2 layers")
			rep := reportOf(t, res)
			if l := rep.Images[0].Layers[1]; l.Mode != "eager" || l.Reason == "" {
				t.Errorf("lazy.report: %+v, want an eager layer with a reason", l)
			}
			if l := rep.Images[0].Layers[0]; l.Mode != "lazy" {
				t.Errorf("lazy.report: the good layer is %+v", l)
			}
		})
	}
}

// TestTOCDigestMismatchFailsTheBuild has a manifest that promises another TOC than the layer carries: nothing of it is used.
func TestTOCDigestMismatchFailsTheBuild(t *testing.T) {
	eachDoor(t, testTOCDigestMismatchFailsTheBuild)
}

func testTOCDigestMismatchFailsTheBuild(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	var want, got digest.Digest
	img := withTopLayer(t, reg, "bad:1", func(blob []byte, ann map[string]string) []byte {
		got = digest.Digest(ann[estargz.TOCJSONDigestAnnotation])
		want = digest.FromString("another TOC")
		ann[estargz.TOCJSONDigestAnnotation] = want.String()
		return blob
	})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	for range 2 { // the second build must not find the layer anywhere
		msg := buildFails(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("bad:1") + "\nRUN cat /big/3 | wc -c\n"})
		wantContains(t, "error", msg, layerDigests(t, img)[1].String(), want.String(), got.String())
	}
	wantAlive(t, d, reg)
}

// wantAlive builds something to show that the daemon still can.
func wantAlive(t *testing.T, d *daemon.Daemon, reg *registry.Registry) {
	t.Helper()
	push(t, reg, "alive:1", busybox(t), baseimage.EStargz)
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("alive:1") + "\nRUN echo alive and well\n", NoCache: true})
	wantContains(t, "output", res.Output(), "alive and well")
}

// TestRegistryIgnoresRanges answers ranged reads with whole blobs.
func TestRegistryIgnoresRanges(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	reg.Faults.Add(registry.Fault{Kind: registry.IgnoreRange})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/3\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(3, 1<<20)).Encoded())
	ids := strings.Join(res.Vertex("[1/2] FROM").StatusIDs(), "\n")
	wantContains(t, "progress of FROM", ids, "pulling layer ", "200 to a range request", "lazy 0 of 2 layers")
}

// TestFaultsWhileMounting are faults that pass while the tables of contents are read: the build must not notice. Of those in
// the middle of a step see TestFaultsInMidRUN.
func TestFaultsWhileMounting(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault registry.Fault
	}{
		{"503 for two seconds", registry.Fault{Kind: registry.Status, Code: http.StatusServiceUnavailable, For: 2 * time.Second}},
		{"429 with Retry-After", registry.Fault{Kind: registry.Status, Code: http.StatusTooManyRequests, RetryAfter: time.Second, Count: 2}},
		{"500 twice", registry.Fault{Kind: registry.Status, Code: http.StatusInternalServerError, Count: 2}},
		{"short body", registry.Fault{Kind: registry.ShortBody, Count: 2}},
		{"reset", registry.Fault{Kind: registry.Reset, Count: 2}},
		{"silence", registry.Fault{Kind: registry.Silence, Count: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			reg := startRegistry(t, registry.Options{})
			img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 8<<20)), baseimage.EStargz)
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[lazy]\nfetch-timeout = \"12s\"\n"})
			c.fault.Match = registry.MatchBlob(layerDigests(t, img)[1])
			reg.Faults.Add(c.fault)
			res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/5\n"})
			wantContains(t, "output", res.Output(), digest.FromString(noise(5, 1<<20)).Encoded())
			if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
				t.Errorf("%d layers are lazy, want 2: a fault that passes is no reason to pull", rep.Images[0].Lazy)
			}
		})
	}
}

// TestRegistryGoneBeforeBuild builds from a registry that is not there.
func TestRegistryGoneBeforeBuild(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 1<<20)), baseimage.EStargz)
	other := startRegistry(t, registry.Options{})
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + plainHTTP(other)})
	if err := reg.Close(); err != nil {
		t.Fatal(err)
	}
	msg := buildFails(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN true\n"})
	wantContains(t, "error", msg, reg.Ref("base:1"), "connection refused")
	wantAlive(t, d, other)
}

// TestRegistryGoneDuringRUN loses the registry while a step reads: the step fails in bounded time, the user is told what
// is missing, and when the registry is back the build works.
func TestRegistryGoneDuringRUN(t *testing.T) { eachDoor(t, testRegistryGoneDuringRUN) }

func testRegistryGoneDuringRUN(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[lazy]\nfetch-timeout = \"3s\"\n"})
	var remove func()
	gone := reg.OnSignal("gone", func(*http.Request) string {
		if remove == nil { // the second build has a registry
			remove = reg.Faults.Add(registry.Fault{Kind: registry.Reset, Match: registry.MatchAny})
		}
		return ""
	})
	s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/0; wget -q -O /dev/null " + gone + "; sha256sum /big/12\n"}
	start := time.Now()
	msg := buildFails(t, d, s)
	if remove == nil {
		t.Fatal("the step never took the registry away")
	}
	if took := time.Since(start); took > 90*time.Second {
		t.Errorf("the build failed after %v", took)
	}
	wantContains(t, "error", msg, layerDigests(t, img)[1].String(), reg.Host)
	remove()
	res := build(t, d, s)
	wantContains(t, "output", res.Output(), digest.FromString(noise(12, 1<<20)).Encoded())
}

// TestFailedStepIsNotBlamedOnAnotherBuild has a step fail by itself, while another build's registry is gone: its error says nothing of that.
func TestFailedStepIsNotBlamedOnAnotherBuild(t *testing.T) {
	eachDoor(t, testFailedStepIsNotBlamedOnAnotherBuild)
}

func testFailedStepIsNotBlamedOnAnotherBuild(t *testing.T) {
	reg, others := startRegistry(t, registry.Options{}), startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, layer(t, "own", baseimage.File("own", "own\n"))), baseimage.EStargz)
	img, _ := push(t, others, "private:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + plainHTTP(others) + "[lazy]\nfetch-timeout = \"3s\"\n"})
	begun, over := make(chan struct{}), make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	hold := reg.OnSignal("hold", func(*http.Request) string { begin(); <-over; return "" })
	gone := others.OnSignal("gone", func(*http.Request) string {
		others.Faults.Add(registry.Fault{Kind: registry.Reset, Match: registry.MatchAny})
		return ""
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(over)
	wg.Go(func() {
		defer begin()
		msg := buildFails(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN wget -q -O /dev/null " + hold + "; exit 7\n"})
		wantContains(t, "error", msg, "exit code: 7")
		for _, part := range []string{"lazy layers", others.Host, "private"} {
			if strings.Contains(msg, part) {
				t.Errorf("the error of a step that failed by itself says %q: %s", part, msg)
			}
		}
	})
	<-begun
	msg := buildFails(t, d, client.Solve{Dockerfile: "FROM " + others.Ref("private:1") + "\nRUN wget -q -O /dev/null " + gone + "; sha256sum /big/12\n"})
	wantContains(t, "error", msg, layerDigests(t, img)[1].String(), others.Host)
}
