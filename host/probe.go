package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"
)

// Options says what to look at. The zero value looks at the daemon's defaults.
type Options struct {
	StateDir string // the daemon's --root; "" means /var/lib/buildkit
	Binary   string // the OCI runtime's name or path; "" means buildkit-runc, then runc

	// FUSEDoor and EROFSDoor mount a lazy layer below dir by a door, read it, and leave nothing: the doors' own Probe. Their
	// errors say in words what is missing. A door without one is not tried.
	FUSEDoor, EROFSDoor func(dir string) error
}

// Probe tries what the host offers. It takes some milliseconds, and as long as the runtime and git take to print their
// version. When ctx ends, what it was waiting for is reported as missing.
func Probe(ctx context.Context, opt Options) Report {
	return machine().probe(ctx, opt)
}

// prober holds the ways in which a probe touches the machine, so that a test can take one away.
type prober struct {
	proc    string // where proc is mounted
	cgroups string // where the cgroup hierarchy is mounted
	fuseDev string // the FUSE device

	uname     func() (release, arch string, err error)
	euid      func() int
	userns    func() bool
	lookPath  func(string) (string, error)
	version   func(ctx context.Context, binary string) (string, error) // what `binary --version` prints
	statfs    func(path string) (unix.Statfs_t, error)
	overlay   func(dir string) error // mounts and unmounts an overlay below dir
	erofs     func(dir string) error // mounts, reads and unmounts a file-backed EROFS below dir
	mkdirTemp func(dir, p string) (string, error)
}

const fuseDevice = "/dev/fuse"

func machine() *prober {
	return &prober{
		proc:      "/proc",
		cgroups:   "/sys/fs/cgroup",
		fuseDev:   fuseDevice,
		uname:     uname,
		euid:      os.Geteuid,
		userns:    userns.RunningInUserNS,
		lookPath:  exec.LookPath,
		version:   version,
		statfs:    statfs,
		overlay:   overlayutils.Supported,
		erofs:     tryEROFS,
		mkdirTemp: os.MkdirTemp,
	}
}

func (p *prober) probe(ctx context.Context, opt Options) Report {
	if opt.StateDir == "" {
		opt.StateDir = "/var/lib/buildkit"
	}
	r := Report{StateDir: opt.StateDir}
	add := func(c Check) {
		if c.OK {
			c.Fix = ""
		}
		r.Checks = append(r.Checks, c)
	}

	add(p.kernel())
	add(p.privileges())
	state, dir := p.stateDir(opt.StateDir)
	if dir != "" {
		defer os.RemoveAll(dir)
	}
	add(state)
	add(p.overlayfs(dir))
	add(p.runtime(ctx, opt.Binary))
	add(p.fuseDoor(dir, opt.FUSEDoor))
	add(p.erofsMount(dir))
	add(p.preContentEvents(dir, opt.EROFSDoor))
	add(p.cgroup())
	add(p.git(ctx))
	return r
}

func (p *prober) kernel() Check {
	c := Check{Name: Kernel, Required: true, Fix: "boot Linux 4.18 or newer (5.11 for rootless)"}
	release, arch, err := p.uname()
	if err != nil {
		c.Detail = err.Error()
		return c
	}
	c.Detail = fmt.Sprintf("Linux %s %s", release, arch)
	// 4.18 is the first with FUSE mounts in user namespaces, and what go-fuse and runc are still tried on. Whether a
	// mount really works is for its own check to say.
	c.OK = atLeast(release, 4, 18)
	if !c.OK {
		c.Detail += " is older than 4.18"
	}
	return c
}

func (p *prober) privileges() Check {
	c := Check{Name: Privileges, Required: true, Fix: "run as root, or rootless below rootlesskit"}
	switch uid, inNS := p.euid(), p.userns(); {
	case uid != 0:
		c.Detail = fmt.Sprintf("user %d outside of a user namespace of its own", uid)
	case inNS:
		c.OK, c.Detail = true, "root in a user namespace (rootless)"
	default:
		c.OK, c.Detail = true, "root"
	}
	return c
}

