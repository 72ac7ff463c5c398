package snapshot

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

const (
	versionFiles = 40
	versionSize  = 100_000
	// versionNew is what of a version isn't in another one, in bytes, and versionEnd what the end of the blob may be at most that is asked for with the
	// table of contents.
	versionNew = versionFiles / 10 * versionSize
	versionEnd = 400_000
)

// dirOf returns how the names of a layer's directories begin.
func dirOf(l testLayer) string { return l.digest.Encoded()[:16] }

// versionOf is a layer one in ten of whose files differ from version to version.
func versionOf(n byte) map[string][]byte {
	files := map[string][]byte{}
	for i := range byte(versionFiles) {
		seed := [32]byte{i}
		if i%10 == 3 {
			seed[1] = n
		}
		p := make([]byte, versionSize)
		_, _ = rand.NewChaCha8(seed).Read(p)
		files[fmt.Sprintf("file%02d", i)] = p
	}
	return files
}

func wantFiles(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, content := range files {
		wantFile(t, dir, name, content)
	}
}

// until waits for something.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not after 30 s: %s", what)
		}
	}
}

// copiesFrom returns how many layers are open to be copied from.
func (r *reopenable) copiesFrom() int {
	x := &r.door.sources
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.open)
}

// keptOrders waits for so many layers to have what others find them by.
func (r *reopenable) keptOrders(n int) {
	r.t.Helper()
	until(r.t, "layers can be found", func() bool {
		found, err := filepath.Glob(filepath.Join(r.root, "store", "layers", "*", "order"))
		return err == nil && len(found) == n
	})
}

// dataFiles returns how many descriptors of the data of layers this process has, of those in directories of a name below root.
func dataFiles(t *testing.T, root, name string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if path, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(path, root) && strings.Contains(path, "/"+name) && strings.Contains(path, "/data") {
			n++
		}
	}
	return n
}

// olderVersion reads all of a version, and opens the snapshotter anew, with nobody using it. What opens next is another version.
func olderVersion(t *testing.T, door string, distrust bool) (r *reopenable, reg *registry, one, two testLayer) {
	t.Helper()
	one, two = layerOf(t, versionOf(1)), layerOf(t, versionOf(2))
	reg = newRegistry(t, nil, one, two)
	opt := reg.options(door)
	opt.Store.Quiet = 100 * time.Millisecond // a layer is done when it's synced
	r = newReopenable(t, opt)
	r.lazily(reg, "one", "", one)
	r.in("on-one", "one", func(dir string) error { wantFiles(t, dir, versionOf(1)); return nil })
	if err := r.Remove(t.Context(), "on-one"); err != nil {
		t.Fatal(err)
	}
	r.keptOrders(1)
	r.opt.Store.Distrust = distrust
	r.reopen(nil)
	return r, reg, one, two
}

// Of the next version of a layer that nobody uses, but the store has, only what is new is fetched, and the older one is closed again.
func TestNextVersionOfALayerInTheStore(t *testing.T) {
	for name, distrust := range map[string]bool{"": false, "after an unclean stop": true} {
		t.Run(name, func(t *testing.T) {
			eachDoor(t, func(t *testing.T, door string) {
				r, reg, one, two := olderVersion(t, door, distrust)
				r.lazily(reg, "two", "", two)
				until(t, "the older version is open", func() bool { return r.copiesFrom() == 1 })
				r.in("on-two", "two", func(dir string) error { wantFiles(t, dir, versionOf(2)); return nil })
				got := r.Summary().Totals
				if got.Fetched < versionNew || got.Fetched > versionNew+versionEnd || got.Copied < versionSize*versionFiles-versionNew-versionEnd {
					t.Errorf("fetched %d bytes and copied %d, of %d of which %d are new", got.Fetched, got.Copied, len(two.blob), versionNew)
				}
				until(t, "the older version is closed", func() bool { return r.copiesFrom() == 0 && dataFiles(t, r.root, dirOf(one)) == 0 })
			})
		})
	}
}

