package convert

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/inspect"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository/repositorytest"
)

// threeFiles is a layer of the files a, b and c.
func threeFiles(t *testing.T) piece {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"a", "b", "c"} {
		one := tar.NewReader(bytes.NewReader(tarOf(t, name)))
		h, err := one.Next()
		if err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(w, one); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return piece{tar: b.Bytes(), blob: gzipped(t, b.Bytes()), mediaType: dockerLayer}
}

func namesOf(t *testing.T, p []byte) (names []string) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(p)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}

// The files of a list come first, in the layers that are converted. Another list makes other layers, and the same one is remembered.
func TestInOrder(t *testing.T) {
	reg := repositorytest.New(t)
	put(t, reg, "1", "linux/amd64", dockerManifest, threeFiles(t), plain(t, "other"), lazy(t, "lazy"))
	src, dst, dir := repo(t, reg, "src:1"), repo(t, reg, "dst:1"), t.TempDir()
	by := func(text string) Options {
		opt := options()
		opt.Format = InOrder(opt.Format, mustParse(t, text), dir)
		return opt
	}
	for _, c := range []struct {
		list    string
		actions []Action
		first   int
		names   []string
	}{
		{"/c\n/b\n", []Action{Converted, Converted, Present}, 2, []string{"c", "b", ".prefetch.landmark", "a"}},
		{"# again\nc\nb\n", []Action{Reused, Reused, Present}, 0, []string{"c", "b", ".prefetch.landmark", "a"}},
		{"b", []Action{Converted, Converted, Present}, 1, []string{"b", ".prefetch.landmark", "a", "c"}},
	} {
		result := must(t, src, dst, by(c.list))
		if got := actions(result); !slices.Equal(got, c.actions) || result.Layers[0].First != c.first || result.Layers[1].First != 0 {
			t.Errorf("by %q layers were %v, of the first %d files come first", c.list, got, result.Layers[0].First)
		}
		_, raw := reg.Manifest("dst", "1")
		var m ocispecs.Manifest
		var im ocispecs.Image
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(reg.Blob("dst", m.Config.Digest), &im); err != nil {
			t.Fatal(err)
		}
		for i, want := range [][]string{c.names, {".no.prefetch.landmark", "other"}, {"lazy"}} {
			p := inflate(t, reg.Blob("dst", m.Layers[i].Digest))
			if got := namesOf(t, p); !slices.Equal(got[:len(want)], want) {
				t.Errorf("by %q layer %d has %q, want %q", c.list, i, got, want)
			}
			if im.RootFS.DiffIDs[i] != digest.FromBytes(p) {
				t.Errorf("by %q the DiffID of layer %d is wrong", c.list, i)
			}
		}
		report := wantLazy(t, dst)
		first := slices.Index(c.names, ".prefetch.landmark")
		if l := report.Images[0].Layers[0]; l.Landmark != inspect.Prefetch || l.Prefetch < int64(first)*layerSize {
			t.Errorf("by %q layer 0 has the landmark %s, behind %d bytes", c.list, l.Landmark, l.Prefetch)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("left on disk: %q, %v", left, err)
	}
	opt := options()
	opt.Format = InOrder(opt.Format, mustParse(t, "a"), filepath.Join(dir, "gone"))
	if _, err := Convert(t.Context(), src, repo(t, reg, "dst:2"), opt); err == nil {
		t.Error("converted without a place for the tar")
	}
}

func mustParse(t *testing.T, text string) *order.List {
	t.Helper()
	list, err := order.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return list
}
