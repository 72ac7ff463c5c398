package repository

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
)

// TestKilledUploadsAreRemoved leaves of a layout what a process leaves there that is killed in the middle: the next one writes what it wants, and removes
// it, but nothing of who writes at the same time, nor of BuildKit.
func TestKilledUploadsAreRemoved(t *testing.T) {
	dir := t.TempDir()
	begin := func(data string) *layoutUpload {
		t.Helper()
		l, err := newLayout(dir)
		if err != nil {
			t.Fatal(err)
		}
		u, err := l.Create(t.Context())
		if err == nil {
			_, err = u.Write([]byte(data))
		}
		if err != nil {
			t.Fatal(err)
		}
		return u.(*layoutUpload)
	}
	killed := begin("killed")
	if err := errors.Join(killed.w.Close(), killed.of.lock.Close()); err != nil {
		t.Fatal(err)
	}
	w, err := killed.store.Writer(t.Context(), content.WithRef("BuildKit's"))
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	first := begin("first")
	second := begin("second")
	var refs []string
	statuses, err := killed.store.ListStatuses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range statuses {
		refs = append(refs, s.Ref)
	}
	slices.Sort(refs)
	if want := slices.Sorted(slices.Values([]string{"BuildKit's", first.ref, second.ref})); !slices.Equal(refs, want) {
		t.Errorf("uploads %q, want %q", refs, want)
	}
	for u, data := range map[Upload]string{first: "first", second: "second"} {
		if err := u.Commit(t.Context(), digest.FromString(data), int64(len(data))); err != nil {
			t.Errorf("%s: %v", data, err)
		}
	}
}

// TestPartsOfUploadsAreRemoved leaves of uploads what there is of one that was begun where there was no room on the disk: the next one isn't kept from
// writing. What may be somebody's who has just begun stays.
func TestPartsOfUploadsAreRemoved(t *testing.T) {
	dir := t.TempDir()
	for name, ref := range map[string]string{"ours": ingestPrefix + "x", "old": "", "new": "", "BuildKit's": "layer"} {
		path := filepath.Join(dir, "ingest", name)
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, "ref"), []byte(ref), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	yesterday := time.Now().Add(-24 * time.Hour)
	if err := os.Chtimes(filepath.Join(dir, "ingest", "old"), yesterday, yesterday); err != nil {
		t.Fatal(err)
	}
	if err := layoutAt(t, dir).CheckPush(t.Context()); err != nil {
		t.Error(err)
	}
	left, err := os.ReadDir(filepath.Join(dir, "ingest"))
	if err != nil || len(left) != 2 || left[0].Name() != "BuildKit's" || left[1].Name() != "new" {
		t.Errorf("left: %v, %v", left, err)
	}
}
