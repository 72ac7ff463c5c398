package integration

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestExportsLikeStock exports the same build by stock BuildKit and by ours, with every option that has a say in what is pushed, or in an archive: but for
// the bytes of the layers, and what follows from them, it's the same. What stock knows nothing of, zstd:chunked, is compared with its zstd.
func TestExportsLikeStock(t *testing.T) {
	t.Run("estargz", func(t *testing.T) { testExportsLikeStock(t, "estargz", "estargz") })
	t.Run("zstdchunked", func(t *testing.T) { testExportsLikeStock(t, "zstdchunked", "zstd,oci-mediatypes=true") })
}

func testExportsLikeStock(t *testing.T, oursAs, stockAs string) {
	reg := startRegistry(t, registry.Options{})
	plain, _ := push(t, reg, "base:gzip", busybox(t), baseimage.Gzip)
	pushForeign(t, reg, plain, "base:foreign")
	stock := startDaemon(t, daemon.Options{Kind: daemon.StockOverlay, Config: plainHTTP(reg)})
	ours := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, stock, client.Solve{
		Dockerfile: "FROM " + reg.Ref("base:gzip") + `
RUN printf '#!/bin/sh\necho "{\\"_type\\":\\"https://in-toto.io/Statement/v0.1\\",\\"predicateType\\":\\"https://spdx.dev/Document\\",\\"predicate\\":{}}" > $BUILDKIT_SCAN_DESTINATION/sbom.spdx.json\n' > /scan && chmod +x /scan
ENTRYPOINT ["/scan"]
`,
		Outputs: []string{"type=image,name=" + reg.Ref("scanner:1") + ",push=true"},
	})
	onBase := func(base string) string {
		return "FROM " + reg.Ref(base) + "\nLABEL who=me\nCOPY Dockerfile /a\nRUN echo b > /b\nENV C=d\nWORKDIR /e\n"
	}
	sbom := []string{"--opt", "attest:sbom=generator=" + reg.Ref("scanner:1")}
	provenance := []string{"--opt", "attest:provenance=mode=max"}
	platforms := []string{"--opt", "platform=linux/amd64,linux/arm64"}
	const scratch = "FROM scratch\nCOPY Dockerfile /a\n"
	for _, c := range []struct {
		attrs      string
		dockerfile string
		args       []string
	}{
		{"", onBase("base:gzip"), nil},
		{"force-compression=true", onBase("base:gzip"), nil},
		{"force-compression=true,oci-mediatypes=true", onBase("base:foreign"), nil},
		{"", onBase("base:foreign"), nil},
		{"prefer-nondist-layers=true", onBase("base:foreign"), nil},
		{"annotation.org.example.a=1,annotation-manifest.org.example.b=2,annotation-manifest-descriptor.org.example.c=3", onBase("base:gzip"), provenance},
		{"annotation-index.org.example.d=4,annotation-index-descriptor.org.example.e=5", scratch, platforms},
		{"annotation-manifest[linux/arm64].org.example.f=6", scratch, platforms},
		{"", onBase("base:gzip"), provenance},
		{"", onBase("base:gzip"), append(slices.Clone(sbom), provenance...)},
		{"oci-artifact=true", onBase("base:gzip"), sbom},
		{"oci-artifact=false", onBase("base:gzip"), sbom},
		{"oci-artifact=true", scratch, append(slices.Clone(platforms), provenance...)},
		{"store=false", onBase("base:gzip"), nil},
		{"store=true,unpack=true", onBase("base:gzip"), nil},
		{"push-by-digest=true", onBase("base:gzip"), nil},
		{"name-canonical=true", onBase("base:gzip"), nil},
		{"dangling-name-prefix=<none>", onBase("base:gzip"), nil},
		{"attestation-inline=false", onBase("base:gzip"), provenance},
		{"source-date-epoch=1600000000,rewrite-timestamp=true", onBase("base:gzip"), provenance},
		{"", onBase("base:gzip"), []string{"--export-cache", "type=inline"}},
		{"", "FROM scratch\n", nil},
	} {
		t.Run(strings.Join(append([]string{c.attrs}, c.args...), " "), func(t *testing.T) {
			context := filepath.Dir(writeFile(t, t.TempDir(), "Dockerfile", c.dockerfile))
			export := func(d *daemon.Daemon, repo, compression string) (tree any, metadata []string) {
				t.Helper()
				ref := reg.Ref(repo)
				if !strings.Contains(c.attrs, "push-by-digest") {
					ref += ":1"
				}
				attrs := c.attrs
				if attrs != "" {
					attrs = "," + attrs
				}
				if i := strings.Index(attrs, "<none>"); i > 0 {
					attrs = strings.Replace(attrs, "<none>", reg.Ref(repo), 1)
				}
				res := build(t, d, client.Solve{Context: context, Args: c.args, Outputs: []string{"type=image,name=" + ref + ",push=true,compression=" + compression + attrs}})
				var dgst string
				if err := json.Unmarshal(res.Metadata["containerimage.digest"], &dgst); err != nil {
					t.Fatal(err)
				}
				return imageTree(t, inRegistry(t, reg, repo), dgst), metadataOf(t, res, repo)
			}
			theirs, theirKeys := export(stock, "like/stock", stockAs)
			got, keys := export(ours, "like/ours", oursAs)
			wantLikeStock(t, got, theirs, keys, theirKeys)
		})
	}
	archives := t.TempDir()
	for _, c := range []struct {
		attrs      string
		dockerfile string
		args       []string
	}{
		{"", onBase("base:gzip"), nil},
		{"force-compression=true", onBase("base:gzip"), nil},
		{"force-compression=true", onBase("base:gzip"), append(slices.Clone(sbom), provenance...)},
		{"oci-artifact=true", onBase("base:gzip"), provenance},
		{"annotation.org.example.a=1,annotation-index.org.example.d=4,annotation-manifest-descriptor.org.example.c=3", scratch, platforms},
		{"source-date-epoch=1600000000,rewrite-timestamp=true", onBase("base:gzip"), nil},
		{"name-canonical=true", onBase("base:gzip"), nil},
	} {
		for _, exporter := range []string{"oci", "docker"} {
			if exporter == "docker" && (c.args != nil || strings.Contains(c.attrs, "annotation-index")) {
				continue // it has no place for an index
			}
			t.Run(strings.Join(append([]string{exporter, c.attrs}, c.args...), " "), func(t *testing.T) {
				context := filepath.Dir(writeFile(t, t.TempDir(), "Dockerfile", c.dockerfile))
				export := func(d *daemon.Daemon, compression string) (tree any, metadata []string) {
					t.Helper()
					attrs := c.attrs
					dir, err := os.MkdirTemp(archives, "") // without the commas of the test's name
					if err != nil {
						t.Fatal(err)
					}
					if attrs != "" {
						attrs = "," + attrs
					}
					res := build(t, d, client.Solve{Context: context, Args: c.args, Outputs: []string{"type=" + exporter + ",name=repo:1,tar=false,dest=" + dir + ",compression=" + compression + attrs}})
					index, err := os.ReadFile(filepath.Join(dir, "index.json"))
					if err != nil {
						t.Fatal(err)
					}
					var doc map[string]any
					if err := json.Unmarshal(index, &doc); err != nil {
						t.Fatal(err)
					}
					top := doc["manifests"].([]any)[0].(map[string]any)
					return []any{withoutBytes("", doc), imageTree(t, inLayout(t, dir), top["digest"].(string))}, metadataOf(t, res, "")
				}
				theirs, theirKeys := export(stock, strings.Replace(stockAs, "estargz", "estargz,oci-mediatypes=true", 1))
				got, keys := export(ours, oursAs)
				wantLikeStock(t, got, theirs, keys, theirKeys)
			})
		}
	}
}

