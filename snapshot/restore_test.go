package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/reference"
	cerrdefs "github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// reopenable is a snapshotter that a test closes and opens again.
type reopenable struct {
	*Snapshotter
	t    *testing.T
	root string
	opt  Options
}

// newReopenable makes a snapshotter that can be closed and opened again.
func newReopenable(t *testing.T, opt Options) *reopenable {
	t.Helper()
	s, root := newSnapshotter(t, opt)
	return &reopenable{s, t, root, opt}
}

// reopen closes the snapshotter, has something done, and opens it.
func (r *reopenable) reopen(meanwhile func()) {
	r.t.Helper()
	if err := r.Close(); err != nil {
		r.t.Fatal(err)
	}
	if m := mountsBelow(r.t, r.root); len(m) > 0 {
		r.t.Fatalf("mounts left by Close: %q", m)
	}
	if meanwhile != nil {
		meanwhile()
	}
	s, err := New(r.root, r.opt)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Snapshotter = s
	r.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			r.t.Errorf("Close: %v", err)
		}
	})
}

// lazily prepares a lazy layer.
func (r *reopenable) lazily(reg *registry, target, parent string, l testLayer) {
	r.t.Helper()
	_, err := r.Prepare(r.t.Context(), "key-"+target, parent, snapshots.WithLabels(reg.labels(target, l)))
	if !cerrdefs.IsAlreadyExists(err) {
		r.t.Fatalf("Prepare of %s: %v", target, err)
	}
}

// in does something in a directory with what is in a new container on top of parent.
func (r *reopenable) in(key, parent string, do func(dir string) error) {
	r.t.Helper()
	mounts, err := r.Prepare(r.t.Context(), key, parent)
	var release func()
	if err == nil {
		release, err = r.Use(r.t.Context(), mounts)
	}
	if err == nil {
		err = mount.WithTempMount(r.t.Context(), mounts, do)
		release()
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// wantFile compares a file.
func wantFile(t *testing.T, dir, name string, want []byte) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
	}
}

// requestCounter is a registry's handler that counts requests, and has them answered by the registry until it's told not to.
type requestCounter struct {
	n    atomic.Int64
	gone atomic.Bool
}

func countRequests(reg *registry) *requestCounter {
	c := &requestCounter{}
	next := reg.Config.Handler
	reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		c.n.Add(1)
		if c.gone.Load() {
			http.NotFound(w, req)
			return
		}
		next.ServeHTTP(w, req)
	})
	return c
}

// What was mounted before is there after a restart, without the registry, and so is what is built on it.
func TestRestartKeepsLayers(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		small, big := []byte("hello\n"), random(4<<20)
		lower := layerOf(t, map[string][]byte{"small": small, "unread": big})
		upper := layerOf(t, map[string][]byte{"above": []byte("above\n")})
		reg := newRegistry(t, nil, lower, upper)
		requests := countRequests(reg)
		r := newReopenable(t, reg.options(door))
		r.lazily(reg, "lower", "", lower)
		r.lazily(reg, "upper", "lower", upper)
		r.in("running", "upper", func(dir string) error {
			wantFile(t, dir, "small", small)
			wantFile(t, dir, "above", []byte("above\n"))
			return os.WriteFile(filepath.Join(dir, "made"), []byte("made\n"), 0o600)
		})
		if err := r.Commit(t.Context(), "child", "running"); err != nil {
			t.Fatal(err)
		}
		before := requests.n.Load()

		r.reopen(nil)
		if m := mountsBelow(t, r.root); len(m) > 0 {
			t.Errorf("mounted before anybody asks: %q", m)
		}
		r.in("again", "child", func(dir string) error {
			wantFile(t, dir, "small", small)
			wantFile(t, dir, "above", []byte("above\n"))
			wantFile(t, dir, "made", []byte("made\n"))
			if n := requests.n.Load() - before; n > 0 {
				t.Errorf("%d requests for what was there", n)
			}
			wantFile(t, dir, "unread", big)
			if requests.n.Load() == before {
				t.Error("no request for what was missing")
			}
			return nil
		})

		// What nobody has used since goes as well.
		r.reopen(nil)
		for _, key := range []string{"again", "child", "upper", "lower"} {
			if err := r.Remove(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
		if left := r.door.store.Usage(); len(left) > 0 {
			t.Errorf("left in the store: %+v", left)
		}
	})
}

