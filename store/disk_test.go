package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
}

// mountSmall mounts a filesystem of 16 MiB.
func mountSmall(t *testing.T, fstype string) (dir string) {
	t.Helper()
	return mountNew(t, fstype, 16<<20)
}

// mountNew mounts a filesystem of a size.
func mountNew(t *testing.T, fstype string, size int64) (dir string) {
	t.Helper()
	needRoot(t)
	return mountIn(t, t.TempDir(), fstype, size)
}

// mountIn mounts a filesystem that is in a file of a directory, if it has to be in one.
func mountIn(t *testing.T, disk, fstype string, size int64) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if fstype == "tmpfs" {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprint("size=", size)); err != nil {
			t.Fatal(err)
		}
	} else {
		image := filepath.Join(disk, "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, size); err != nil {
			t.Fatal(err)
		}
		for _, cmd := range [][]string{{"mkfs." + fstype, "-q", image}, {"mount", "-o", "loop", image, dir}} {
			if out, err := exec.CommandContext(t.Context(), cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", cmd, err, out)
			}
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// A full disk is an error that says so, nothing is claimed that wasn't written, and the store goes on when there is
// space.
func TestFullDisk(t *testing.T) {
	for _, fstype := range []string{"tmpfs", "ext4"} {
		t.Run(fstype, func(t *testing.T) {
			root := filepath.Join(mountSmall(t, fstype), "store")
			s := open(t, root, Options{})
			old := newFixture("old", newRand(1), 1<<20, 4<<20)
			l := hold(t, s, old)
			fillAll(t, l, old)
			l.Release()
			fx := newFixture("big", newRand(2), 100_000, 20<<20)
			l = hold(t, s, fx)
			var failed []int
			for i := range fx.model.Chunks {
				err := l.WriteChunk(fx.verified(i))
				if err == nil {
					continue
				}
				for _, want := range []string{fmt.Sprint("chunk ", i), string(fx.key.Blob), root} {
					if !strings.Contains(err.Error(), want) {
						t.Fatalf("%v: doesn't name %s", err, want)
					}
				}
				if !errors.Is(err, unix.ENOSPC) || l.Have(i) {
					t.Fatalf("%v, Have: %v", err, l.Have(i))
				}
				failed = append(failed, i)
			}
			if len(failed) < 50 {
				t.Fatalf("only %d of %d chunks found the disk full", len(failed), len(fx.model.Chunks))
			}
			checkRight(t, l, fx)
			if err := l.SetOrigin(make([]byte, 1<<20)); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("SetOrigin: %v", err)
			}
			if _, err := s.Create(Key{old.key.Blob, fx.key.TOC}, bytes.NewReader(make([]byte, 1<<20))); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("Create: %v", err)
			}
			t.Logf("%d of %d chunks failed; settling on a full disk: %v", len(failed), len(fx.model.Chunks), l.Settle())
			have := checkRight(t, l, fx)

			// A restart on the full disk loses nothing, whether there was space for the map or not.
			if err := s.Close(); err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			s = open(t, root, Options{})
			l = hold(t, s, fx)
			for i := range fx.model.Chunks {
				l.Verify(i)
			}
			if got := checkRight(t, l, fx); got < have { // more, if half of a chunk was written and the rest is zeros
				t.Fatalf("%d chunks after a restart, were %d", got, have)
			}

			if err := s.Remove(old.key); err != nil {
				t.Fatal(err)
			}
			for _, i := range failed[:30] {
				if err := l.WriteChunk(fx.verified(i)); err != nil {
					t.Fatalf("with space again: %v", err)
				}
			}
			checkRight(t, l, fx)
			l.Release()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// forget has the next read of a file come from the disk.
func forget(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// A disk that doesn't take what the filesystem has taken loses no byte silently: what is there is on the disk, or it is missing.
func TestDiskLosesWrites(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			// As with thin provisioning: the disk says that it has 64 MiB, and has 12. Without a journal, what fails is data.
			root := filepath.Join(mountIn(t, mountNew(t, "tmpfs", 12<<20), "ext2", 64<<20), "store")
			s := open(t, root, Options{Quiet: time.Hour})
			fx := newFixture("big", newRand(1), 100_000, 30<<20)
			l := hold(t, s, fx)
			fillAll(t, l, fx)
			if err := l.Settle(); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("settled: %v; want an error of the disk", err)
			}
			if closed(l.Done()) {
				t.Error("done, and the disk hasn't taken it all")
			}
			if restart {
				l.Release()
				_ = s.Close() // which may not find room for a map
				s = open(t, root, Options{Quiet: time.Hour})
				l = hold(t, s, fx)
			}
			for i := range fx.model.Chunks {
				l.Verify(i)
			}
			forget(t, l.DataPath())
			have := checkRight(t, l, fx)
			t.Logf("%d of %d chunks", have, len(fx.model.Chunks))
			if have == 0 || have == len(fx.model.Chunks) {
				t.Errorf("%d of %d chunks are there, want some", have, len(fx.model.Chunks))
			}
		})
	}
}

const preAccess = 0x00100000 // FAN_PRE_ACCESS, Linux 6.14

// TestOwnDescriptorRaisesNoEvents rests on what the kernel decides when a file is opened: with a mark on the data
// file that is set after Bind, and nobody who answers its events, the store reads, writes, verifies, drops and
// settles without waiting.
func TestOwnDescriptorRaisesNoEvents(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	fx := newFixture("a", newRand(1), 5000, 200_000)
	l := hold(t, open(t, root, Options{}), fx)
	for i := range 20 {
		if err := l.WriteChunk(fx.verified(i)); err != nil {
			t.Fatal(err)
		}
	}
	root = copyTree(t, root)
	f, err := os.OpenFile(glob(t, root, dataFile)[0], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("flipped"), 5001); err != nil {
		t.Fatal(err)
	}
	f.Close()
	s := open(t, root, Options{Notice: func(_ Key, err error) { t.Error(err) }})
	l = hold(t, s, fx)

	fan, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDWR|unix.O_LARGEFILE)
	if err != nil {
		t.Fatalf("fanotify with pre-content events, of Linux 6.14: %v", err)
	}
	group := os.NewFile(uintptr(fan), "fanotify") // closing it lets everybody go
	defer group.Close()
	if err := unix.FanotifyMark(fan, unix.FAN_MARK_ADD, preAccess, unix.AT_FDCWD, l.DataPath()); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if !l.Verify(0) || l.Verify(1) {
			t.Error("Verify is wrong")
		}
		fillAll(t, l, fx)
		if _, err := l.ReadAt(make([]byte, 200_000), 0); err != nil {
			t.Error(err)
		}
		if _, err := l.File().ReadAt(make([]byte, 200_000), 0); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Error("the store waits for an answer to its own event")
		group.Close()
		<-done
	}

	// The same read through a descriptor that is opened now does raise one: the mark is there.
	read := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(l.DataPath())
		read <- err
	}()
	var buf [4096]byte
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		n, err := unix.Read(fan, buf[:])
		if err == nil && n > 0 {
			answer := binary.NativeEndian.AppendUint32(bytes.Clone(buf[16:20]), unix.FAN_ALLOW)
			unix.Write(fan, answer)
			unix.Close(int(binary.NativeEndian.Uint32(buf[16:20])))
			break
		}
		if time.Since(start) > 20*time.Second {
			t.Fatalf("no event: %v", err)
		}
	}
	group.Close()
	if err := <-read; err != nil {
		t.Error(err)
	}
}

// An image ends with a line of the store's: neither the kernel nor fsck.erofs minds.
func TestSealedImageMounts(t *testing.T) {
	needRoot(t)
	fx := newFixture("a", newRand(1), 4096, 4096)
	l := hold(t, open(t, t.TempDir(), Options{}), fx)
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "hello"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	path, err := l.WriteImage("v", func(f *os.File) error {
		out, err := exec.CommandContext(t.Context(), "mkfs.erofs", "--quiet", f.Name(), src).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "fsck.erofs", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v: %s", err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(path, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	if p, err := os.ReadFile(filepath.Join(dir, "hello")); err != nil || string(p) != "hello" {
		t.Errorf("%q, %v", p, err)
	}
}
