package convert

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

func TestConvert(t *testing.T) {
	reg := repositorytest.New(t)
	one, two := plain(t, "one"), plain(t, "two")
	put(t, reg, "1", "linux/amd64", dockerManifest, one, two, one)
	dst := repo(t, reg, "dst:1")
	result := must(t, repo(t, reg, "src:1"), dst, options())
	wantLazy(t, dst)

	mediaType, raw := reg.Manifest("dst", "1")
	if mediaType != ocispecs.MediaTypeImageManifest || digest.FromBytes(raw) != result.Digest {
		t.Errorf("manifest %s of type %s, want %s", digest.FromBytes(raw), mediaType, result.Digest)
	}
	var m ocispecs.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	if m.MediaType != mediaType || m.Config.MediaType != ocispecs.MediaTypeImageConfig || m.Annotations["z"] != "<1>" || !bytes.Contains(raw, []byte(`"annotations":{"z":"<1>","a":"2"}`)) {
		t.Errorf("manifest %s", raw)
	}
	config := reg.Blob("dst", m.Config.Digest)
	for _, kept := range []string{`"unknown":{"a":  1.50, "b":"<&>"},"architecture"`, `"created":"2026-01-02T03:04:05.678Z","history":[{"created_by":"x","extra":true}]`, `"rootfs":{"type":"layers","more":[1, 2],`} {
		if !bytes.Contains(config, []byte(kept)) {
			t.Errorf("configuration %s, want %s in it", config, kept)
		}
	}
	var im ocispecs.Image
	if err := json.Unmarshal(config, &im); err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) != 3 || m.Layers[0].Digest != m.Layers[2].Digest || len(result.Layers) != 2 {
		t.Errorf("layers %v, of which %d were converted", m.Layers, len(result.Layers))
	}
	for i, from := range []piece{one, two, one} {
		tar := inflate(t, reg.Blob("dst", m.Layers[i].Digest))
		if im.RootFS.DiffIDs[i] != digest.FromBytes(tar) || !bytes.HasPrefix(tar, from.tar) {
			t.Errorf("layer %d isn't its tar, or its DiffID is wrong", i)
		}
		if got := m.Layers[i].Annotations[annotationFrom]; got != digest.FromBytes(from.blob).String() {
			t.Errorf("layer %d was made of %s", i, got)
		}
	}
	if n := reg.Uploads(); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
}

// A second conversion moves no bytes of layers, whoever remembers the first one, and gives the same image.
func TestAgain(t *testing.T) {
	for name, again := range map[string]struct {
		to     string
		state  bool // of the first and the second conversion
		former string
		want   Action
	}{
		"same tag":                              {to: "dst:1", want: Reused},
		"other tag, by state":                   {to: "dst:2", state: true, want: Reused},
		"other repository, by state":            {to: "other:1", state: true, want: Reused},
		"other tag, by the former image":        {to: "dst:2", former: "dst:1", want: Reused},
		"other repository, by the former image": {to: "other:2", former: "dst:1", want: Reused},
		"a former image that isn't there":       {to: "dst:2", former: "none:1", want: Converted},
		"nobody remembers":                      {to: "dst:2", want: Converted},
	} {
		t.Run(name, func(t *testing.T) {
			reg := repositorytest.New(t)
			put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"), plain(t, "two"))
			src, opt, dir := repo(t, reg, "src:1"), options(), t.TempDir()
			if again.state {
				opt.State = state(t, dir)
			}
			first := must(t, src, repo(t, reg, "dst:1"), opt)
			if read, written := reg.Moved(small); read < 2*layerSize || written < 2*layerSize {
				t.Errorf("%d bytes read and %d written: the measure is wrong", read, written)
			}
			reg.Reset()
			opt = options()
			if again.state {
				opt.State = state(t, dir)
			}
			if again.former != "" {
				opt.Former = []repository.Repository{repo(t, reg, again.former)}
			}
			dst := repo(t, reg, again.to)
			second := must(t, src, dst, opt)
			if got := actions(second); !slices.Equal(got, []Action{again.want, again.want}) {
				t.Errorf("layers were %v, want %v", got, again.want)
			}
			if absent := len(second.Absent) > 0; absent != (again.former != "" && again.want == Converted) {
				t.Errorf("former images that aren't there: %q", second.Absent)
			}
			if read, written := reg.Moved(small); again.want == Reused && read+written > 0 {
				t.Errorf("%d bytes were read and %d written", read, written)
			}
			if second.Digest != first.Digest {
				t.Errorf("the second image is %s, the first one %s", second.Digest, first.Digest)
			}
			wantLazy(t, dst)
		})
	}
}

