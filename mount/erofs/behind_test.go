package erofs

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wide lays a layer of a few files of two blocks each.
func wide(t testing.TB, dir string) (*files, []string) {
	content := map[string][]byte{}
	var names []string
	for i := range behindKeep {
		name := fmt.Sprintf("file%d", i)
		names = append(names, name)
		content[name] = noise(2*behindBlock + i)
	}
	return lay(t, dir, content, names...), names
}

// fillAll writes the data file, as a source does.
func fillAll(t testing.TB, s *source) {
	t.Helper()
	if err := s.Fill(t.Context(), 0, int64(len(s.content))); err != nil {
		t.Fatal(err)
	}
	if err := s.data.Sync(); err != nil {
		t.Fatal(err)
	}
}

// TestDropBehind reads all of a complete layer from the disk: it's in memory once, but for what was read last.
func TestDropBehind(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	f, names := wide(t, d.opt.Root)
	s := f.source(t)
	m := mount(t, d, f, s)
	fillAll(t, s)
	forgetCache(t, f)
	if err := m.Complete(); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		checkFile(t, f.path(name), f.paths[name])
	}
	page := os.Getpagesize()
	most := behindKeep * behindBlock / page
	pages, cached := resident(t, f.opt.Data)
	for end := time.Now().Add(20 * time.Second); cached > most && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		_, cached = resident(t, f.opt.Data)
	}
	if cached > most {
		t.Errorf("%d pages of %d are in the page cache, want at most %d: by blocks %v, read last %v", cached, pages, most, m.behind.blocks, m.behind.recent)
	}
	for _, name := range names {
		checkFile(t, f.path(name), f.paths[name])
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if m.behind.file.Close() == nil {
		t.Error("the data file was still open")
	}
}

// TestWhatWasWrittenStays doesn't drop what nobody has read yet: it is in memory once.
func TestWhatWasWrittenStays(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	f, names := wide(t, d.opt.Root)
	s := f.source(t)
	m := mount(t, d, f, s)
	fillAll(t, s)
	if err := m.Complete(); err != nil {
		t.Fatal(err)
	}
	// One file comes from the disk.
	if err := unix.Fadvise(int(s.data.Fd()), 0, 2*behindBlock, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * behindIdle) // looks are what this is about
	checkFile(t, f.path(names[0]), f.paths[names[0]])
	time.Sleep(2 * behindIdle)
	if pages, cached := resident(t, f.opt.Data); cached < pages*3/4 {
		t.Errorf("%d pages of %d are in the page cache", cached, pages)
	}
}
