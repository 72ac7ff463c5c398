package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// TestConformance is containerd's own suite. It is told that this is overlayfs,
// which can't rename directories of lower layers: without the mount option
// redirect_dir the kernel answers EXDEV, which TestKernelRefusesRename shows. All else is checked.
func TestConformance(t *testing.T) { eachDoor(t, testConformance) }

func testConformance(t *testing.T, door string) {
	if testing.Short() {
		t.Skip("it does one thing after the other, which takes long under the race detector")
	}
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
	testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := New(root, Options{Door: door})
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	})
}

// TestKernelRefusesRename has the kernel alone, and directories, where the suite's case Rename has snapshots.
func TestKernelRefusesRename(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
	dir := t.TempDir()
	for _, name := range []string{"lower/dir1", "upper", "work", "target"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	target := filepath.Join(dir, "target")
	options := fmt.Sprintf("redirect_dir=off,lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
	if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(target, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Rename(filepath.Join(target, "dir1"), filepath.Join(target, "dir2")); !errors.Is(err, unix.EXDEV) {
		t.Errorf("rename(2): %v, want %v", err, unix.EXDEV)
	}
}

func TestMount(t *testing.T) { eachDoor(t, testMount) }

func testMount(t *testing.T, door string) {
	small, big := []byte("hello\n"), random(4<<20)
	l := layerOf(t, map[string][]byte{"small": small, "dir/": nil, "dir/big": big, "empty": nil})
	reg := newRegistry(t, nil, l)
	var fetched atomic.Int64
	var removed []digest.Digest
	opt := reg.options(door)
	opt.Blob.Fetched = func(_ digest.Digest, n int64, _ time.Duration) { fetched.Add(n) }
	opt.Removed = func(d digest.Digest) { removed = append(removed, d) }
	s, root := newSnapshotter(t, opt)

	prepare := func() error {
		_, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l)))
		return err
	}
	if err := prepare(); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	if info, err := s.Stat(t.Context(), "base"); err != nil || info.Kind != snapshots.KindCommitted {
		t.Fatalf("base is %+v, %v", info, err)
	}
	// Once more is not mounted once more.
	if err := prepare(); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare of what is there: %v", err)
	}
	if n, m := names(t, s), mountsBelow(t, root); !slices.Equal(n, []string{"base"}) || len(m) != mountsPerLayer {
		t.Fatalf("snapshots %q, mounts %q", n, m)
	}

	// A container on top of it.
	mounts, err := s.Prepare(t.Context(), "rw", "base")
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		got, err := os.ReadFile(filepath.Join(dir, "small"))
		if err != nil || !bytes.Equal(got, small) {
			t.Errorf("small: %q, %v", got, err)
		}
		fi, err := os.Stat(filepath.Join(dir, "small"))
		if err != nil {
			return err
		}
		if st := fi.Sys().(*syscall.Stat_t); st.Uid != 7 || st.Gid != 8 || fi.Mode() != 0o640 || !fi.ModTime().Equal(time.Unix(1e9, 0)) {
			t.Errorf("small is %v of %d:%d, modified %s", fi.Mode(), st.Uid, st.Gid, fi.ModTime())
		}
		if n := fetched.Load(); n == 0 || n >= int64(len(l.blob))/2 {
			t.Errorf("%d of %d bytes fetched for a file of %d", n, len(l.blob), len(small))
		}
		if got, err = os.ReadFile(filepath.Join(dir, "dir/big")); err != nil || !bytes.Equal(got, big) {
			t.Errorf("big: %d bytes, %v", len(got), err)
		}
		return os.WriteFile(filepath.Join(dir, "dir/new"), []byte("x"), 0o600)
	}); err != nil {
		t.Fatal(err)
	}

	for _, key := range []string{"rw", "base"} {
		if err := s.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m := mountsBelow(t, root); len(m) != 0 || !slices.Equal(removed, []digest.Digest{l.digest}) {
		t.Errorf("after Cleanup: mounts %q, told of %q", m, removed)
	}
}

// Bytes which aren't what the table of contents says never reach a reader.
func TestCorruptChunkIsAnError(t *testing.T) { eachDoor(t, testCorruptChunkIsAnError) }

