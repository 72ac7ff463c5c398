package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

// What can't be converted is an error that names layer and image; nothing is named, no upload is left, and no byte of a layer read in vain.
func TestBadInput(t *testing.T) {
	good := plain(t, "good")
	tarred := func(name string) piece {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg}), w.Close()); err != nil {
			t.Fatal(err)
		}
		return piece{tar: b.Bytes(), blob: gzipped(t, b.Bytes()), mediaType: ocispecs.MediaTypeImageLayerGzip}
	}
	cut := func(n int) piece {
		return piece{tar: good.tar[:n], blob: gzipped(t, good.tar[:n]), mediaType: ocispecs.MediaTypeImageLayerGzip}
	}
	truncated := piece{tar: good.tar, blob: good.blob[:len(good.blob)/2], mediaType: ocispecs.MediaTypeImageLayerGzip}
	broken := piece{tar: good.tar, blob: slices.Clone(good.blob), mediaType: ocispecs.MediaTypeImageLayerGzip}
	broken.blob[len(broken.blob)-6] ^= 1 // its checksum
	otherDiff := good
	otherDiff.tar = []byte("another")
	for name, tt := range map[string]struct {
		piece piece
		fault func(reg *repositorytest.Registry)
		want  []string
	}{
		"reserved name":   {piece: tarred("stargz.index.json"), want: []string{`"stargz.index.json"`}},
		"tar ends early":  {piece: cut(1000), want: []string{"unexpected EOF", "the source is damaged; make it anew"}},
		"gzip ends early": {piece: truncated, want: []string{"unexpected EOF", "the source is damaged; make it anew"}},
		"gzip is broken":  {piece: broken, want: []string{"checksum", "the source is damaged; make it anew"}},
		"no tar":          {piece: piece{tar: []byte("x"), blob: []byte(strings.Repeat("no tar", 500)), mediaType: ocispecs.MediaTypeImageLayer}, want: []string{"tar", "the source is damaged"}},
		"wrong DiffID":    {piece: otherDiff, want: []string{"its DiffID is " + digest.FromBytes(good.tar).String(), "the source is damaged"}},
		"blob is gone":    {piece: good, fault: func(reg *repositorytest.Registry) { reg.DeleteBlob("src", digest.FromBytes(good.blob)) }, want: []string{"404"}},
		"no right to push": {piece: good, fault: func(reg *repositorytest.Registry) {
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodPost && strings.HasPrefix(r.URL.Path, "/v2/dst/") {
					w.WriteHeader(http.StatusForbidden)
					return true
				}
				if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, digest.FromBytes(good.blob).String()) {
					t.Error("a layer was read that nobody may write")
				}
				return false
			}
		}, want: []string{"dst:1", "403 Forbidden", "docker login"}},
		"manifest refused": {piece: good, fault: func(reg *repositorytest.Registry) {
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodPut && strings.HasPrefix(r.URL.Path, "/v2/dst/manifests/") {
					w.WriteHeader(http.StatusUnprocessableEntity)
					return true
				}
				return false
			}
		}, want: []string{"push manifest", "422"}},
		"other bytes": {piece: good, fault: func(reg *repositorytest.Registry) {
			other := plain(t, "evil").blob
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, digest.FromBytes(good.blob).String()) {
					return false
				}
				_, _ = w.Write(append(other, make([]byte, len(good.blob))...)[:len(good.blob)])
				return true
			}
		}, want: []string{"other bytes than it promised"}},
	} {
		for format, opt := range map[string]Options{"estargz": options(), "zstdchunked": {Format: NewZstdChunked(zstdchunked.WriteOptions{})}} {
			t.Run(name+" "+format, func(t *testing.T) {
				reg := repositorytest.New(t)
				put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest, tt.piece)
				if tt.fault != nil {
					tt.fault(reg)
				}
				_, err := Convert(t.Context(), repo(t, reg, "src:1"), repo(t, reg, "dst:1"), opt)
				if name == "reserved name" && format == "zstdchunked" {
					if err != nil {
						t.Error(err)
					}
					return
				}
				want := tt.want
				if tt.fault == nil {
					want = append([]string{"layer " + digest.FromBytes(tt.piece.blob).String()}, want...)
				}
				for _, want := range want {
					if err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("error %v, want %q in it", err, want)
					}
				}
				if _, m := reg.Manifest("dst", "1"); m != nil {
					t.Error("the destination is named")
				}
				if n := reg.Uploads(); n != 0 {
					t.Errorf("%d uploads are left", n)
				}
			})
		}
	}
}