// Several who use a layer after a restart have it mounted once.
func TestRestartMountsOnce(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		l := layerOf(t, map[string][]byte{"file": []byte("x")})
		reg := newRegistry(t, nil, l)
		r := newReopenable(t, reg.options(door))
		r.lazily(reg, "base", "", l)
		r.reopen(nil)
		var wg sync.WaitGroup
		for _, key := range []string{"a", "b", "c", "d"} {
			wg.Go(func() {
				if _, err := r.View(t.Context(), key, "base"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if m := mountsBelow(t, r.root); len(m) != mountsPerLayer {
			t.Errorf("mounts: %q", m)
		}
	})
}

// A layer that the store has lost, or has in bits, is opened anew from its registry; if that hasn't got it, whoever
// uses it hears so, and it can be removed.
func TestRestartWithoutStore(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		damage := map[string]func(t *testing.T, root string){
			"gone": func(t *testing.T, root string) {
				if err := os.RemoveAll(filepath.Join(root, "store")); err != nil {
					t.Fatal(err)
				}
			},
			"table of contents damaged": func(t *testing.T, root string) {
				found, err := filepath.Glob(filepath.Join(root, "store", "layers", "*", "toc"))
				if err != nil || len(found) != 1 {
					t.Fatalf("tables of contents %q, %v", found, err)
				}
				if err := os.Truncate(found[0], 20); err != nil {
					t.Fatal(err)
				}
			},
			"image and data damaged": func(t *testing.T, root string) {
				for _, name := range []string{"image", "data"} {
					found, err := filepath.Glob(filepath.Join(root, "store", "layers", "*", name))
					if err != nil || len(found) != 1 && (name == "data" || door == DoorEROFS) {
						t.Fatalf("%s: %q, %v", name, found, err)
					}
					if len(found) == 0 {
						continue // FUSE needs no image
					}
					if err := os.Truncate(found[0], 20); err != nil {
						t.Fatal(err)
					}
				}
			},
		}
		for name, harm := range damage {
			t.Run(name, func(t *testing.T) {
				l := layerOf(t, map[string][]byte{"file": random(100_000)})
				reg := newRegistry(t, nil, l)
				requests := countRequests(reg)
				r := newReopenable(t, reg.options(door))
				r.lazily(reg, "base", "", l)
				r.in("first", "base", func(dir string) error {
					wantFile(t, dir, "file", random(100_000))
					return nil
				})
				r.reopen(func() { harm(t, r.root) })
				r.in("second", "base", func(dir string) error {
					wantFile(t, dir, "file", random(100_000))
					return nil
				})
				if name != "gone" {
					return
				}
				r.reopen(func() { harm(t, r.root); requests.gone.Store(true) })
				_, err := r.Prepare(t.Context(), "third", "base")
				if err == nil || !strings.Contains(err.Error(), l.digest.String()) || !strings.Contains(err.Error(), "404") {
					t.Errorf("Prepare: %v; want an error with the layer and the registry's answer", err)
				}
				if m := mountsBelow(t, r.root); len(m) > 0 {
					t.Errorf("mounts: %q", m)
				}
				for _, key := range []string{"first", "second", "base"} {
					if err := r.Remove(t.Context(), key); err != nil {
						t.Error(err)
					}
				}
				if err := r.Cleanup(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
	})
}

// The sessions of an earlier daemon's clients are not asked for credentials; those of new ones are.
func TestRestartForgetsSessions(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		l := layerOf(t, map[string][]byte{"file": random(100_000)})
		reg := newRegistry(t, nil, l)
		opt := reg.options(door)
		hosts := opt.Hosts
		var mu sync.Mutex
		var asked []string
		opt.Hosts = func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error) {
			mu.Lock()
			asked = append(asked, strings.Join(sessions, ","))
			mu.Unlock()
			return hosts(ref, sessions)
		}
		r := newReopenable(t, opt)
		r.lazily(reg, "base", "", l)
		label := func(id, session string) {
			key := labelSession + "0." + id
			if _, err := r.Update(t.Context(), snapshots.Info{
				Name: "base", Labels: map[string]string{key: session, LabelRef + "." + id: "x"},
			}, "labels."+key, "labels."+LabelRef+"."+id); err != nil {
				t.Fatal(err)
			}
		}
		label("one", "of-old")
		r.reopen(func() { asked = nil })
		info, err := r.Stat(t.Context(), "base")
		if err != nil || info.Labels[LabelRef] == "" || info.Labels[LabelRef+".one"] != "" || len(Sessions(info.Labels)) > 0 {
			t.Errorf("labels %v, %v", info.Labels, err)
		}
		label("two", "of-new")
		r.in("running", "base", func(dir string) error {
			wantFile(t, dir, "file", random(100_000))
			return nil
		})
		mu.Lock()
		defer mu.Unlock()
		if len(asked) == 0 || strings.Contains(strings.Join(asked, ","), "of-old") || !strings.Contains(strings.Join(asked, ","), "of-new") {
			t.Errorf("hosts were asked for with the sessions %q", asked)
		}
	})
}

// A lazy layer takes what has arrived of it, until the last snapshot that has it is removed.
func TestUsageAndRemoval(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		big := random(4 << 20)
		l := layerOf(t, map[string][]byte{"small": []byte("x"), "big": big})
		other := layerOf(t, map[string][]byte{"other": []byte("y")})
		reg := newRegistry(t, nil, l, other)
		r := newReopenable(t, reg.options(door))
		r.lazily(reg, "one", "", l)
		r.lazily(reg, "below", "", other)
		r.lazily(reg, "two", "below", l)
		size := func(key string) int64 {
			t.Helper()
			u, err := r.Usage(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			return u.Size
		}
		before := size("one")
		r.in("running", "one", func(dir string) error {
			wantFile(t, dir, "big", big)
			return nil
		})
		unix.Sync() // blocks are counted when they are allocated
		after := size("one")
		// What the store notes of a layer by and by may take a block more.
		same := func(n int64) bool { return max(n, after)-min(n, after) <= 64<<10 }
		if before == 0 || after-before < int64(len(big)) || !same(size("two")) || !same(r.Layers()[l.digest]) {
			t.Errorf("usage %d, then %d and %d, by layer %v", before, after, size("two"), r.Layers())
		}
		remove := func(keys ...string) {
			t.Helper()
			for _, key := range keys {
				if err := r.Remove(t.Context(), key); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Cleanup(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		remove("running", "one")
		if got := size("two"); !same(got) {
			t.Errorf("usage %d after the other snapshot was removed, was %d", got, after)
		}
		remove("two", "below")
		if left := r.Layers(); len(left) > 0 {
			t.Errorf("left in the store: %v", left)
		}
	})
}

// A layer is mounted once more, from the store or from the registry, by a build that would have pulled it, whose labels say where it is and nothing else.
func TestRestartBeforeABuildThatPulls(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		content := random(300_000)
		l, plain, headers := podmanLayer(t, map[string][]byte{"file": content})
		reg := newRegistry(t, nil, l)
		r := newReopenable(t, reg.options(door))
		labels := reg.labels("base", l)
		labels[LabelFormats] = FormatLabel(zstdchunked.Position{})
		if _, err := r.Prepare(t.Context(), "key", "", snapshots.WithLabels(labels)); !cerrdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
		for key, meanwhile := range map[string]func(){
			"kept": nil,
			"lost": func() {
				if err := os.RemoveAll(filepath.Join(r.root, "store")); err != nil {
					t.Fatal(err)
				}
			},
		} {
			r.reopen(meanwhile)
			r.build("base", key, map[string]string{LabelRef: labels[LabelRef], LabelDigest: labels[LabelDigest]})
			r.in("in-"+key, "base", func(dir string) error { wantFile(t, dir, "file", content); return nil })
			tr, _, err := r.Tar(t.Context(), labels, nil, headers)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(tr)
			if err := errors.Join(err, tr.Close()); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%s: a tar of %d bytes, want %d: %v", key, len(got), len(plain), err)
			}
		}
	})
}