// TestRemembersEveryRepository converts into a registry, then to where nothing can be taken from there: what the registry has is remembered.
func TestRemembersEveryRepository(t *testing.T) {
	reg, elsewhere := repositorytest.New(t), repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"))
	src, opt := repo(t, reg, "src:1"), options()
	opt.State = state(t, t.TempDir())
	must(t, src, repo(t, reg, "dst:1"), opt)
	for _, dst := range []repository.Repository{parsed(t, "oci-layout://"+t.TempDir(), reg), repo(t, elsewhere, "dst:1")} {
		if got := actions(must(t, src, dst, opt)); !slices.Equal(got, []Action{Converted}) {
			t.Errorf("layers were %v for %s", got, dst)
		}
	}
	if got := actions(must(t, src, repo(t, reg, "other:1"), opt)); !slices.Equal(got, []Action{Reused}) {
		t.Errorf("layers were %v, want reused", got)
	}
}

func TestAnew(t *testing.T) {
	reg := repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"))
	src, dst := repo(t, reg, "src:1"), repo(t, reg, "dst:1")
	must(t, src, dst, options())
	opt := options()
	opt.Anew = true
	if got := actions(must(t, src, dst, opt)); !slices.Equal(got, []Action{Converted}) {
		t.Errorf("layers were %v", got)
	}
	// Other options make other layers.
	opt = options()
	level := 1
	opt.Format = NewEStargz(estargz.WriteOptions{Level: &level})
	if got := actions(must(t, src, dst, opt)); !slices.Equal(got, []Action{Converted}) {
		t.Errorf("layers were %v", got)
	}
}

// TestZstdChunked converts to the other format, where the DiffIDs stay; what is eStargz stays what it is.
func TestZstdChunked(t *testing.T) {
	reg := repositorytest.New(t)
	one, two := plain(t, "one"), lazy(t, "two")
	put(t, reg, "1", "linux/amd64", dockerManifest, one, two)
	opt := Options{Format: NewZstdChunked(zstdchunked.WriteOptions{})}
	dst := repo(t, reg, "dst:1")
	r := must(t, repo(t, reg, "src:1"), dst, opt)
	if got := actions(r); !slices.Equal(got, []Action{Converted, Present}) || !r.Layers[0].Lazy || !r.Layers[1].Lazy {
		t.Errorf("layers were %+v", r.Layers)
	}
	report := wantLazy(t, dst)
	if l := report.Images[0].Layers; l[0].Format != "zstd:chunked" || l[1].Format != "estargz" {
		t.Errorf("layers are %+v", l)
	}
	_, raw := reg.Manifest("dst", "1")
	var m ocispecs.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(reg.Blob("dst", m.Config.Digest), []byte(digest.FromBytes(one.tar))) {
		t.Error("the DiffID has changed")
	}
	reg.Reset()
	if got := actions(must(t, repo(t, reg, "src:1"), dst, opt)); !slices.Equal(got, []Action{Reused, Present}) {
		t.Errorf("layers were %v the second time", got)
	}
	if read, written := reg.Moved(small); read+written > 0 {
		t.Errorf("%d bytes were read and %d written the second time", read, written)
	}
	// And back: the zstd:chunked layer becomes eStargz.
	back := repo(t, reg, "back:1")
	if got := actions(must(t, dst, back, options())); !slices.Equal(got, []Action{Converted, Present}) {
		t.Errorf("layers were %v on the way back", got)
	}
	if l := wantLazy(t, back).Images[0].Layers; l[0].Format != "estargz" {
		t.Errorf("layers are %+v", l)
	}
}