// stateDir checks the filesystem that holds path, and returns a temporary directory on it for other checks to work in, or
// "" where there can be none.
func (p *prober) stateDir(path string) (c Check, dir string) {
	c = Check{Name: StateDir, Required: true, Fix: "point --root at a writable directory on ext4, xfs (ftype=1) or btrfs"}
	path, err := filepath.Abs(path)
	if err != nil {
		c.Detail = err.Error()
		return c, ""
	}
	parent, err := existing(path)
	if err != nil {
		c.Detail = err.Error()
		return c, ""
	}
	st, err := p.statfs(parent)
	if err != nil {
		c.Detail = fmt.Sprintf("statfs %s: %v", parent, err)
		return c, ""
	}
	c.Detail = fmt.Sprintf("%s on %s, %s free", path, fsName(st.Type), bytesIEC(uint64(st.Bavail)*uint64(st.Bsize)))
	if parent != path {
		c.Detail += ", not created yet"
	}
	dir, err = p.mkdirTemp(parent, TempPrefix)
	if err != nil {
		c.Detail += "; not writable: " + cause(err)
		return c, ""
	}
	c.OK = true
	if st.Bavail*uint64(st.Bsize) < 1<<30 {
		c.Detail += ": builds may run out of space"
	}
	return c, dir
}

func (p *prober) overlayfs(dir string) Check {
	c := Check{Name: Overlayfs, Fix: "modprobe overlay, and keep the state directory on a filesystem that overlayfs takes as upper directory (not on another overlayfs), by a path without commas, colons and backslashes"}
	if dir == "" {
		return untried(c)
	}
	if err := p.overlay(dir); err != nil {
		c.Detail = "mount on the state directory's filesystem: " + scrub(err, dir)
		return c
	}
	c.OK, c.Detail = true, "mounted with two lower directories on the state directory's filesystem"
	return c
}

func (p *prober) runtime(ctx context.Context, binary string) Check {
	c := Check{Name: Runtime, Required: true, Fix: "install runc (Debian, Ubuntu: apt-get install runc; Fedora: dnf install runc), or name another OCI runtime by --oci-worker-binary"}
	candidates := []string{"buildkit-runc", "runc"}
	if binary != "" {
		candidates = []string{binary}
	}
	for _, name := range candidates {
		path, err := p.lookPath(name)
		if err != nil {
			continue
		}
		out, err := p.version(ctx, path)
		if err != nil {
			c.Detail = fmt.Sprintf("%s --version: %v", path, err)
			return c
		}
		c.OK, c.Detail = true, path+": "+out
		return c
	}
	c.Detail = strings.Join(candidates, " or ") + " not found on PATH"
	return c
}

func (p *prober) fuseDoor(dir string, try func(dir string) error) Check {
	c := Check{Name: FUSE, Fix: "modprobe fuse; in a container, run it privileged or with --device /dev/fuse and CAP_SYS_ADMIN; without root, install fuse3"}
	if dir == "" || try == nil {
		return untried(c)
	}
	if err := try(dir); err != nil {
		c.Detail = scrub(err, dir)
		if !exists(p.fuseDev) {
			c.Detail = p.fuseDev + " does not exist"
		}
		return c
	}
	c.OK, c.Detail = true, "a layer mounted by "+p.fuseDev+" was read"
	return c
}

func (p *prober) erofsMount(dir string) Check {
	c := Check{Name: EROFS, Fix: "boot Linux 6.12 or newer with CONFIG_EROFS_FS_BACKED_BY_FILE (modprobe erofs), and keep the state directory on ext4, xfs or btrfs; without it, layers are served over FUSE"}
	if dir == "" {
		return untried(c)
	}
	if err := p.erofs(dir); err != nil {
		c.Detail = scrub(err, dir)
		if known, lerr := filesystem(p.proc, "erofs"); lerr == nil && !known {
			c.Detail += "; the kernel has no erofs, or its module is not loaded"
		}
		return c
	}
	c.OK, c.Detail = true, "file-backed mount works"
	return c
}

func (p *prober) preContentEvents(dir string, try func(dir string) error) Check {
	c := Check{Name: PreContent, Fix: "boot Linux 6.14 or newer with CONFIG_FANOTIFY_ACCESS_PERMISSIONS, as root outside of user namespaces, with the state directory on ext4, xfs or btrfs; without them, layers are served over FUSE"}
	if dir == "" || try == nil {
		return untried(c)
	}
	if err := try(dir); err != nil {
		c.Detail = scrub(err, dir)
		return c
	}
	c.OK, c.Detail = true, "a read of an EROFS layer waited for its bytes"
	return c
}