func TestRefused(t *testing.T) {
	reg := repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", ocispecs.MediaTypeImageManifest, plain(t, "one"))
	reg.PutManifest("src", "old", "application/vnd.docker.distribution.manifest.v1+prettyjws", []byte(`{"schemaVersion":1}`))
	reg.PutManifest("src", "chart", ocispecs.MediaTypeImageManifest, fmt.Appendf(nil, `{"schemaVersion":2,"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":%q,"size":2},"layers":[]}`, reg.PutBlob("src", []byte("{}"))))
	for from, want := range map[string]string{
		"src:1 src:1":     "is both source and destination",
		"src:gone dst:1":  "src:gone: not found",
		"src:chart dst:1": "is no container image, and there is nothing in it to convert: it's application/vnd.cncf.helm.config.v1+json",
		"src:old dst:1":   "schema 1",
		"src:1 dst@" + digest.FromString("x").String(): "name the destination by a tag",
	} {
		src, dst, _ := strings.Cut(from, " ")
		_, err := Convert(t.Context(), repo(t, reg, src), repo(t, reg, dst), options())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q in it", from, err, want)
		}
	}
}

// A conversion that was broken off goes on where it was: what is complete isn't read again.
func TestInterrupted(t *testing.T) {
	reg := repositorytest.New(t)
	one, two := plain(t, "one"), plain(t, "two")
	put(t, reg, "1", "linux/amd64", dockerManifest, one, two)
	src, dst, dir := repo(t, reg, "src:1"), repo(t, reg, "dst:1"), t.TempDir()
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("stopped")
	reg.Fault = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, digest.FromBytes(two.blob).String()) {
			cancel(stopped)
			<-r.Context().Done()
			return true
		}
		return false
	}
	opt := options()
	opt.State, opt.Jobs = state(t, dir), 1
	if _, err := Convert(ctx, src, dst, opt); !errors.Is(err, stopped) {
		t.Errorf("error %v, want %v", err, stopped)
	}
	if _, m := reg.Manifest("dst", "1"); m != nil || reg.Uploads() != 0 {
		t.Errorf("%d uploads are left, and the manifest %s", reg.Uploads(), m)
	}
	reg.Fault = nil
	reg.Reset()
	opt = options()
	opt.State = state(t, dir)
	if got := actions(must(t, src, dst, opt)); !slices.Equal(got, []Action{Reused, Converted}) {
		t.Errorf("layers were %v", got)
	}
	for _, r := range reg.Requests() {
		if r.Method == http.MethodGet && strings.HasSuffix(r.Path, digest.FromBytes(one.blob).String()) {
			t.Error("the first layer was read again")
		}
	}
	wantLazy(t, dst)
}

// An upload that breaks off is made again.
func TestUploadBreaksOff(t *testing.T) {
	reg := repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"))
	var n atomic.Int32
	reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch || n.Add(1) > 2 {
			return false
		}
		_, _ = io.CopyN(io.Discard, r.Body, 100<<10)
		if n.Load() == 1 {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	dst := repo(t, reg, "dst:1")
	must(t, repo(t, reg, "src:1"), dst, options())
	wantLazy(t, dst)
	if reg.Uploads() != 0 {
		t.Errorf("%d uploads are left", reg.Uploads())
	}
}

// A registry, or a proxy in front of it, that doesn't take a layer in one stream has the image all the same.
func TestRegistryWithoutStreams(t *testing.T) {
	for name, refuse := range map[string]func(r *http.Request) int{
		"no PATCH": func(*http.Request) int { return http.StatusMethodNotAllowed },
		"limited": func(r *http.Request) int {
			if r.ContentLength < 0 {
				return http.StatusRequestEntityTooLarge
			}
			return 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := repositorytest.New(t)
			put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"), plain(t, "two"))
			reg.Fault = func(w http.ResponseWriter, r *http.Request) bool {
				status := 0
				if r.Method == http.MethodPatch {
					status = refuse(r)
				}
				if status != 0 {
					w.WriteHeader(status)
				}
				return status != 0
			}
			dst := repo(t, reg, "dst:1")
			must(t, repo(t, reg, "src:1"), dst, options())
			wantLazy(t, dst)
			if reg.Uploads() != 0 {
				t.Errorf("%d uploads are left", reg.Uploads())
			}
		})
	}
}