func TestIndex(t *testing.T) {
	reg := repositorytest.New(t)
	shared := plain(t, "shared")
	amd := put(t, reg, "", "linux/amd64", dockerManifest, shared, plain(t, "amd"))
	arm := put(t, reg, "", "linux/arm64", dockerManifest, shared, plain(t, "arm"))
	win := put(t, reg, "", "windows/amd64", dockerManifest, plain(t, "win"))
	attest := func(of ocispecs.Descriptor) ocispecs.Descriptor {
		statement := []byte(`{"subject":"` + of.Digest.String() + `"}`)
		empty := reg.PutBlob("src", []byte("{}"))
		desc := reg.PutManifest("src", "", ocispecs.MediaTypeImageManifest, fmt.Appendf(nil,
			`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[{"mediaType":"application/vnd.in-toto+json","digest":%q,"size":%d}],"subject":{"mediaType":%q,"digest":%q,"size":%d}}`,
			ocispecs.MediaTypeImageManifest, ocispecs.MediaTypeImageConfig, empty, reg.PutBlob("src", statement), len(statement), of.MediaType, of.Digest, of.Size))
		desc.Platform = &ocispecs.Platform{OS: "unknown", Architecture: "unknown"}
		desc.Annotations = map[string]string{annotationAttestation: "attestation-manifest", annotationReference: of.Digest.String()}
		return desc
	}
	amdAttest, armAttest := attest(amd), attest(arm)
	reg.PutManifest("src", "1", dockerList, map[string]any{
		"schemaVersion": 2, "mediaType": dockerList, "annotations": map[string]string{"kept": "too"}, "other": 1,
		"manifests": []any{amdAttest, amd, arm, win, armAttest},
	})
	for name, tt := range map[string]struct {
		wanted []ocispecs.Platform
		from   []ocispecs.Descriptor
	}{
		"all":   {nil, []ocispecs.Descriptor{amdAttest, amd, arm, win, armAttest}},
		"arm64": {[]ocispecs.Platform{{OS: "linux", Architecture: "arm64"}}, []ocispecs.Descriptor{arm, armAttest}},
	} {
		t.Run(name, func(t *testing.T) {
			opt := options()
			opt.Platforms = tt.wanted
			result := must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:"+name), opt)
			mediaType, raw := reg.Manifest("dst", name)
			var index ocispecs.Index
			if err := json.Unmarshal(raw, &index); err != nil {
				t.Fatal(err)
			}
			if mediaType != ocispecs.MediaTypeImageIndex || index.MediaType != mediaType || index.Annotations["kept"] != "too" || !bytes.Contains(raw, []byte(`"other":1`)) ||
				len(index.Manifests) != len(tt.from) || digest.FromBytes(raw) != result.Digest {
				t.Fatalf("index %s", raw)
			}
			now := map[digest.Digest]digest.Digest{}
			for i, m := range index.Manifests {
				now[tt.from[i].Digest] = m.Digest
				if m.Platform.Architecture != tt.from[i].Platform.Architecture {
					t.Errorf("manifest %d is of %v", i, m.Platform)
				}
			}
			for i, m := range index.Manifests {
				of := digest.Digest(tt.from[i].Annotations[annotationReference])
				if of == "" {
					continue
				}
				_, raw := reg.Manifest("dst", m.Digest.String())
				var attestation ocispecs.Manifest
				if err := json.Unmarshal(raw, &attestation); err != nil {
					t.Fatal(err)
				}
				if got := m.Annotations[annotationReference]; got != now[of].String() || attestation.Subject.Digest != now[of] {
					t.Errorf("an attestation is about %s and %s, want %s", got, attestation.Subject.Digest, now[of])
				}
				if !bytes.Contains(reg.Blob("dst", attestation.Layers[0].Digest), []byte(of)) {
					t.Error("the statement was changed")
				}
			}
		})
	}
	opt := options()
	opt.Platforms = []ocispecs.Platform{{OS: "linux", Architecture: "s390x"}}
	_, err := Convert(t.Context(), repo(t, reg, "src:1"), repo(t, reg, "dst:none"), opt)
	if err == nil || !strings.Contains(err.Error(), `has no image for ["linux/s390x"], but for ["linux/amd64" "linux/arm64" "windows/amd64"]`) {
		t.Errorf("error %v", err)
	}
}