func wantLikeStock(t *testing.T, got, theirs any, keys, theirKeys []string) {
	t.Helper()
	if !slices.Equal(keys, theirKeys) {
		t.Errorf("metadata %q, stock has %q", keys, theirKeys)
	}
	if !reflect.DeepEqual(got, theirs) {
		t.Errorf("exported:\n%s\nstock:\n%s", indented(t, got), indented(t, theirs))
	}
}

// metadataOf is what a client gets to know of an export: what there is, and the names.
func metadataOf(t *testing.T, res *client.Result, repo string) (metadata []string) {
	t.Helper()
	for k, v := range res.Metadata {
		switch {
		case k == "lazy.report":
			continue
		case k == "image.name" && repo != "":
			k += " " + someDigest.ReplaceAllString(strings.ReplaceAll(string(v), repo, "repo"), "DIGEST")
		}
		metadata = append(metadata, k)
	}
	slices.Sort(metadata)
	return metadata
}

var someDigest = regexp.MustCompile(`sha256:[0-9a-f]{64}`)

// inRegistry returns what reads manifests and blobs of a repository.
func inRegistry(t *testing.T, reg *registry.Registry, repo string) func(dgst string, manifest bool) []byte {
	return func(dgst string, manifest bool) []byte {
		t.Helper()
		ref, err := name.NewDigest(reg.Ref(repo) + "@" + dgst)
		if err != nil {
			t.Fatal(err)
		}
		if manifest {
			desc, err := remote.Get(ref, remote.WithTransport(reg.Transport()))
			if err != nil {
				t.Fatal(err)
			}
			return desc.Manifest
		}
		l, err := remote.Layer(ref, remote.WithTransport(reg.Transport()))
		if err != nil {
			t.Fatal(err)
		}
		rc, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		b, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

// inLayout is inRegistry of an OCI layout.
func inLayout(t *testing.T, dir string) func(dgst string, manifest bool) []byte {
	return func(dgst string, _ bool) []byte {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, "blobs", strings.ReplaceAll(dgst, ":", "/")))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

func indented(t *testing.T, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// pushForeign pushes an image with a layer that is to be had elsewhere.
func pushForeign(t *testing.T, reg *registry.Registry, img v1.Image, tag string) {
	t.Helper()
	foreign, err := baseimage.Image{Layers: []baseimage.Layer{layer(t, "foreign", baseimage.File("foreign", "x"))}}.Build(t.Context(), baseimage.Gzip)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := foreign.Layers()
	if err != nil {
		t.Fatal(err)
	}
	other := layers[0]
	dgst, err := other.Digest()
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.Append(img, mutate.Addendum{
		Layer: other, MediaType: types.OCIRestrictedLayer,
		URLs: []string{reg.URL() + "/v2/base/blobs/" + dgst.String()},
	})
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(reg.Ref(tag))
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteLayer(ref.Context(), other, remote.WithTransport(reg.Transport())); err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithTransport(reg.Transport())); err != nil {
		t.Fatal(err)
	}
}

// imageTree is all that an index or a manifest leads to, without digests, sizes and times.
func imageTree(t *testing.T, read func(dgst string, manifest bool) []byte, dgst string) any {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(read(dgst, true), &doc); err != nil {
		t.Fatal(err)
	}
	children := map[string]any{}
	for _, field := range []string{"manifests", "config", "layers"} {
		of, _ := doc[field].([]any)
		if one, ok := doc[field].(map[string]any); ok {
			of = []any{one}
		}
		for _, c := range of {
			child := c.(map[string]any)
			d, _ := child["digest"].(string)
			mt, _ := child["mediaType"].(string)
			switch {
			case field == "manifests":
				children[field] = append(asList(children[field]), imageTree(t, read, d))
			case strings.HasSuffix(mt, "image.config.v1+json"), strings.Contains(mt, "in-toto"):
				var content map[string]any
				if err := json.Unmarshal(read(d, false), &content); err != nil {
					t.Fatal(err)
				}
				delete(content, "predicate") // how it was built, by whom
				children[field] = append(asList(children[field]), withoutBytes("", content))
			}
		}
	}
	return map[string]any{"document": withoutBytes("", doc), "children": children}
}

func asList(v any) []any {
	l, _ := v.([]any)
	return l
}

// withoutBytes is a document without what depends on the layers' bytes, and on when and where it was built.
func withoutBytes(key string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for k, e := range v {
			if !strings.HasPrefix(k, "io.github.containers.zstd-chunked.") {
				out[k] = withoutBytes(k, e)
			}
		}
		if a, ok := out["annotations"].(map[string]any); ok && len(a) == 0 {
			delete(out, "annotations")
		}
		return out
	case []any:
		out := []any{}
		for _, e := range v {
			out = append(out, withoutBytes(key, e))
		}
		return out
	case string:
		switch {
		case key == "created", key == "org.opencontainers.image.created", key == "moby.buildkit.cache.v0", key == "sha256", strings.HasPrefix(v, "sha256:"):
			return key
		case key == "io.containers.estargz.uncompressed-size":
			return key
		}
		return strings.ReplaceAll(strings.ReplaceAll(v, "like/stock", "repo"), "like/ours", "repo")
	case float64:
		if key == "size" {
			return key
		}
	}
	return v
}
