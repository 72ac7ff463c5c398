package snapshot

import (
	"testing"
	"time"
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
		r.in("on-one", "one", func(dir string) error { wantFile(t, dir, "big", big); return nil })
		r.in("on-two", "two", func(dir string) error { wantFile(t, dir, "other", other); return nil })
		mounts := len(mountsBelow(t, r.root))

		r.parkAbove(t.Context(), 1<<20)
		if m := mountsBelow(t, r.root); len(m) != mounts {
			t.Errorf("in use, and unmounted: %q are left of %d", m, mounts)
		}
		if err := r.Commit(t.Context(), "child-of-one", "on-one"); err != nil {
			t.Fatal(err)
		}
		r.parkAbove(t.Context(), 1<<20)
		if m := mountsBelow(t, r.root); len(m) != mounts-mountsPerLayer {
			t.Errorf("unused, and mounted: %q are left of %d", m, mounts)
		}
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
		r.in("on-two-again", "two", func(dir string) error { wantFile(t, dir, "other", other); return nil })
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