func TestKindsOfLayers(t *testing.T) {
	reg := repositorytest.New(t)
	p := tarOf(t, "file")
	var z bytes.Buffer
	w, err := zstd.NewWriter(&z)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(p)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	secret := []byte(strings.Repeat("encrypted", 1000))
	odd := tarOf(t, "caf\xe9")
	for name, tt := range map[string]struct {
		piece
		platform string
		want     Action
		reason   string
		eager    bool
	}{
		"zstd":         {piece: piece{tar: p, blob: z.Bytes(), mediaType: ocispecs.MediaTypeImageLayerZstd}, want: Converted},
		"tar":          {piece: piece{tar: p, blob: p, mediaType: ocispecs.MediaTypeImageLayer}, want: Converted},
		"gzip as tar":  {piece: piece{tar: p, blob: gzipped(t, p), mediaType: "application/vnd.docker.image.rootfs.diff.tar"}, want: Converted},
		"not UTF-8":    {piece: piece{tar: odd, blob: gzipped(t, odd), mediaType: ocispecs.MediaTypeImageLayerGzip}, want: Converted, reason: `can't say what its tar says of "caf\xe9"`, eager: true},
		"encrypted":    {piece: piece{tar: p, blob: secret, mediaType: ocispecs.MediaTypeImageLayerGzip + "+encrypted"}, want: Present, reason: "it is encrypted", eager: true},
		"windows":      {piece: plain(t, "win"), platform: "windows/amd64", want: Present, reason: "it is a layer of Windows", eager: true},
		"foreign":      {piece: piece{tar: p, blob: secret, mediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", urls: []string{"https://example.com/layer"}}, want: Kept, reason: "it is a foreign layer", eager: true},
		"unknown type": {piece: piece{tar: p, blob: secret, mediaType: "application/vnd.oci.image.layer.v2.squashfs"}, want: Present, reason: "is not one of a tar", eager: true},
	} {
		t.Run(name, func(t *testing.T) {
			platform := tt.platform
			if platform == "" {
				platform = "linux/amd64"
			}
			put(t, reg, "1", platform, ocispecs.MediaTypeImageManifest, tt.piece)
			r := must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), options())
			l := r.Layers[0]
			if l.Action != tt.want || l.Lazy == tt.eager || !strings.Contains(l.Reason, tt.reason) || tt.want != Converted && l.To != l.Digest {
				t.Errorf("%+v", l)
			}
			_, raw := reg.Manifest("dst", "1")
			if tt.urls != nil && !bytes.Contains(raw, []byte(tt.urls[0])) {
				t.Errorf("a foreign layer has lost its URL: %s", raw)
			}
		})
	}
}

// Out of a registry into a layout, and from there into another registry: the image is the same.
func TestLayouts(t *testing.T) {
	reg := repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"), plain(t, "two"))
	dir := t.TempDir()
	layout := parsed(t, "oci-layout://"+dir+":tag", reg)
	first := must(t, repo(t, reg, "src:1"), layout, options())
	wantLazy(t, layout)
	if got := actions(must(t, repo(t, reg, "src:1"), layout, options())); !slices.Equal(got, []Action{Reused, Reused}) {
		t.Errorf("layers were %v the second time", got)
	}
	elsewhere := repositorytest.New(t)
	dst := repo(t, elsewhere, "dst:1")
	second := must(t, layout, dst, options())
	wantLazy(t, dst)
	if direct := must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), options()); first.Digest != second.Digest || first.Digest != direct.Digest {
		t.Errorf("images %s, %s and %s; want the same", first.Digest, second.Digest, direct.Digest)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 3 {
		t.Errorf("the layout has %v, %v", left, err)
	}
}

// TestUnusableTablesAreSaid converts a tar that nobody can mount lazily, whatever its table of contents says: the layer isn't said to be lazy, by
// the image or by the result, and converted again it stays as it is.
func TestUnusableTablesAreSaid(t *testing.T) {
	for name, format := range map[string]Format{"estargz": NewEStargz(estargz.WriteOptions{}), "zstdchunked": NewZstdChunked(zstdchunked.WriteOptions{})} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			err := w.WriteHeader(&tar.Header{Name: "link", Linkname: "below", Typeflag: tar.TypeLink})
			if err := errors.Join(err, w.Close()); err != nil {
				t.Fatal(err)
			}
			reg, opt := repositorytest.New(t), Options{Format: format}
			put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest, piece{tar: b.Bytes(), blob: gzipped(t, b.Bytes()), mediaType: ocispecs.MediaTypeImageLayerGzip})
			first := must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), opt)
			if l := first.Layers[0]; l.Lazy || !strings.Contains(l.Reason, `its table of contents can't be used: entry "link"`) {
				t.Errorf("the layer is %+v", l)
			}
			_, raw := reg.Manifest("dst", "1")
			var m ocispecs.Manifest
			if err := json.Unmarshal(raw, &m); err != nil {
				t.Fatal(err)
			}
			if format.Claim(m.Layers[0]) != "" {
				t.Errorf("the layer claims to be lazy: %v", m.Layers[0].Annotations)
			}
			if again := must(t, repo(t, reg, "dst:1"), repo(t, reg, "dst:2"), opt); again.Digest != first.Digest || again.Layers[0].Lazy {
				t.Errorf("converted again it's %+v, and was %s", again, first.Digest)
			}
		})
	}
}

