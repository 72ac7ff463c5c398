package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A report is compared with what other programs say about the same machine.
func TestProbeThisMachine(t *testing.T) {
	dir := t.TempDir()
	r := Probe(t.Context(), Options{StateDir: filepath.Join(dir, "not", "there")})

	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if k := r.Check(Kernel); !k.OK || !strings.Contains(k.Detail, strings.TrimSpace(string(release))) {
		t.Errorf("kernel %+v, want OK and release %s", k, release)
	}

	stat, err := exec.CommandContext(t.Context(), "stat", "-f", "-c", "%T", dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	s := r.Check(StateDir)
	if !s.OK || !strings.Contains(s.Detail, "not created yet") {
		t.Errorf("state directory %+v, want OK and not created yet", s)
	}
	// stat says "ext2/ext3", as the three share a magic number.
	if name := strings.Replace(strings.TrimSpace(string(stat)), "ext2/ext3", "ext4", 1); !strings.Contains(s.Detail, " on "+name) {
		t.Errorf("state directory %q, but stat -f says %s", s.Detail, name)
	}

	if runc, err := exec.LookPath("runc"); err == nil {
		out, err := exec.CommandContext(t.Context(), runc, "--version").Output()
		if err != nil {
			t.Fatal(err)
		}
		if c := r.Check(Runtime); !c.OK || !strings.Contains(c.Detail, firstLine(string(out))) {
			t.Errorf("runc %+v, want OK and %s", c, firstLine(string(out)))
		}
	} else if c := r.Check(Runtime); c.OK != exists("/usr/bin/buildkit-runc") {
		t.Errorf("runc %+v, but there is none on PATH", c)
	}

	// CI runs as root where overlayfs mounts work; there, a probe that fails is a wrong probe.
	if os.Geteuid() == 0 && os.Getenv("CI") != "" {
		for _, name := range []string{Privileges, Overlayfs, Runtime} {
			if c := r.Check(name); !c.OK {
				t.Errorf("%s: %s", name, c.Detail)
			}
		}
	}
	if known, err := filesystem("/proc", "erofs"); err != nil || (!known && r.Check(EROFS).OK) {
		t.Errorf("an EROFS mount worked, but /proc/filesystems does not name erofs (error %v)", err)
	}
	for _, name := range []string{FUSE, PreContent} {
		if c := r.Check(name); c.OK || !strings.Contains(c.Detail, "not tried") {
			t.Errorf("a door that was not to be tried: %+v", c)
		}
	}

	for _, c := range r.Checks {
		if c.Detail == "" || strings.Contains(c.Detail, TempPrefix) || strings.HasSuffix(c.Detail, ".") {
			t.Errorf("%s: detail %q", c.Name, c.Detail)
		}
		if c.OK != (c.Fix == "") {
			t.Errorf("%s: ok %v with fix %q", c.Name, c.OK, c.Fix)
		}
	}
}

func TestProbeLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	Probe(t.Context(), Options{StateDir: state})
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left in the parent of the state directory: %v, %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Errorf("a mount was left below %s:\n%s", dir, mounts)
	}
}

// refuses is a door that a host doesn't have.
func refuses(err error) func(string) error {
	return func(dir string) error { return fmt.Errorf("mount %s/layer: %w", dir, err) }
}

