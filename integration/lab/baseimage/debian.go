package baseimage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
)

// A debianStage is a layer above debootstrap's: what apt-get install of these
// packages changed.
type debianStage struct {
	name     string
	packages []string
}

// debianStages are the layers of the development image.
var debianStages = []debianStage{
	{"gcc", []string{"gcc", "g++", "make", "libc6-dev"}},
	{"tools", []string{"clang", "lld", "cmake", "git", "gdb", "pkg-config"}},
	{"python", []string{"python3", "python3-numpy", "python3-dev", "python3-pip", "python3-venv"}},
	{"jdk", []string{"openjdk-17-jdk-headless"}},
}

// smallStages are the layers of the small image.
var smallStages = []debianStage{
	{"gcc", []string{"gcc", "libc6-dev"}},
	{"python", []string{"python3", "python3-numpy"}},
}

// Where the layers are kept; the names change when the recipes do.
const (
	debianVersion = "debian-v2"
	smallVersion  = "debian-small-v1"
)

// Debian returns a Debian development image: a minimal system by debootstrap,
// gcc, clang and friends, Python with numpy, a JDK, and the local Go toolchain,
// each in a layer of its own. Packages come from where this machine's apt gets
// them. It takes some minutes once; the tar files are kept in cache. progress
// is told each step.
//
// It needs root, debootstrap, overlayfs and a machine that runs Debian.
func Debian(ctx context.Context, cache string, progress func(string)) (Image, error) {
	im, err := debian(ctx, filepath.Join(cache, debianVersion), debianStages, progress)
	if err != nil {
		return Image{}, err
	}
	layers, err := goLayers(ctx, cache)
	if err != nil {
		return Image{}, fmt.Errorf("make Debian image: %w", err)
	}
	im.Layers = append(im.Layers, layers...)
	im.Config.Env = append(goEnv(debianPath), "LC_ALL=C.UTF-8")
	return im, nil
}

// DebianSmall returns what is enough to compile C and to run Python with numpy: a
// minimal system by debootstrap with those two, each in a layer of its own. It needs
// what [Debian] needs, and takes about a minute once.
func DebianSmall(ctx context.Context, cache string, progress func(string)) (Image, error) {
	return debian(ctx, filepath.Join(cache, smallVersion), smallStages, progress)
}

const debianPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// debian returns an image of the stages, made in dir unless it is there.
func debian(ctx context.Context, dir string, stages []debianStage, progress func(string)) (Image, error) {
	names := []string{"0-base"}
	for i, s := range stages {
		names = append(names, fmt.Sprintf("%d-%s", i+1, s.name))
	}
	im := Image{Config: v1.Config{
		Env: []string{"PATH=" + debianPath, "HOME=/root", "LC_ALL=C.UTF-8"},
		Cmd: []string{"/bin/bash"}, WorkingDir: "/",
	}}
	complete := true
	for _, n := range names {
		l := Layer{Name: n, Tar: filepath.Join(dir, n+".tar")}
		im.Layers = append(im.Layers, l)
		if _, err := os.Stat(l.Tar); err != nil {
			complete = false
		}
	}
	if !complete {
		if err := makeDebian(ctx, dir, names, stages, progress); err != nil {
			return Image{}, fmt.Errorf("make Debian image: %w", err)
		}
	}
	return im, nil
}

// makeDebian makes the layers' trees one over the other by overlayfs and packs them.
func makeDebian(ctx context.Context, dir string, names []string, stages []debianStage, progress func(string)) error {
	if os.Geteuid() != 0 {
		return errors.New("debootstrap needs root")
	}
	site, suite, err := aptSource(ctx)
	if err != nil {
		return err
	}
	trees := filepath.Join(dir, "trees")
	if err := os.RemoveAll(trees); err != nil {
		return err
	}
	if err := os.MkdirAll(trees, 0o755); err != nil {
		return err
	}
	progress(fmt.Sprintf("debootstrap %s from %s", suite, site))
	base := filepath.Join(trees, names[0])
	if err := run(ctx, "debootstrap", "--variant=minbase", suite, base, site); err != nil {
		return err
	}
	if err := emptyDirs(filepath.Join(base, "var/cache/apt/archives"), filepath.Join(base, "var/lib/apt/lists")); err != nil {
		return err
	}
	lowers := []string{base}
	for i, s := range stages {
		progress("apt-get install " + strings.Join(s.packages, " "))
		upper := filepath.Join(trees, names[i+1])
		if err := installDebian(ctx, trees, lowers, upper, s.packages); err != nil {
			return fmt.Errorf("layer %s: %w", names[i+1], err)
		}
		lowers = append([]string{upper}, lowers...)
	}
	for _, n := range names {
		progress("packing " + n)
		if err := ociWhiteouts(filepath.Join(trees, n)); err != nil {
			return err
		}
		if err := tarTree(ctx, filepath.Join(dir, n+".tar"), filepath.Join(trees, n)); err != nil {
			return err
		}
	}
	return os.RemoveAll(trees)
}