func testCorruptChunkIsAnError(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": random(1 << 20)})
	reg := newRegistry(t, nil, l)
	reg.spoil(l)
	s, root := newSnapshotter(t, reg.options(door))
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	if got, err := os.ReadFile(filepath.Join(mountsBelow(t, root)[0], "file")); !errors.Is(err, unix.EIO) {
		t.Errorf("read %d bytes, %v; want EIO", len(got), err)
	}
	errs := reg.failed()
	if len(errs) == 0 || !strings.Contains(errs[0].Error(), l.digest.String()) || !regexp.MustCompile(`read /?file \(layer sha256:[0-9a-f]{64}\): chunk 0: `).MatchString(errs[0].Error()) {
		t.Errorf("told of %v; want layer, file and chunk", errs)
	}
	// Nothing corrupt is kept.
	reg.mu.Lock()
	reg.blobs[l.digest.String()] = l.blob
	reg.mu.Unlock()
	if _, err := os.ReadFile(filepath.Join(mountsBelow(t, root)[0], "file")); err != nil {
		t.Errorf("after the registry was repaired: %v", err)
	}
}

// A directory without an entry hides the one of the layer below, so that one must be
// as what is made up; a directory whose entry has the time 0 looks the same to estargz.
func TestDirectoryWithoutEntry(t *testing.T) { eachDoor(t, testDirectoryWithoutEntry) }