func TestProbeMissing(t *testing.T) {
	notFound := func(string) (string, error) { return "", exec.ErrNotFound }
	for _, tt := range []struct {
		name   string
		opt    Options
		change func(*prober)
		check  string
		detail string // must occur in the check's detail
		fix    string // must occur in the check's fix
		door   string
	}{{
		name:   "old kernel",
		change: func(p *prober) { p.uname = func() (string, string, error) { return "4.9.0-8-amd64", "amd64", nil } },
		check:  Kernel, detail: "Linux 4.9.0-8-amd64 amd64 is older than 4.18", fix: "boot Linux", door: DoorEROFS,
	}, {
		name:   "not root",
		change: func(p *prober) { p.euid = func() int { return 1000 } },
		check:  Privileges, detail: "user 1000", fix: "rootlesskit", door: DoorEROFS,
	}, {
		name: "read-only state directory",
		change: func(p *prober) {
			p.mkdirTemp = func(dir, prefix string) (string, error) {
				return "", &fs.PathError{Op: "mkdir", Path: filepath.Join(dir, prefix), Err: syscall.EROFS}
			}
		},
		check: StateDir, detail: "not writable: read-only file system", fix: "--root", door: DoorOff,
	}, {
		name: "state directory on an overlay",
		change: func(p *prober) {
			p.overlay = func(dir string) error {
				return fmt.Errorf("failed to mount overlay %s/merged: %w", dir, syscall.EINVAL)
			}
		},
		check: Overlayfs, detail: "failed to mount overlay merged: invalid argument", fix: "not on another overlayfs", door: DoorOff,
	}, {
		name:   "no runc",
		change: func(p *prober) { p.lookPath = notFound },
		check:  Runtime, detail: "buildkit-runc or runc not found on PATH", fix: "apt-get install runc", door: DoorEROFS,
	}, {
		name:  "no such runtime",
		opt:   Options{Binary: "no-such-runtime"},
		check: Runtime, detail: "no-such-runtime not found on PATH", fix: "--oci-worker-binary", door: DoorEROFS,
	}, {
		name: "no git",
		change: func(p *prober) {
			p.lookPath = func(name string) (string, error) {
				if name == "git" {
					return "", exec.ErrNotFound
				}
				return "/usr/bin/" + name, nil
			}
		},
		check: Git, detail: "not found", fix: "install git", door: DoorEROFS,
	}, {
		name:   "no fuse device",
		opt:    Options{FUSEDoor: refuses(syscall.ENOENT)},
		change: func(p *prober) { p.fuseDev = "/nonexistent/fuse" },
		check:  FUSE, detail: "/nonexistent/fuse does not exist", fix: "modprobe fuse", door: DoorEROFS,
	}, {
		name:  "fuse mount refused",
		opt:   Options{FUSEDoor: refuses(syscall.EPERM)},
		check: FUSE, detail: "operation not permitted", fix: "privileged", door: DoorEROFS,
	}, {
		name: "no erofs",
		change: func(p *prober) {
			p.erofs = func(string) error { return fmt.Errorf("mount a file as erofs: %w", syscall.ENODEV) }
			p.proc = "testdata/proc"
		},
		check: EROFS, detail: "no such device; the kernel has no erofs", fix: "6.12", door: DoorFUSE,
	}, {
		name:  "no pre-content events",
		opt:   Options{EROFSDoor: refuses(syscall.EINVAL)},
		check: PreContent, detail: "invalid argument", fix: "6.14", door: DoorFUSE,
	}, {
		name:  "no door",
		opt:   Options{FUSEDoor: refuses(syscall.EPERM), EROFSDoor: refuses(syscall.EINVAL)},
		check: FUSE, detail: "operation not permitted", fix: "privileged", door: DoorOff,
	}, {
		name:   "no cgroups",
		change: func(p *prober) { p.cgroups = "testdata" },
		check:  Cgroup, detail: "no hierarchy", fix: "cgroup2", door: DoorEROFS,
	}} {
		t.Run(tt.name, func(t *testing.T) {
			p := ideal()
			if tt.change != nil {
				tt.change(p)
			}
			tt.opt.StateDir = t.TempDir()
			for _, door := range []*func(string) error{&tt.opt.FUSEDoor, &tt.opt.EROFSDoor} {
				if *door == nil {
					*door = works
				}
			}
			r := p.probe(t.Context(), tt.opt)

			c := r.Check(tt.check)
			if c.OK || !strings.Contains(c.Detail, tt.detail) || !strings.Contains(c.Fix, tt.fix) {
				t.Errorf("got %+v, want detail %q and fix %q", c, tt.detail, tt.fix)
			}
			if door, reason := r.Door("auto"); door != tt.door || (door == DoorOff && !strings.Contains(reason, "pulled and unpacked")) {
				t.Errorf("door %s (%s), want %s", door, reason, tt.door)
			}
			if c.Required != (len(r.Missing()) > 0) {
				t.Errorf("required %v, but missing: %v", c.Required, r.Missing())
			}
			if left, err := os.ReadDir(tt.opt.StateDir); err != nil || len(left) > 0 {
				t.Errorf("left in the state directory: %v, %v", left, err)
			}
		})
	}
}

func TestProbeStateDirIsAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := ideal().probe(t.Context(), Options{StateDir: filepath.Join(file, "state")})
	if c := r.Check(StateDir); c.OK || c.Detail == "" {
		t.Errorf("state directory below a file: %+v", c)
	}
	if c := r.Check(FUSE); c.OK || !strings.Contains(c.Detail, "not tried") {
		t.Errorf("fuse without a state directory: %+v", c)
	}
}

func TestProbeRuntimeThatFails(t *testing.T) {
	bin := t.TempDir()
	script := func(name, body string) string {
		path := filepath.Join(bin, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}

	r := Probe(t.Context(), Options{StateDir: t.TempDir(), Binary: script("broken", "echo no libseccomp >&2; exit 3")})
	if c := r.Check(Runtime); c.OK || !strings.Contains(c.Detail, "exit status 3: no libseccomp") {
		t.Errorf("a runtime that fails: %+v", c)
	}

	// The child keeps standard output open after the script was killed.
	hangs := script("hangs", "sleep 20")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("enough"))
	defer cancel()
	start := time.Now()
	r = Probe(ctx, Options{StateDir: t.TempDir(), Binary: hangs})
	if c := r.Check(Runtime); c.OK || !strings.Contains(c.Detail, "enough") {
		t.Errorf("a runtime that hangs: %+v", c)
	}
	if d := time.Since(start); d > 15*time.Second {
		t.Errorf("a runtime that hangs held the probe for %v", d)
	}
}

