package store

import (
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What arrives is on its way to the disk long before the kernel would write it by itself: nobody who syncs waits for all of it.
func TestWhatArrivesIsWrittenBack(t *testing.T) {
	// On a small one the kernel writes early by itself.
	s := open(t, filepath.Join(mountNew(t, "ext4", 1<<30), "store"), Options{Quiet: time.Hour})
	defer s.Close()
	fx := newFixture("big", newRand(2), 1<<20, 10<<20)
	l := hold(t, s, fx)
	defer l.Release()
	fillAll(t, l, fx)
	dirty := func() int64 {
		var is unix.Cachestat_t
		if err := unix.Cachestat(uint(l.File().Fd()), &unix.CachestatRange{}, &is, 0); err != nil {
			t.Fatal(err)
		}
		return int64(is.Dirty) * int64(unix.Getpagesize())
	}
	for deadline := time.Now().Add(10 * time.Second); dirty() > 10<<20-writeBackFrom/2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes of %d are in memory only", dirty(), 10<<20)
		}
	}
}
