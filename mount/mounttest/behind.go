package mounttest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/behind"
)

// cached returns how many pages of a file are in the page cache.
func cached(t testing.TB, f *os.File) int {
	t.Helper()
	var is unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &is, 0); err != nil {
		t.Fatal(err)
	}
	return int(is.Cache)
}

// What is read of a complete layer from the disk is in memory once, but for what was read last. What was written stays there, as nobody may
// have read it.
func testDropBehind(t *testing.T, open Open) {
	const files = 2 * behind.Keep
	var entries []Entry
	for i := range files {
		entries = append(entries, File(fmt.Sprint("file", i), Noise(behind.Block+i)))
	}
	_, f, m := mount(t, open, Build(t, entries...))
	if err := f.Filler.Fill(t.Context(), 0, int64(len(f.Content))); err != nil {
		t.Fatal(err)
	}
	if err := f.Data.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := m.Complete(); err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	block := behind.Block / page
	all := int(f.Layer.DataSize) / page
	forget := func(blocks int64) {
		t.Helper()
		if err := unix.Fadvise(int(f.Data.Fd()), 0, blocks*behind.Block, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
	}
	forget(2)
	time.Sleep(2 * behind.Idle) // looks are what this is about
	CheckFile(t, f.Path("file0"), f.Files["file0"])
	time.Sleep(2 * behind.Idle)
	if n := cached(t, f.Data); n < all-2*block {
		t.Errorf("%d pages of %d are in the page cache: what was written has gone", n, all)
	}

	forget(0) // all
	time.Sleep(2 * behind.Idle)
	if n := cached(t, f.Data); n > block {
		t.Fatalf("%d pages are left in the page cache", n)
	}
	dropCaches(t) // the mount's
	checkFiles(t, f.Target, f.Tree)
	most := behind.Keep * block
	n := cached(t, f.Data)
	for end := time.Now().Add(20 * time.Second); n > most && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		n = cached(t, f.Data)
	}
	if n > most {
		t.Errorf("%d pages of %d are in the page cache twice, want at most %d", n, all, most)
	}
	dropCaches(t)
	checkFiles(t, f.Target, f.Tree)
	if n := f.Filler.Calls.Load(); n > 1 {
		t.Errorf("asked %d times when complete", n-1)
	}
}