func TestDoor(t *testing.T) {
	good := ideal().probe(t.Context(), Options{StateDir: t.TempDir(), FUSEDoor: works, EROFSDoor: works})
	noKernel := ideal().probe(t.Context(), Options{StateDir: t.TempDir(), FUSEDoor: works, EROFSDoor: refuses(syscall.EINVAL)})
	for _, tt := range []struct {
		report Report
		mount  string
		door   string
		reason string
	}{
		{good, "", DoorEROFS, "EROFS with pre-content events"},
		{good, "auto", DoorEROFS, "EROFS with pre-content events"},
		{good, "fuse", DoorFUSE, "FUSE and overlayfs mounts"},
		{noKernel, "auto", DoorFUSE, "the kernel can't serve layers: pre-content events: mount layer: invalid argument"},
		{noKernel, "erofs", DoorOff, "pre-content events: mount layer: invalid argument: the daemon does not start"},
		{good, "off", DoorOff, "configured"},
		{good, "erofs", DoorEROFS, "EROFS with pre-content events"},
		{good, "bind", DoorOff, `mount = "bind" is not a way`},
		{Report{}, "erofs", DoorOff, "erofs; pre-content events; overlayfs: the daemon does not start"},
		{Report{}, "auto", DoorOff, "erofs; pre-content events; fuse; overlayfs: layers are pulled"},
		{Report{}, "fuse", DoorOff, "fuse; overlayfs: the daemon does not start"},
	} {
		door, reason := tt.report.Door(tt.mount)
		if door != tt.door || !strings.Contains(reason, tt.reason) {
			t.Errorf("Door(%q) = %q, %q; want %q, … %q …", tt.mount, door, reason, tt.door, tt.reason)
		}
	}
}

func TestReportJSON(t *testing.T) {
	b, err := json.Marshal(Report{StateDir: "/s", Checks: []Check{{Name: Git, Detail: "d", Fix: "f"}}})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"stateDir":"/s","checks":[{"name":"git","ok":false,"required":false,"detail":"d","fix":"f"}]}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
}

func TestAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"6.12.0": true, "6.12": true, "6.12-rc1": true, "6.100.1": true, "7.0": true, "10.1-x": true,
		"6.11.9": false, "6.1": false, "5.99": false, "6": false, "6.": false, "": false, "x.12": false,
	} {
		if got := atLeast(release, 6, 12); got != want {
			t.Errorf("%q at least 6.12: %v", release, got)
		}
	}
}

func TestBytesIEC(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 5 << 30: "5.0 GiB", 1<<64 - 1: "16.0 EiB",
	} {
		if got := bytesIEC(n); got != want {
			t.Errorf("%d bytes: got %s, want %s", n, got, want)
		}
	}
}

// The image that tryEROFS mounts is right in the eyes of erofs-utils too.
func TestEmptyEROFS(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Fatalf("%v; make deps installs it", err)
	}
	image := filepath.Join(t.TempDir(), "empty.erofs")
	if err := os.WriteFile(image, emptyEROFS(), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), fsck, image).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

func BenchmarkProbe(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		Probe(b.Context(), Options{StateDir: dir})
	}
}

// ideal is a machine on which everything works, whatever this one is.
func ideal() *prober {
	return &prober{
		proc:    "/proc",
		cgroups: "/sys/fs/cgroup",
		fuseDev: "/dev/fuse",
		uname:   func() (string, string, error) { return "6.18.0", "amd64", nil },
		euid:    func() int { return 0 },
		userns:  func() bool { return false },
		lookPath: func(name string) (string, error) {
			if name == "no-such-runtime" {
				return "", exec.ErrNotFound
			}
			return "/usr/bin/" + name, nil
		},
		version: func(context.Context, string) (string, error) { return "version 1.2.3", nil },
		statfs: func(path string) (unix.Statfs_t, error) {
			st := unix.Statfs_t{Type: unix.EXT4_SUPER_MAGIC, Bsize: 4096, Bavail: 1 << 24}
			switch path {
			case "/sys/fs/cgroup":
				st.Type = unix.CGROUP2_SUPER_MAGIC
			case "testdata":
				st.Type = unix.TMPFS_MAGIC
			}
			return st, nil
		},
		overlay:   works,
		erofs:     works,
		mkdirTemp: os.MkdirTemp,
	}
}

// works is a door that serves layers.
func works(string) error { return nil }
