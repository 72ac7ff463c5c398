package repository

import (
	"errors"
	"slices"
	"testing"

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