// aptSource returns the archive and suite from which this machine's apt gets the
// packages of its own release.
func aptSource(ctx context.Context) (site, suite string, err error) {
	osRelease, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(string(osRelease)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			suite = strings.Trim(v, `"`)
		}
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages").Output()
	if err != nil {
		return "", "", fmt.Errorf("ask apt for its sources: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 3 && f[1] == suite && f[2] == "main" {
			return f[0], suite, nil
		}
	}
	return "", "", fmt.Errorf("apt has no source for %q main; the image is made from this machine's Debian sources", suite)
}

// installDebian installs packages in an overlay of the lower trees; what changes is in upper.
func installDebian(ctx context.Context, trees string, lowers []string, upper string, packages []string) (err error) {
	root, work := filepath.Join(trees, "root"), filepath.Join(trees, "work")
	lists, archives := filepath.Join(trees, "lists"), filepath.Join(trees, "archives")
	for _, d := range []string{root, work, upper, lists, archives} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	// redirect_dir and metacopy would leave things in the upper directory that a layer cannot hold.
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=off,metacopy=off", strings.Join(lowers, ":"), upper, work)
	mounts := []struct {
		target, source, fstype string
		flags                  uintptr
		data                   string
	}{
		{root, "overlay", "overlay", 0, opts},
		{filepath.Join(root, "proc"), "proc", "proc", 0, ""},
		{filepath.Join(root, "var/lib/apt/lists"), lists, "", unix.MS_BIND, ""},
		{filepath.Join(root, "var/cache/apt"), archives, "", unix.MS_BIND, ""},
	}
	var undo []func()
	defer func() {
		for _, u := range slices.Backward(undo) {
			u()
		}
		err = errors.Join(err, os.RemoveAll(work))
	}()
	for _, m := range mounts {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
		undo = append(undo, cleanup.Add(func() {
			if e := unix.Unmount(m.target, 0); e != nil {
				err = errors.Join(err, fmt.Errorf("unmount %s: %w", m.target, e), unix.Unmount(m.target, unix.MNT_DETACH))
			}
		}))
	}
	// The stage needs the network; services must not start.
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return err
	}
	policy := filepath.Join(root, "usr/sbin/policy-rc.d")
	if err := errors.Join(
		os.WriteFile(filepath.Join(root, "etc/resolv.conf"), resolv, 0o644),
		os.WriteFile(policy, []byte("#!/bin/sh\nexit 101\n"), 0o755),
	); err != nil {
		return err
	}
	if entries, err := os.ReadDir(lists); err == nil && len(entries) == 0 {
		if err := aptGet(ctx, root, "update"); err != nil {
			return err
		}
	}
	if err := aptGet(ctx, root, append([]string{"install", "--yes", "--no-install-recommends"}, packages...)...); err != nil {
		return err
	}
	return errors.Join(
		os.Remove(policy),
		os.WriteFile(filepath.Join(root, "etc/resolv.conf"), nil, 0o644),
	)
}

// aptGet runs apt-get in root, where our directory for temporary files isn't.
func aptGet(ctx context.Context, root string, args ...string) error {
	return run(ctx, "chroot", append([]string{root, "env", "--unset=TMPDIR", "apt-get"}, args...)...)
}

func emptyDirs(dirs ...string) error {
	for _, d := range dirs {
		entries, err := os.ReadDir(d)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(d, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// ociWhiteouts replaces overlayfs' whiteouts (character devices 0:0, opaque attributes) by
// those of the image specification (files .wh.NAME and .wh..wh..opq).
func ociWhiteouts(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			buf := make([]byte, 8)
			if n, err := unix.Lgetxattr(path, "trusted.overlay.opaque", buf); err == nil && string(buf[:n]) == "y" {
				return os.WriteFile(filepath.Join(path, ".wh..wh..opq"), nil, 0o644)
			}
		case d.Type()&fs.ModeCharDevice != 0:
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return fmt.Errorf("stat %s: %w", path, err)
			}
			if st.Rdev == 0 {
				if err := os.Remove(path); err != nil {
					return err
				}
				return os.WriteFile(filepath.Join(filepath.Dir(path), ".wh."+d.Name()), nil, 0o644)
			}
		}
		return nil
	})
}
