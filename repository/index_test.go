package repository

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/moby/buildkit/client/ociindex"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

func layoutAt(t *testing.T, ref string) *layout {
	t.Helper()
	l, err := newLayout(ref)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func manifestOf(name string) (desc ocispecs.Descriptor, manifest []byte) {
	manifest = fmt.Appendf(nil, `{"schemaVersion":2,"annotations":{"name":%q}}`, name)
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}, manifest
}

// Who writes to a layout at the same time as others waits for them, and takes nothing from them; who reads finds what was there.
func TestIndexOfSeveral(t *testing.T) {
	dir := t.TempDir()
	first, manifest := manifestOf("first")
	if err := layoutAt(t, dir).PutManifest(t.Context(), first, manifest, "first"); err != nil {
		t.Fatal(err)
	}
	// BuildKit's own, with a name of containerd's, and one that is replaced.
	for _, name := range []ociindex.NameOrTag{ociindex.Name("docker.io/library/x:kept"), ociindex.Tag("0")} {
		if err := ociindex.NewStoreIndex(dir).Put(first, name); err != nil {
			t.Fatal(err)
		}
	}
	var writers, readers sync.WaitGroup
	done := make(chan struct{})
	readers.Go(func() {
		for {
			if got, err := layoutAt(t, dir+":first").Resolve(t.Context()); err != nil || got.Digest != first.Digest {
				t.Errorf("read meanwhile: %v, %v", got, err)
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	want := []string{"first", "kept"}
	for i := range 20 {
		tag := fmt.Sprint(i)
		want = append(want, tag)
		l := layoutAt(t, dir)
		writers.Go(func() {
			desc, manifest := manifestOf(tag)
			if err := l.PutManifest(t.Context(), desc, manifest, tag); err != nil {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()
	index, err := ociindex.NewStoreIndex(dir).Read()
	if err != nil {
		t.Fatal(err)
	}
	var tags []string
	for _, m := range index.Manifests {
		tags = append(tags, m.Annotations[ocispecs.AnnotationRefName])
		if desc, _ := manifestOf(tags[len(tags)-1]); m.Annotations[ocispecs.AnnotationRefName] != "kept" && m.Digest != desc.Digest {
			t.Errorf("%s is %s, want %s", m.Annotations[ocispecs.AnnotationRefName], m.Digest, desc.Digest)
		}
	}
	slices.Sort(tags)
	slices.Sort(want)
	if !slices.Equal(tags, want) {
		t.Errorf("there are %q, want %q", tags, want)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 3 {
		t.Errorf("there are %v, %v", names, err)
	}
}

// as does something with the rights of nobody, if it's root that the tests run as.
func as(t *testing.T, nobody func()) {
	t.Helper()
	if os.Geteuid() == 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := syscall.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := syscall.Setfsuid(0); err != nil {
				t.Fatal(err)
			}
		}()
	}
	nobody()
}

// A layout that one may only read is read, and not written to, which is said before anything is made.
func TestReadOnlyLayout(t *testing.T) {
	t.Setenv("TMPDIR", "/tmp") // nobody may look into every other
	dir := filepath.Join(t.TempDir(), "layout")
	desc, manifest := manifestOf("first")
	if err := layoutAt(t, dir).PutManifest(t.Context(), desc, manifest, "first"); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(dir, ocispecs.ImageIndexFile))
	if err != nil {
		t.Fatal(err)
	}
	// As others than their owner have directories.
	parent := filepath.Dir(dir)
	chmod := func(mode os.FileMode) {
		for _, d := range []string{dir, parent, filepath.Dir(parent)} {
			if err := os.Chmod(d, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	chmod(0o555)
	defer chmod(0o755)
	as(t, func() {
		l := layoutAt(t, dir+":first")
		got, err := l.Resolve(t.Context())
		if err != nil || got.Digest != desc.Digest {
			t.Errorf("resolved: %v, %v", got, err)
		}
		if p, err := ReadAll(t.Context(), l, got, MaxManifest); err != nil || string(p) != string(manifest) {
			t.Errorf("read: %q, %v", p, err)
		}
		if err := l.CheckPush(t.Context()); !errors.Is(err, syscall.EACCES) || !strings.Contains(err.Error(), dir) {
			t.Errorf("CheckPush: %v", err)
		}
		if err := l.name(t.Context(), desc, "second"); !errors.Is(err, syscall.EACCES) {
			t.Errorf("name: %v", err)
		}
	})
	after, err := os.ReadFile(filepath.Join(dir, ocispecs.ImageIndexFile))
	if err != nil || string(after) != string(before) {
		t.Errorf("the index is %s, %v", after, err)
	}
}

// An index that can't be written is the one that was there.
func TestIndexIsReplacedWhole(t *testing.T) {
	dir := t.TempDir()
	desc, manifest := manifestOf("first")
	l := layoutAt(t, dir)
	if err := l.PutManifest(t.Context(), desc, manifest, "first"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, ocispecs.ImageIndexFile)
	if err := replace(path, json.RawMessage("{")); err == nil {
		t.Error("no JSON was written")
	}
	if err := replace(filepath.Join(dir, ocispecs.ImageBlobsDir), "over a directory"); err == nil {
		t.Error("a directory was replaced")
	}
	if got, err := l.Resolve(t.Context()); err != nil || got.Digest != desc.Digest {
		t.Errorf("resolved: %v, %v", got, err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.name(t.Context(), desc, "second"); err == nil || !strings.Contains(err.Error(), ocispecs.ImageIndexFile) {
		t.Errorf("a broken one was replaced: %v", err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 3 {
		t.Errorf("there are %v, %v", names, err)
	}
}