func testDirectoryWithoutEntry(t *testing.T, door string) {
	for name, c := range map[string]struct {
		files map[string][]byte
		lower os.FileMode // of /a in the layer below, 0 for none
		xattr string      // and what it has, "" for none
		want  string
	}{
		"all there":                {map[string][]byte{"a/": nil, "a/b/": nil, "a/b/file": []byte("x")}, 0o700, "user.a", ""},
		"one lacks, none below":    {map[string][]byte{"a/b/file": []byte("x")}, 0, "", ""},
		"one lacks, same below":    {map[string][]byte{"a/b/file": []byte("x")}, 0o755, "trusted.a", ""},
		"one lacks, another below": {map[string][]byte{"a/b/file": []byte("x")}, 0o711, "", "it has no entry for the directory /a, whose mode 0711 and owner 0:0 below it would hide"},
		"one lacks, more below":    {map[string][]byte{"a/b/file": []byte("x")}, 0o755, "user.a", `it has no entry for the directory /a, whose extended attribute "user.a" below it would hide`},
	} {
		t.Run(name, func(t *testing.T) {
			l := layerOf(t, c.files)
			reg := newRegistry(t, nil, l)
			s, root := newSnapshotter(t, reg.options(door))
			if _, err := s.Prepare(t.Context(), "lower-key", ""); err != nil {
				t.Fatal(err)
			}
			if c.lower != 0 {
				m, err := s.Mounts(t.Context(), "lower-key")
				if err != nil {
					t.Fatal(err)
				}
				dir := filepath.Join(m[0].Source, "a")
				if err := errors.Join(os.Mkdir(dir, c.lower), os.Chmod(dir, c.lower)); err != nil {
					t.Fatal(err)
				}
				if c.xattr != "" {
					if err := unix.Setxattr(dir, c.xattr, []byte("1"), 0); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := s.Commit(t.Context(), "lower", "lower-key"); err != nil {
				t.Fatal(err)
			}
			_, err := s.Prepare(t.Context(), "key", "lower", snapshots.WithLabels(reg.labels("upper", l)))
			if c.want == "" {
				if !cerrdefs.IsAlreadyExists(err) {
					t.Errorf("Prepare: %v", err)
				}
				return
			}
			if failed, ok := errors.AsType[*MountError](err); !ok || !strings.HasSuffix(failed.Reason(), c.want) {
				t.Errorf("Prepare: %v, want %q", err, c.want)
			}
			if err := s.Cleanup(t.Context()); err != nil {
				t.Error(err)
			}
			if n, m := names(t, s), mountsBelow(t, root); !slices.Equal(n, []string{"lower"}) || len(m) != 0 {
				t.Errorf("snapshots %q, mounts %q", n, m)
			}
		})
	}
}

// Close unmounts also what somebody still has open.
func TestCloseWithOpenFile(t *testing.T) { eachDoor(t, testCloseWithOpenFile) }

func testCloseWithOpenFile(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": random(1000)})
	reg := newRegistry(t, nil, l)
	s, root := newSnapshotter(t, reg.options(door))
	if _, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		t.Fatalf("Prepare: %v", err)
	}
	f, err := os.Open(filepath.Join(mountsBelow(t, root)[0], "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if m := mountsBelow(t, root); len(m) != 0 {
		t.Errorf("mounts left: %q", m)
	}
}

func TestNewUnmountsWhatWasLeft(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
	parent := t.TempDir()
	root, link := filepath.Join(parent, "state"), filepath.Join(parent, "link")
	if err := os.Symlink(root, link); err != nil {
		t.Fatal(err)
	}
	sibling := filepath.Join(parent, "state2")
	for _, dir := range []string{root + "/snapshotter/snapshots/1/fs", sibling} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	}
	inner := root + "/snapshotter/snapshots/1/fs/inner"
	if err := os.Mkdir(inner, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", inner, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	s, err := New(link, Options{Door: DoorFUSE})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if m := mountsBelow(t, parent); !slices.Equal(m, []string{sibling}) {
		t.Errorf("mounts %q, want only %q, which is none of ours", m, sibling)
	}
}

// What can't be mounted leaves nothing behind, and says why in words for users.
func TestMountError(t *testing.T) { eachDoor(t, testMountError) }

func testMountError(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": random(100_000)})
	outside := testLayer{blob: bytes.Clone(l.blob), toc: l.toc}
	// The footer's extra field holds the TOC's offset as 16 hexadecimal digits.
	copy(outside.blob[len(outside.blob)-estargz.FooterSize+16:], "00000000ffffffff")
	outside.digest = digest.FromBytes(outside.blob)
	garbage := testLayer{blob: random(1000), digest: digest.FromBytes(random(1000)), toc: l.toc}
	whole := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(l.blob) }
	gone := func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusNotFound) }
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		layer  testLayer
		reason string
	}{
		"registry without ranges": {whole, l, "the registry answered 200 to a range request"},
		"blob is gone":            {gone, l, "404 Not Found"},
		"no table of contents":    {nil, garbage, "its table of contents can't be used: "},
		"footer points outside":   {nil, outside, "its table of contents can't be used: "},
		"unknown size":            {whole, testLayer{digest: l.digest, toc: l.toc}, "the registry answered 200 to a range request"},
	} {
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t, c.answer, c.layer)
			s, root := newSnapshotter(t, reg.options(door))
			_, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", c.layer)))
			failed, ok := errors.AsType[*MountError](err)
			if !ok || failed.Layer != c.layer.digest {
				t.Fatalf("Prepare: %v, want a MountError", err)
			}
			if r := failed.Reason(); !strings.Contains(r, c.reason) || strings.ContainsAny(r, "\n") || strings.Contains(r, "failed to resolve") {
				t.Errorf("reason %q, want %q", r, c.reason)
			}
			if n, m := names(t, s), mountsBelow(t, root); len(n) != 0 || len(m) != 0 {
				t.Errorf("snapshots %q, mounts %q", n, m)
			}
			// The place is free for whoever unpacks the layer.
			if _, err := s.Prepare(t.Context(), "key", ""); err != nil {
				t.Errorf("Prepare to unpack: %v", err)
			}
		})
	}
}

// A door that can't mount, for want of descriptors or fanotify marks, costs that layer and not the daemon.
func TestDoorCannotMount(t *testing.T) { eachDoor(t, testDoorCannotMount) }

func testDoorCannotMount(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": random(1000)})
	reg := newRegistry(t, nil, l)
	s, root := newSnapshotter(t, reg.options(door))
	if err := s.door.door.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l)))
	failed, ok := errors.AsType[*MountError](err)
	if !ok || failed.Layer != l.digest || !strings.Contains(failed.Reason(), "closed") {
		t.Fatalf("Prepare: %v, want a MountError with the door's reason", err)
	}
	if n, m := names(t, s), mountsBelow(t, root); len(n) != 0 || len(m) != 0 {
		t.Errorf("snapshots %q, mounts %q", n, m)
	}
}

// A layer with another table of contents than the manifest promises is neither mounted nor to be pulled.
func TestMismatch(t *testing.T) { eachDoor(t, testMismatch) }

