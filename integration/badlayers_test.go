package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

func gzipOf(t *testing.T, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(p)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tarOfFile is a tar of a file.
func tarOfFile(t *testing.T, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))})
	if err == nil {
		_, err = io.WriteString(w, content)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// pushOn pushes an image with one more layer.
func pushOn(t *testing.T, reg *registry.Registry, base v1.Image, l rawLayer, mediaType types.MediaType, tag string) {
	t.Helper()
	img, err := mutate.Append(base, mutate.Addendum{Layer: l, MediaType: mediaType})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := baseimage.Push(t.Context(), reg, tag, img); err != nil {
		t.Fatal(err)
	}
}

// TestExportBadLayers forces layers into formats that can't hold them: whatever exports them, the error says which layer it is, what is wrong
// and what to do; nothing is pushed, nothing is left, and the image is exported as it is by who doesn't force.
func TestExportBadLayers(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	base, _ := push(t, reg, "base:gzip", busybox(t), baseimage.Gzip)
	debug := freePort(t)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[grpc]\ndebugAddress = \"" + debug + "\"\n"})
	whole := tarOfFile(t, "some/file", noise(1, 20_000))
	reserved := tarOfFile(t, "stargz.index.json", "{}")
	layerOf := func(tar []byte) rawLayer { return rawLayer{gzipOf(t, tar), digest.FromBytes(tar)} }
	flipped := gzipOf(t, whole)
	flipped[len(flipped)-6] ^= 1 // its checksum
	garbled := slices.Clone(whole)
	copy(garbled[len(garbled)-1024:], "no header")
	some := filepath.Dir(writeFile(t, t.TempDir(), "some", "file"))
	const asItIs = "without force-compression=true"
	const encrypted = types.OCILayer + "+encrypted"
	for name, c := range map[string]struct {
		layer rawLayer
		want  []string // of the error; with zstd:chunked there is none of a reserved name
	}{
		"tar ends early":  {layerOf(whole[:10_000]), []string{"is damaged", `"some/file"`, "unexpected EOF", asItIs}},
		"gzip ends early": {rawLayer{gzipOf(t, whole)[:9_000], digest.FromBytes(whole)}, []string{"is damaged", "decompress", "unexpected EOF", asItIs}},
		"gzip is broken":  {rawLayer{flipped, digest.FromBytes(whole)}, []string{"is damaged", "decompress", "checksum", asItIs}},
		"no tar":          {layerOf(bytes.Repeat([]byte("no tar"), 500)), []string{"is damaged", "invalid tar header", asItIs}},
		"garbage in it":   {layerOf(garbled), []string{"is damaged", "invalid tar header", asItIs}},
		"wrong DiffID":    {rawLayer{gzipOf(t, whole), digest.FromString("other")}, []string{"is damaged", digest.FromBytes(whole).String(), digest.FromString("other").String(), asItIs}},
		"reserved name":   {layerOf(reserved), []string{"can't be converted", `"stargz.index.json"`, "reserved", asItIs}},
		"encrypted":       {rawLayer{[]byte(noise(2, 5_000)), digest.FromString("secret")}, []string{"can't be converted", "it is encrypted", asItIs}},
	} {
		t.Run(name, func(t *testing.T) {
			tag := strings.ReplaceAll(name, " ", "-")
			mediaType := types.OCILayer
			if name == "encrypted" {
				mediaType = encrypted
			}
			pushOn(t, reg, base, c.layer, mediaType, "bad:"+tag)
			// BuildKit keeps what it has of a download that is broken off, so the layers below are there before; and wantNoIngests prunes.
			build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:gzip") + "\nRUN true\n"})
			for _, format := range []string{"estargz", "zstdchunked"} {
				bad := client.Solve{Dockerfile: "FROM " + reg.Ref("bad:"+tag) + "\nENV A=b\n"}
				const forced = ",force-compression=true,compression="
				if name == "reserved name" && format == "zstdchunked" {
					bad.Outputs = []string{"type=image,name=" + reg.Ref(format+":"+tag) + ",push=true" + forced + format}
					build(t, d, bad)
					wantZstdDiffIDs(t, pull(t, reg, format+":"+tag))
					continue
				}
				for what, to := range map[string]client.Solve{
					"push":           {Outputs: []string{"type=image,name=" + reg.Ref(format+":"+tag) + ",push=true"}},
					"oci":            {Outputs: []string{"type=oci,dest=" + filepath.Join(t.TempDir(), "oci.tar")}},
					"docker":         {Outputs: []string{"type=docker,dest=" + filepath.Join(t.TempDir(), "docker.tar")}},
					"registry cache": {CacheTo: []string{"type=registry,ref=" + reg.Ref(format+":cache-"+tag)}},
					"local cache":    {CacheTo: []string{"type=local,dest=" + t.TempDir()}},
				} {
					s := bad
					for _, o := range to.Outputs {
						s.Outputs = append(s.Outputs, o+forced+format)
					}
					for _, o := range to.CacheTo {
						s.CacheTo = append(s.CacheTo, o+forced+format)
						// Something to be cached, for which nobody unpacks the layer.
						s.Dockerfile += "COPY --link some /\n"
						s.Context = some
					}
					reg.Log.Reset()
					wantContains(t, format+", "+what+": error", buildFails(t, d, s), append([]string{"layer " + digest.FromBytes(c.layer.blob).String()}, c.want...)...)
					for _, e := range reg.Log.Entries() {
						if e.Method == http.MethodPut {
							t.Errorf("%s, %s: pushed %s", format, what, e.Path)
						}
					}
				}
			}
			wantNobodyExports(t, debug)
			wantNoIngests(t, d)
			build(t, d, client.Solve{
				Dockerfile: "FROM " + reg.Ref("bad:"+tag) + "\nENV A=b\n",
				Outputs:    []string{"type=image,name=" + reg.Ref("kept:"+tag) + ",push=true,compression=estargz"},
			})
			m, err := pull(t, reg, "kept:"+tag).Manifest()
			if err != nil {
				t.Fatal(err)
			}
			last := m.Layers[len(m.Layers)-1]
			if last.Digest.String() != digest.FromBytes(c.layer.blob).String() || last.MediaType != mediaType {
				t.Errorf("the layer is exported as %+v", last)
			}
		})
	}
	t.Run("sparse files", func(t *testing.T) {
		sparse := exec.CommandContext(t.Context(), "sh", "-c", "truncate -s 1M hole && echo x >> hole && tar --sparse --format=posix -c hole")
		sparse.Dir = t.TempDir()
		holes, err := sparse.Output()
		if err != nil {
			t.Fatal(err)
		}
		pushOn(t, reg, base, layerOf(holes), types.OCILayer, "bad:sparse")
		for _, format := range []string{"estargz", "zstdchunked"} {
			const forced = ",force-compression=true,compression="
			s := client.Solve{
				Dockerfile: "FROM " + reg.Ref("bad:sparse") + "\nENV A=b\n", Plain: true,
				Outputs: []string{"type=image,name=" + reg.Ref(format+":sparse") + ",push=true" + forced + format},
			}
			told := "compression=" + format + `: a layer is not lazy, as a table of contents can't say what its tar says of "hole"`
			for range 2 { // the second time it is there
				if got := strings.Count(build(t, d, s).Plain, "WARN: "+told); got != 1 {
					t.Errorf("%d times %q", got, told)
				}
			}
			img := pull(t, reg, format+":sparse")
			layers, err := img.Layers()
			if err != nil {
				t.Fatal(err)
			}
			if diffID, err := layers[len(layers)-1].DiffID(); err != nil || diffID.String() != digest.FromBytes(holes).String() {
				t.Errorf("%s: the tar is %s, %v", format, diffID, err)
			}
			if format == "zstdchunked" {
				wantZstdDiffIDs(t, img)
			} else if err := validate.Image(img); err != nil {
				t.Error(err)
			}
			// Who builds on it has the file with its hole.
			res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref(format+":sparse") + "\nRUN wc -c /hole\n"})
			wantContains(t, format+": output", res.Output(), "1048578 /hole")
		}
	})
	t.Run("a step on an encrypted layer", func(t *testing.T) {
		got := buildFails(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("bad:encrypted") + "\nRUN true\n"})
		wantContains(t, "error", got, "unpack layer "+digest.FromString(noise(2, 5_000)).String(), "it is encrypted")
	})
}
