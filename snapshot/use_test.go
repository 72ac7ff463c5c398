package snapshot

import (
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
)

// Who has mounted a snapshot says so: until then, and from then on, its layers make room for others.
func TestUse(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		big, small := random(2<<20), random(1<<10)
		lower, upper := layerOf(t, map[string][]byte{"big": big}), layerOf(t, map[string][]byte{"small": small})
		reg := newRegistry(t, nil, lower, upper)
		r := newReopenable(t, reg.options(door))
		r.lazily(reg, "lower", "", lower)
		r.lazily(reg, "upper", "lower", upper)
		if _, err := r.Prepare(t.Context(), "active", "upper"); err != nil {
			t.Fatal(err)
		}
		mounts, err := r.View(t.Context(), "view", "upper")
		if err != nil {
			t.Fatal(err)
		}
		mounted := func(when string, want int) {
			t.Helper()
			if m := mountsBelow(t, r.root); len(m) != want*mountsPerLayer {
				t.Errorf("%s: %d layers are mounted, want %d: %q", when, len(m)/mountsPerLayer, want, m)
			}
		}
		reads := func(dir string) error {
			r.parkAbove(t.Context(), 0, 0)
			mounted("in use", 2)
			wantFile(t, dir, "big", big)
			wantFile(t, dir, "small", small)
			return nil
		}
		r.parkAbove(t.Context(), 0, 0)
		mounted("not mounted yet", 0)
		var releases []func()
		for range 2 {
			release, err := r.Use(t.Context(), mounts)
			if err != nil {
				t.Fatal(err)
			}
			releases = append(releases, release)
		}
		if err := mount.WithTempMount(t.Context(), mounts, reads); err != nil {
			t.Fatal(err)
		}
		releases[0]()
		releases[0]()
		r.parkAbove(t.Context(), 0, 0)
		mounted("used by another", 2)
		releases[1]()
		r.parkAbove(t.Context(), 0, time.Hour)
		mounted("not for long", 2)
		r.parkAbove(t.Context(), 0, 0)
		mounted("not mounted any more", 0)
	})
}

// A layer that can't be mounted once more is an error that says so, and nothing is in use.
func TestUseOfWhatIsGone(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		l := layerOf(t, map[string][]byte{"file": random(2 << 20)})
		reg := newRegistry(t, nil, l)
		requests := countRequests(reg)
		opt := reg.options(door)
		opt.Store.MaxSize = 1
		r := newReopenable(t, opt)
		r.lazily(reg, "base", "", l)
		mounts, err := r.View(t.Context(), "view", "base")
		if err != nil {
			t.Fatal(err)
		}
		r.parkAbove(t.Context(), 0, 0)
		for end := time.Now().Add(30 * time.Second); len(r.Layers()) > 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the store has %v", r.Layers())
			}
		}
		requests.gone.Store(true)
		if release, err := r.Use(t.Context(), mounts); err == nil {
			release()
			t.Error("there is no registry, and no error")
		} else {
			t.Log(err)
		}
		r.parking.mu.Lock()
		if n := len(r.parking.uses); n > 0 {
			t.Errorf("%d directories are in use", n)
		}
		r.parking.mu.Unlock()
		requests.gone.Store(false)
		release, err := r.Use(t.Context(), mounts)
		if err != nil {
			t.Fatal(err)
		}
		release()
	})
}
