package fuse

import (
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/mounttest"
)

// What the kernel can do without it isn't asked for: metadata comes once, open and close never.
func TestRequests(t *testing.T) {
	root := t.TempDir()
	f := mounttest.Lay(t, root, mounttest.Build(t, mounttest.File("dir/file", []byte("content")), mounttest.Symlink("link", "dir")))
	var asked counting
	mustMount(t, openDoor(t, Options{Root: root, wrap: func(fs gofuse.RawFileSystem) gofuse.RawFileSystem {
		asked.RawFileSystem = fs
		return &asked
	}}), options(f))
	use := func() {
		mounttest.CheckFile(t, f.Path("link/file"), []byte("content"))
		if _, err := os.Stat(f.Path("dir/none")); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if list, err := os.ReadDir(f.Path("dir")); err != nil || len(list) != 1 {
			t.Error(list, err)
		}
	}
	// Nobody could answer the flush of a file which the server's own process has open when it's killed.
	if s := asked.take(); !strings.Contains(s, "flush") {
		t.Errorf("the mount didn't see to it that there is no flush: %q", s)
	}
	use()
	if s := asked.take(); s == "" || strings.Contains(s, "flush") {
		t.Errorf("asked for %q", s)
	}
	for range 10 {
		use()
	}
	if s := asked.take(); s != "" {
		t.Errorf("asked for what is known: %s", s)
	}
}

// counting notes what is asked for.
type counting struct {
	gofuse.RawFileSystem
	mu    sync.Mutex
	asked []string
}

func (c *counting) note(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, what)
}

func (c *counting) take() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := strings.Join(c.asked, " ")
	c.asked = nil
	return s
}

func (c *counting) Lookup(cancel <-chan struct{}, header *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	c.note("lookup:" + name)
	return c.RawFileSystem.Lookup(cancel, header, name, out)
}

func (c *counting) GetAttr(cancel <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	c.note("getattr")
	return c.RawFileSystem.GetAttr(cancel, in, out)
}

func (c *counting) Access(cancel <-chan struct{}, in *gofuse.AccessIn) gofuse.Status {
	c.note("access")
	return c.RawFileSystem.Access(cancel, in)
}

func (c *counting) Readlink(cancel <-chan struct{}, header *gofuse.InHeader) ([]byte, gofuse.Status) {
	c.note("readlink")
	return c.RawFileSystem.Readlink(cancel, header)
}

func (c *counting) GetXAttr(cancel <-chan struct{}, header *gofuse.InHeader, name string, dest []byte) (uint32, gofuse.Status) {
	c.note("getxattr:" + name)
	return c.RawFileSystem.GetXAttr(cancel, header, name, dest)
}

func (c *counting) Open(cancel <-chan struct{}, in *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	c.note("open")
	return c.RawFileSystem.Open(cancel, in, out)
}

func (c *counting) Read(cancel <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	c.note("read")
	return c.RawFileSystem.Read(cancel, in, buf)
}

func (c *counting) Flush(cancel <-chan struct{}, in *gofuse.FlushIn) gofuse.Status {
	c.note("flush")
	return c.RawFileSystem.Flush(cancel, in)
}

func (c *counting) Release(cancel <-chan struct{}, in *gofuse.ReleaseIn) {
	c.note("release")
	c.RawFileSystem.Release(cancel, in)
}

func (c *counting) OpenDir(cancel <-chan struct{}, in *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	c.note("opendir")
	return c.RawFileSystem.OpenDir(cancel, in, out)
}

func (c *counting) ReadDirPlus(cancel <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	c.note("readdirplus")
	return c.RawFileSystem.ReadDirPlus(cancel, in, out)
}