func (p *prober) cgroup() Check {
	c := Check{Name: Cgroup, Fix: "mount the cgroup2 hierarchy at " + p.cgroups + " (systemd.unified_cgroup_hierarchy=1); builds run without it"}
	st, err := p.statfs(p.cgroups)
	switch {
	case err != nil:
		c.Detail = fmt.Sprintf("statfs %s: %v", p.cgroups, err)
	case st.Type == unix.CGROUP2_SUPER_MAGIC:
		c.OK, c.Detail = true, "version 2"
	case exists(filepath.Join(p.cgroups, "unified")):
		c.Detail = "version 1 with a version 2 hierarchy beside it: no resource usage per build step"
	case exists(filepath.Join(p.cgroups, "memory")):
		c.Detail = "version 1: no resource usage per build step"
	default:
		c.Detail = "no hierarchy at " + p.cgroups
	}
	return c
}

func (p *prober) git(ctx context.Context) Check {
	c := Check{Name: Git, Fix: "install git (apt-get install git, dnf install git) to build from git:// contexts and ADD repositories"}
	path, err := p.lookPath("git")
	if err != nil {
		c.Detail = "not found on PATH; only builds from git repositories need it"
		return c
	}
	out, err := p.version(ctx, path)
	if err != nil {
		c.Detail = fmt.Sprintf("%s --version: %v", path, err)
		return c
	}
	c.OK, c.Detail = true, path+": "+out
	return c
}

func untried(c Check) Check {
	c.Detail = "not tried: the state directory cannot be written"
	return c
}

// version runs binary --version and returns its first line.
func version(ctx context.Context, binary string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, errors.New("no answer in 10 seconds"))
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second // a child that keeps the pipe open must not hold us
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		if line := firstLine(stderr.String()); line != "" {
			return "", fmt.Errorf("%w: %s", err, line)
		}
		return "", err
	}
	return firstLine(string(out)), nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(line)
}

func uname() (release, arch string, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), runtime.GOARCH, nil
}

func statfs(path string) (unix.Statfs_t, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	return st, err
}

// atLeast reports whether release, such as "6.12.3-arch1" or "6.14-rc2", is major.minor or newer.
func atLeast(release string, major, minor int) bool {
	head, rest, _ := strings.Cut(release, ".")
	have, err := strconv.Atoi(head)
	if err != nil {
		return false
	}
	if have != major {
		return have > major
	}
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	m, err := strconv.Atoi(rest[:end])
	return err == nil && m >= minor
}

// filesystem reports whether proc's list of filesystems names one. Modules that load on demand are missing from it.
func filesystem(proc, name string) (bool, error) {
	list, err := os.ReadFile(filepath.Join(proc, "filesystems"))
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(list)) {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == name {
			return true, nil
		}
	}
	return false, nil
}

// existing returns path or its nearest parent that exists, which must be a directory.
func existing(path string) (string, error) {
	for {
		fi, err := os.Stat(path)
		switch {
		case err == nil && fi.IsDir():
			return path, nil
		case err == nil:
			return "", fmt.Errorf("%s is not a directory", path)
		case !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path):
			return "", err
		}
		path = filepath.Dir(path)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// scrub returns the error's text without the name of the temporary directory, which is gone when somebody reads it.
func scrub(err error, dir string) string {
	return strings.ReplaceAll(err.Error(), dir+"/", "")
}

// cause returns an error's text without the path that the caller has named already.
func cause(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	return err.Error()
}

// fsName names the filesystem of a statfs magic number, as in linux/magic.h.
func fsName(magic int64) string {
	// Magic numbers are 32 bits; some architectures sign-extend them.
	switch uint32(magic) {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlayfs"
	case unix.BCACHEFS_SUPER_MAGIC:
		return "bcachefs"
	case unix.F2FS_SUPER_MAGIC:
		return "f2fs"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.FUSE_SUPER_MAGIC:
		return "fuse"
	case unix.V9FS_MAGIC:
		return "9p"
	case 0x2fc12fc1: // not in linux/magic.h: OpenZFS
		return "zfs"
	}
	return fmt.Sprintf("a filesystem of type %#x", uint32(magic))
}

func bytesIEC(n uint64) string {
	const units = "KMGTPE"
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/(1<<10), 0
	for f >= 1<<10 && i < len(units)-1 {
		f, i = f/(1<<10), i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}