// What a state directory says is not believed if it can't be true.
func TestBadState(t *testing.T) {
	reg := repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", dockerManifest, plain(t, "one"))
	dir := t.TempDir()
	opt := options()
	opt.State = state(t, dir)
	must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), opt)
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, content := range []string{"", "{}", `{"from":"x"}`, "null"} {
		if err := os.WriteFile(dir+"/"+files[0].Name(), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		dst := repo(t, reg, "dst:2")
		must(t, repo(t, reg, "src:1"), dst, opt)
		wantLazy(t, dst)
	}
	// The blob is gone from where it was.
	reg2 := repositorytest.New(t)
	put(t, reg2, "1", "linux/amd64", dockerManifest, plain(t, "one"))
	if got := actions(must(t, repo(t, reg2, "src:1"), repo(t, reg2, "dst:1"), opt)); !slices.Equal(got, []Action{Converted}) {
		t.Errorf("layers were %v", got)
	}
}

// A state directory, whatever its path looks like, forgets what nobody has asked for in a long time. Files of others that are in it stay.
func TestStateForgets(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a [1]*")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	remembered := func(s string) string { return digest.FromString(s).Encoded() + ".json" }
	stay := []string{
		remembered("young"), "package.json", "tsconfig.json", "old.json.tmp", "new-file.json.tmp", "new-.json.tmp", "a" + remembered("old"), remembered("old") + "5",
	}
	for _, name := range append([]string{remembered("old"), "new-123.json.tmp"}, stay...) {
		age := 2 * keepFor
		if name == remembered("young") {
			age = keepFor / 2
		}
		path, at := filepath.Join(dir, name), time.Now().Add(-age)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	s := state(t, dir)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, f := range files {
		left = append(left, f.Name())
	}
	slices.Sort(stay)
	if !slices.Equal(left, stay) {
		t.Errorf("left are %q, want %q", left, stay)
	}
	if name := filepath.Base(s.path(memoryKey{})); !ours.MatchString(name) {
		t.Errorf("%s is written, and never forgotten", name)
	}
}

// TestPlatformMissing converts an index whose image for one platform isn't there, as copies of one platform leave it.
func TestPlatformMissing(t *testing.T) {
	reg := repositorytest.New(t)
	amd64 := put(t, reg, "amd64", "linux/amd64", ocispecs.MediaTypeImageManifest, plain(t, "one"))
	gone := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 7, Platform: &ocispecs.Platform{OS: "linux", Architecture: "s390x"}}
	index, err := json.Marshal(ocispecs.Index{MediaType: ocispecs.MediaTypeImageIndex, Manifests: []ocispecs.Descriptor{amd64, gone}})
	if err != nil {
		t.Fatal(err)
	}
	reg.PutManifest("src", "1", ocispecs.MediaTypeImageIndex, index)
	_, err = Convert(t.Context(), repo(t, reg, "src:1"), repo(t, reg, "dst:1"), options())
	if err == nil || !strings.Contains(err.Error(), "the image for linux/s390x is in the index, and not there") || !strings.Contains(err.Error(), "convert the other platforms") {
		t.Errorf("error %v", err)
	}
	opt := options()
	opt.Platforms = []ocispecs.Platform{*amd64.Platform}
	must(t, repo(t, reg, "src:1"), repo(t, reg, "dst:1"), opt)
}
