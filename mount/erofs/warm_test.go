package erofs

import (
	"fmt"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resident returns how many pages a file has, and how many of them are in the page cache.
func resident(t *testing.T, path string) (pages, cached int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(p); err != nil {
			t.Error(err)
		}
	}()
	in := make([]byte, (len(p)+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, b := range in {
		cached += int(b & 1)
	}
	return len(in), cached
}

// TestWarm brings all of the metadata into the page cache, out of which it was dropped, and leaves no trace of having it open.
func TestWarm(t *testing.T) {
	d, _ := openDoor(t, t.TempDir())
	content := map[string][]byte{}
	var names []string
	for i := range 2000 {
		name := fmt.Sprintf("file-%04d", i)
		content[name] = []byte{1}
		names = append(names, name)
	}
	f := lay(t, d.opt.Root, content, names...)
	m := mount(t, d, f, f.source(t))
	unix.Sync()
	drop(t, f.opt.Image)
	pages, cached := resident(t, f.opt.Image)
	if cached > pages/2 {
		t.Fatalf("%d pages of %d are still there", cached, pages)
	}
	m.Warm()
	for end := time.Now().Add(10 * time.Second); cached < pages && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		_, cached = resident(t, f.opt.Image)
	}
	if cached < pages {
		t.Errorf("%d pages of %d are there", cached, pages)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	img, err := os.OpenFile(f.opt.Image, unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if inUse(img) {
		t.Error("the image is in use after its mount")
	}
	m.Warm() // of what is unmounted does nothing
}