// TestSparse converts tars with sparse files: their layers have no table of contents, and what is unpacked is the same.
func TestSparse(t *testing.T) {
	for name, format := range map[string]Format{"estargz": NewEStargz(estargz.WriteOptions{}), "zstdchunked": NewZstdChunked(zstdchunked.WriteOptions{})} {
		for version, in := range layertest.Sparse(t) {
			reg, opt := repositorytest.New(t), Options{Format: format}
			put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest, piece{tar: in, blob: gzipped(t, in), mediaType: ocispecs.MediaTypeImageLayerGzip})
			first := must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), opt)
			if l := first.Layers[0]; l.Lazy || l.Action != Converted || l.Reason != `a table of contents can't say what its tar says of "hole"` {
				t.Errorf("%s, %s: the layer is %+v", name, version, l)
			}
			blob, err := decompress(bytes.NewReader(reg.Blob("dst", first.Layers[0].To)))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(blob); err != nil || !bytes.Equal(got, in) {
				t.Errorf("%s, %s: %d bytes of %d, %v", name, version, len(got), len(in), err)
			}
			if again := must(t, repo(t, reg, "dst:1"), repo(t, reg, "dst:2"), opt); again.Digest != first.Digest {
				t.Errorf("%s, %s: converted again it's another one", name, version)
			}
		}
	}
}

// TestNothingIsReadBack converts a layer, and reads nothing of what it has written, not even when its table of contents can't be used. Of a registry that
// doesn't say what it has been given, it asks that.
func TestNothingIsReadBack(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: "link", Linkname: "below", Typeflag: tar.TypeLink})
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	unusable := piece{tar: b.Bytes(), blob: gzipped(t, b.Bytes()), mediaType: ocispecs.MediaTypeImageLayerGzip}
	for name, format := range map[string]Format{"estargz": NewEStargz(estargz.WriteOptions{}), "zstdchunked": NewZstdChunked(zstdchunked.WriteOptions{})} {
		for _, silent := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, silent %t", name, silent), func(t *testing.T) {
				reg := repositorytest.New(t)
				reg.Silent = silent
				put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest, plain(t, "one"), unusable)
				r := must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), Options{Format: format})
				want := 0
				if silent {
					want = 1
				}
				for i, l := range r.Layers {
					if l.Lazy != (i == 0) {
						t.Errorf("layer %d is %+v", i, l)
					}
					heads := 0
					for _, q := range reg.Requests() {
						switch {
						case q.Path != "/v2/dst/blobs/"+l.To.String():
						case q.Method == http.MethodHead:
							heads++
						default:
							t.Errorf("layer %d: %s", i, q.Method)
						}
					}
					if heads != want {
						t.Errorf("layer %d: the registry was asked for it %d times, want %d", i, heads, want)
					}
				}
			})
		}
	}
}

// TestImageWithoutLayers converts what FROM scratch makes of settings alone: it has nothing to convert, and is an image.
func TestImageWithoutLayers(t *testing.T) {
	reg := repositorytest.New(t)
	alone := put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest)
	if r := must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), options()); r.Digest != alone.Digest {
		t.Errorf("the image is %s, want %s as it was", r.Digest, alone.Digest)
	}
	docker := put(t, reg, "2", "linux/amd64", dockerManifest)
	if r := must(t, repo(t, reg, "src:2"), repo(t, reg, "dst:2"), options()); r.Digest == docker.Digest {
		t.Error("Docker's media types are kept")
	}
	for _, tag := range []string{"1", "2"} {
		wantLazy(t, repo(t, reg, "dst:"+tag))
	}
}

func TestProgress(t *testing.T) {
	reg := repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"))
	opt := options()
	var begun, done int
	opt.Jobs = 1
	opt.Progress = func(u Update) {
		if u.Layer.Platform != "linux/amd64" || u.Action != Converted {
			t.Errorf("%+v", u)
		}
		if u.Read == 0 {
			begun++
		}
		if u.Done {
			if done++; u.Read != u.Layer.Size {
				t.Errorf("%d bytes of %d were read", u.Read, u.Layer.Size)
			}
		}
	}
	must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), opt)
	if begun != 1 || done != 1 {
		t.Errorf("begun %d times, done %d times", begun, done)
	}
}

func FuzzObject(f *testing.F) {
	f.Add([]byte(`{"a":1,"b":{"c":[1, 2]},"":null}`))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Add([]byte(`{"\u00e9<>":"\ud800"}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		var o object
		if o.UnmarshalJSON(p) != nil {
			return
		}
		out, err := o.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		var before, after any
		if err := errors.Join(json.Unmarshal(p, &before), json.Unmarshal(out, &after)); err != nil {
			t.Fatalf("%s became %s: %v", p, out, err)
		}
		b, _ := json.Marshal(before)
		a, _ := json.Marshal(after)
		if !bytes.Equal(a, b) {
			t.Errorf("%s became %s", p, out)
		}
	})
}
