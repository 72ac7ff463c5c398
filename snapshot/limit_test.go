package snapshot

import (
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// Above the limit, layers that nobody uses are dropped, and fetched again when somebody does.
func TestLimit(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		big, other := random(4<<20), random(2<<20)
		one := layerOf(t, map[string][]byte{"big": big})
		two := layerOf(t, map[string][]byte{"other": other})
		reg := newRegistry(t, nil, one, two)
		requests := countRequests(reg)
		opt := reg.options(door)
		r := newReopenable(t, opt)
		r.lazily(reg, "one", "", one)
		r.lazily(reg, "two", "", two)
		mounted := func(when string, limit int64, want int) {
			t.Helper()
			r.parkAbove(t.Context(), limit, 0)
			if m := mountsBelow(t, r.root); len(m) != want*mountsPerLayer {
				t.Errorf("%s: %q are mounted, want %d layers", when, m, want)
			}
		}
		r.in("on-one", "one", func(dir string) error {
			wantFile(t, dir, "big", big)
			r.in("on-two", "two", func(dir string) error {
				wantFile(t, dir, "other", other)
				mounted("both in use", 1<<20, 2)
				return nil
			})
			mounted("one in use", 1<<20, 1)
			return nil
		})
		if err := r.Commit(t.Context(), "child-of-one", "on-one"); err != nil {
			t.Fatal(err)
		}
		mounted("within the limit", 5<<20, 1)
		mounted("unused", 1<<20, 0)
		// It is still there.
		before := requests.n.Load()
		r.in("again", "child-of-one", func(dir string) error { wantFile(t, dir, "big", big); return nil })
		if n := requests.n.Load() - before; n > 0 {
			t.Errorf("%d requests for what was there", n)
		}
		if err := r.Commit(t.Context(), "grandchild", "again"); err != nil {
			t.Fatal(err)
		}

		// By itself, the store drops what nobody has mounted.
		r.opt.Store.MaxSize = 3 << 20
		r.reopen(nil)
		r.in("on-two-again", "two", func(dir string) error {
			wantFile(t, dir, "other", other)
			for end := time.Now().Add(30 * time.Second); r.Layers()[one.digest] > 0; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("the store has %v", r.Layers())
				}
			}
			before = requests.n.Load()
			r.in("once-more", "grandchild", func(dir string) error { wantFile(t, dir, "big", big); return nil })
			if requests.n.Load() == before {
				t.Error("no request for what was dropped")
			}
			if n := r.Layers(); n[two.digest] < int64(len(other)) {
				t.Errorf("what is in use was dropped: %v", n)
			}
			return nil
		})
	})
}

// Who is told that a layer is gone isn't told of one that is only unmounted: to make room, at a restart, or as its tar has been read.
func TestAParkedLayerIsNotRemoved(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		l, other := layerOf(t, map[string][]byte{"file": random(2 << 20)}), layerOf(t, map[string][]byte{"other": []byte("x")})
		reg := newRegistry(t, nil, l, other)
		opt := reg.options(door)
		var told []digest.Digest
		opt.Removed = func(d digest.Digest) { told = append(told, d) }
		r := newReopenable(t, opt)
		want := func(after string, want ...digest.Digest) {
			t.Helper()
			if !slices.Equal(told, want) {
				t.Errorf("%s: told of %q, want %q", after, told, want)
			}
			told = nil
		}
		remove := func(keys ...string) {
			t.Helper()
			for _, key := range keys {
				if err := r.Remove(t.Context(), key); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Cleanup(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		r.lazily(reg, "one", "", l)
		r.lazily(reg, "below", "", other)
		r.lazily(reg, "two", "below", l)
		r.parkAbove(t.Context(), 0, 0)
		r.parkAbove(t.Context(), 0, 0) // the second snapshot of the layer
		if m := mountsBelow(t, r.root); len(m) > 0 {
			t.Errorf("unused, and mounted: %q", m)
		}
		want("parked")
		s, err := r.door.openStored(t.Context(), reg.labels("one", l), nil)
		if err == nil {
			err = r.door.release(s)
		}
		if err != nil {
			t.Fatal(err)
		}
		want("its tar was read")
		r.in("running", "one", func(dir string) error { wantFile(t, dir, "file", random(2<<20)); return nil })
		remove("running", "one")
		want("another snapshot has it")
		r.reopen(func() { told = nil })
		want("after a restart")
		remove("two")
		want("the last snapshot was removed", l.digest)
	})
}

// A limit is kept while the snapshotter runs, not only when it opens.
func TestLimitIsKept(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		l := layerOf(t, map[string][]byte{"file": random(2 << 20)})
		reg := newRegistry(t, nil, l)
		opt := reg.options(door)
		opt.Store.MaxSize = 1 << 20
		r := newReopenable(t, opt)
		stop := r.keepLimit(opt.Store.MaxSize, 20*time.Millisecond)
		defer stop()
		r.lazily(reg, "base", "", l)
		r.in("running", "base", func(dir string) error {
			wantFile(t, dir, "file", random(2<<20))
			time.Sleep(100 * time.Millisecond)
			wantFile(t, dir, "file", random(2<<20))
			return nil
		})
		if err := r.Commit(t.Context(), "child", "running"); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(30 * time.Second); len(r.Layers()) > 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the store has %v", r.Layers())
			}
		}
		r.in("again", "child", func(dir string) error { wantFile(t, dir, "file", random(2<<20)); return nil })
	})
}