// What is copied from is closed when nobody is left who copies.
func TestSourcesEndWithTheirUsers(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		r, reg, one, two := olderVersion(t, door, false)
		r.lazily(reg, "two", "", two)
		until(t, "the older version is open", func() bool { return r.copiesFrom() == 1 })
		if err := r.Remove(t.Context(), "two"); err != nil {
			t.Fatal(err)
		}
		if err := r.Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
		until(t, "the older version is closed", func() bool { return r.copiesFrom() == 0 && dataFiles(t, r.root, dirOf(one)) == 0 })
	})
}

// An older version is removed though it's copied from: the rest is fetched.
func TestSourceIsRemoved(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		r, reg, one, two := olderVersion(t, door, false)
		r.lazily(reg, "two", "", two)
		until(t, "the older version is open", func() bool { return r.copiesFrom() == 1 })
		files := versionOf(2)
		r.in("on-two", "two", func(dir string) error {
			wantFile(t, dir, "file00", files["file00"])
			before := r.Summary().Totals
			if before.Copied == 0 {
				t.Error("nothing was copied")
			}
			if err := r.Remove(t.Context(), "one"); err != nil {
				t.Fatal(err)
			}
			if err := r.Cleanup(t.Context()); err != nil {
				t.Fatal(err)
			}
			if n := len(r.Layers()); n != 1 || dataFiles(t, r.root, dirOf(one)) > 0 {
				t.Errorf("%d layers are in the store, want the second version, and %d descriptors are of the first", n, dataFiles(t, r.root, dirOf(one)))
			}
			wantFiles(t, dir, files)
			if after := r.Summary().Totals; after.Fetched-before.Fetched < 1<<20 || after.Errors > 0 {
				t.Errorf("%+v, then %+v", before, after)
			}
			return nil
		})
	})
}

// A layer that is copied from is mounted as any other.
func TestSourceIsMounted(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		r, reg, _, two := olderVersion(t, door, false)
		r.lazily(reg, "two", "", two)
		until(t, "the older version is open", func() bool { return r.copiesFrom() == 1 })
		before := r.Summary().Totals.Fetched
		r.in("on-one-again", "one", func(dir string) error { wantFiles(t, dir, versionOf(1)); return nil })
		if n := r.Summary().Totals.Fetched - before; n > 0 {
			t.Errorf("%d bytes were fetched of what was there", n)
		}
		if err := r.Remove(t.Context(), "on-one-again"); err != nil {
			t.Fatal(err)
		}
		r.in("on-two", "two", func(dir string) error { wantFiles(t, dir, versionOf(2)); return nil })
		if n := r.Summary().Totals.Fetched - before; n > versionNew+versionEnd {
			t.Errorf("%d bytes were fetched, of which %d are new", n, versionNew)
		}
	})
}

// However many layers there are, no more than some are open to be copied from, those opened last.
func TestSourcesAreBounded(t *testing.T) {
	var layers []testLayer
	for i := range maxSources + 3 {
		layers = append(layers, layerOf(t, map[string][]byte{"file": []byte(fmt.Sprint(i))}))
	}
	reg := newRegistry(t, nil, layers...)
	r := newReopenable(t, reg.options(DoorFUSE))
	for i, l := range layers {
		r.lazily(reg, fmt.Sprint("layer", i), "", l)
	}
	r.reopen(nil)
	x := &r.door.sources
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, l := range layers {
		o, err := r.door.openSource(t.Context(), store.Key{Blob: l.digest, TOC: l.toc})
		if err != nil {
			t.Fatal(err)
		}
		x.add(o)
	}
	if len(x.open) != maxSources || x.find(store.Key{Blob: layers[0].digest, TOC: layers[0].toc}) != nil {
		t.Errorf("%d are open, want %d, and the first closed", len(x.open), maxSources)
	}
	until(t, "the others are closed", func() bool { return dataFiles(t, r.root, "") == maxSources })
	for _, o := range x.open {
		o.close()
	}
	x.open = nil
	if _, err := r.door.openSource(t.Context(), store.Key{Blob: digest.FromString("none"), TOC: digest.FromString("none")}); err == nil {
		t.Error("a layer was opened that there isn't")
	}
}