func testMismatch(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": []byte("x")})
	reg := newRegistry(t, nil, l)
	s, _ := newSnapshotter(t, reg.options(door))
	labels := reg.labels("base", l)
	other := digest.FromString("another table of contents")
	labels[estargz.TOCJSONDigestAnnotation] = other.String()
	_, err := s.Prepare(t.Context(), "key", "", snapshots.WithLabels(labels))
	m, ok := errors.AsType[*MismatchError](err)
	if !ok || m.Layer != l.digest || m.Want != other || m.Got != l.toc {
		t.Fatalf("Prepare: %v; want a MismatchError with %s and %s", err, other, l.toc)
	}
	if _, ok := errors.AsType[*MountError](err); ok {
		t.Error("a MismatchError that allows to pull")
	}
	for _, d := range []digest.Digest{l.digest, other, l.toc} {
		if !strings.Contains(err.Error(), d.String()) {
			t.Errorf("%q doesn't name %s", err, d)
		}
	}
	if n := names(t, s); len(n) != 0 {
		t.Errorf("snapshots left: %q", n)
	}
}

// A registry that says nothing holds up neither the build nor the daemon's end.
func TestSilentRegistry(t *testing.T) { eachDoor(t, testSilentRegistry) }

func testSilentRegistry(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": []byte("x")})
	stop := errors.New("build cancelled")
	for name, c := range map[string]struct {
		timeout, cancel time.Duration
		says            string
	}{
		"timeout":   {300 * time.Millisecond, time.Hour, "no table of contents within 300ms"},
		"cancelled": {0, 300 * time.Millisecond, stop.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t, func(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() }, l)
			opt := reg.options(door)
			opt.MountTimeout = c.timeout
			s, _ := newSnapshotter(t, opt)
			cctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			time.AfterFunc(c.cancel, func() { cancel(stop) })
			start := time.Now()
			_, err := s.Prepare(cctx, "key", "", snapshots.WithLabels(reg.labels("base", l)))
			if _, ok := errors.AsType[*MountError](err); !ok || !strings.Contains(err.Error(), c.says) {
				t.Errorf("Prepare: %v, want %q", err, c.says)
			}
			if n := names(t, s); len(n) != 0 {
				t.Errorf("snapshots left: %q", n)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("took %s", d)
			}
		})
	}
}

func TestSupported(t *testing.T) { eachDoor(t, testSupported) }

// What means something in the options of overlayfs is said to, rather than tried; a symlink helps.
func TestStateDirectoryThatOverlayfsCannotName(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		for _, name := range []string{"a,b", "a:b", `a\b`} {
			dir := t.TempDir()
			root, link := filepath.Join(dir, name), filepath.Join(dir, "link")
			if err := errors.Join(os.Mkdir(root, 0o700), os.Symlink(root, link)); err != nil {
				t.Fatal(err)
			}
			if err := Supported(root, door); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("a path can't have a %q", name[1])) {
				t.Errorf("%s: %v", name, err)
			}
			if err := Supported(link, door); err != nil {
				t.Errorf("%s by a symlink: %v", name, err)
			}
		}
	})
}

func testSupported(t *testing.T, door string) {
	root := t.TempDir()
	if err := Supported(root, door); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(root); err != nil || len(left) != 0 {
		t.Errorf("left in %s: %v, %v", root, left, err)
	}
}

// A layer is mounted again while its last mount is being taken down.
func TestMountWhileUnmounting(t *testing.T) { eachDoor(t, testMountWhileUnmounting) }

func testMountWhileUnmounting(t *testing.T, door string) {
	l := layerOf(t, map[string][]byte{"file": []byte("x")})
	reg := newRegistry(t, nil, l)
	s, _ := newSnapshotter(t, reg.options(door))
	const rounds = 20
	mount := func(name string) {
		_, err := s.Prepare(t.Context(), "key "+name, "", snapshots.WithLabels(reg.labels(name, l)))
		if !cerrdefs.IsAlreadyExists(err) {
			t.Errorf("Prepare of %s: %v", name, err)
		}
	}
	mount("0")
	for i := range rounds {
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := errors.Join(s.Remove(t.Context(), strconv.Itoa(i)), s.Cleanup(t.Context())); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() { mount(strconv.Itoa(i + 1)) })
		wg.Wait()
	}
}
