package baseimage

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// goroot is where images have their Go toolchain.
const goroot = "usr/local/go"

// goEnv is what a Go program is built with inside an image, where no network is needed.
func goEnv(path string) []string {
	return []string{
		"PATH=/usr/local/go/bin:" + path,
		"HOME=/root",
		"CGO_ENABLED=0",
		"GOTOOLCHAIN=local",
		"GOFLAGS=-buildvcs=false",
		"GOPROXY=off",
	}
}

// CacheDir is where made images are kept between runs: BUILDKITD_LAZY_BENCH_CACHE,
// or a directory in the user's cache.
func CacheDir() (string, error) {
	if dir := os.Getenv("BUILDKITD_LAZY_BENCH_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find a directory for base images: %w; set BUILDKITD_LAZY_BENCH_CACHE", err)
	}
	return filepath.Join(dir, "buildkitd-lazy-bench"), nil
}

// Busybox returns an image of one layer: busybox, /etc, /tmp and what else a
// shell wants. It needs Debian's busybox-static.
func Busybox(ctx context.Context, cache string) (Image, error) {
	l, err := busyboxLayer(ctx, cache)
	if err != nil {
		return Image{}, fmt.Errorf("make busybox image: %w", err)
	}
	return Image{
		Layers: []Layer{l},
		Config: v1.Config{Env: []string{"PATH=/bin:/usr/bin", "HOME=/root"}, Cmd: []string{"/bin/sh"}},
	}, nil
}

// Go returns a Go development image: busybox, and the Go toolchain in three
// layers (sources; compiler, linker and commands; the rest). It builds programs
// that need the standard library only, without a network. The tar files are made
// in cache once for each version of Go.
func Go(ctx context.Context, cache string) (Image, error) {
	bb, err := busyboxLayer(ctx, cache)
	if err != nil {
		return Image{}, fmt.Errorf("make Go image: %w", err)
	}
	layers, err := goLayers(ctx, cache)
	if err != nil {
		return Image{}, fmt.Errorf("make Go image: %w", err)
	}
	return Image{
		Layers: append([]Layer{bb}, layers...),
		Config: v1.Config{Env: goEnv("/bin:/usr/bin"), Cmd: []string{"/bin/sh"}, WorkingDir: "/"},
	}, nil
}

func busyboxLayer(ctx context.Context, cache string) (Layer, error) {
	bin, err := exec.LookPath("busybox")
	if err != nil {
		return Layer{}, fmt.Errorf("%w; install Debian's busybox-static", err)
	}
	content, err := os.ReadFile(bin)
	if err != nil {
		return Layer{}, err
	}
	sum := sha256.Sum256(content)
	l := Layer{Name: "busybox", Tar: filepath.Join(cache, "busybox-v1-"+hex.EncodeToString(sum[:6])+".tar")}
	if _, err := os.Stat(l.Tar); err == nil {
		return l, nil
	}
	list, err := exec.CommandContext(ctx, bin, "--list").Output()
	if err != nil {
		return Layer{}, fmt.Errorf("busybox --list: %w", err)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Layer{}, err
	}
	entries := []Entry{
		Dir("bin"), Dir("dev"), Dir("etc"), Dir("home"), Dir("proc"), Dir("root").Mode(0o700), Dir("run"), Dir("sys"),
		Dir("tmp").Mode(0o1777), Dir("usr"), Dir("usr/bin"), Dir("usr/local"), Dir("var"), Dir("var/tmp").Mode(0o1777),
		File("bin/busybox", string(content)).Mode(0o755),
		File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
		File("etc/group", "root:x:0:\nnobody:x:65534:\n"),
		File("etc/nsswitch.conf", "hosts: files dns\n"),
		File("etc/os-release", "ID=busybox\nNAME=Busybox\n"),
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet != "busybox" {
			entries = append(entries, Hardlink("bin/"+applet, "bin/busybox").Mode(0o755))
		}
	}
	entries = append(entries, Symlink("usr/bin/env", "../../bin/busybox"))
	tmp, err := os.MkdirTemp(cache, "busybox-")
	if err != nil {
		return Layer{}, err
	}
	defer os.RemoveAll(tmp)
	made, err := TarOf(tmp, "busybox", entries...)
	if err != nil {
		return Layer{}, err
	}
	return l, os.Rename(made.Tar, l.Tar)
}

// goLayers packs the local toolchain in three layers.
func goLayers(ctx context.Context, cache string) ([]Layer, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("find the local Go toolchain: %w", err)
	}
	root, version, ok := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if !ok {
		return nil, errors.New("find the local Go toolchain: go env printed no version")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	parts := []struct {
		name string
		args []string
	}{
		{"go-src", []string{"--exclude=./pkg", "--exclude=./bin", "--exclude=./test", "--exclude=./doc", "--exclude=./api", "--exclude=./misc"}},
		{"go-bin", []string{"--exclude=./src", "--exclude=./lib", "--exclude=./test", "--exclude=./doc", "--exclude=./api", "--exclude=./misc"}},
		{"go-rest", []string{"--exclude=./src", "--exclude=./pkg", "--exclude=./bin", "--exclude=./lib"}},
	}
	var layers []Layer
	for _, p := range parts {
		l := Layer{Name: p.name, Tar: filepath.Join(cache, version+"-v2-"+p.name+".tar")}
		layers = append(layers, l)
		if _, err := os.Stat(l.Tar); err == nil {
			continue
		}
		// The flags let the transformation leave targets of symlinks alone.
		args := append(p.args, "--anchored", "--owner=0", "--group=0", "--transform=flags=rh;s,^\\.,"+goroot+",")
		if err := tarTree(ctx, l.Tar+".tree", root, args...); err != nil {
			return nil, err
		}
		if err := underParents(l.Tar, l.Tar+".tree"); err != nil {
			return nil, fmt.Errorf("pack %s: %w", p.name, err)
		}
	}
	return layers, nil
}

// underParents makes out of tree, which has files below goroot, by putting the directories above
// that before them: builders write them, and a layer without them can't be mounted lazily.
func underParents(out, tree string) (err error) {
	in, err := os.Open(tree)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close(), os.Remove(tree)) }()
	tmp, err := os.Create(out + ".tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, tmp.Close()); err == nil {
			err = os.Rename(tmp.Name(), out)
		}
	}()
	tw := tar.NewWriter(tmp)
	for _, d := range []Entry{Dir("usr"), Dir("usr/local")} {
		d.Header.ModTime = time.Unix(1_700_000_000, 0)
		if err := tw.WriteHeader(&d.Header); err != nil {
			return err
		}
	}
	// Not closed: the archive goes on with the tree's entries.
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err = io.Copy(tmp, in)
	return err
}
