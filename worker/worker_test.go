package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/platforms"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	bkexecutor "github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

func says(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one that says %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%q does not say %q", err, p)
		}
	}
}

func TestGCPolicy(t *testing.T) {
	root := t.TempDir()
	off, on := false, true
	if p := gcPolicy(bkconfig.GCConfig{GC: &off, GCPolicy: []bkconfig.GCPolicy{{All: true}}}, root); p != nil {
		t.Errorf("collection is off: %+v", p)
	}
	// BuildKit's default: what is easily made again first, internal data last.
	def := gcPolicy(bkconfig.GCConfig{GC: &on}, root)
	if len(def) != 4 || len(def[0].Filter) == 0 || def[0].KeepDuration != 48*time.Hour || !def[3].All || def[3].MaxUsedSpace <= 0 {
		t.Errorf("default: %+v", def)
	}
	var capped bkconfig.GCConfig
	capped.GCMaxUsedSpace = bkconfig.DiskSpace{Bytes: 5e9}
	if p := gcPolicy(capped, root); p[3].MaxUsedSpace != 5e9 || p[1].MaxUsedSpace != 5e9 {
		t.Errorf("with a limit: %+v", p)
	}
	got := gcPolicy(bkconfig.GCConfig{GCPolicy: []bkconfig.GCPolicy{
		{Filters: []string{"type==regular"}, KeepDuration: bkconfig.Duration{Duration: time.Hour}, KeepBytes: bkconfig.DiskSpace{Bytes: 11}},
		{All: true, KeepBytes: bkconfig.DiskSpace{Bytes: 11}, ReservedSpace: bkconfig.DiskSpace{Bytes: 22}, MaxUsedSpace: bkconfig.DiskSpace{Bytes: 33}, MinFreeSpace: bkconfig.DiskSpace{Percentage: 10}},
	}}, root)
	if len(got) != 2 || got[0].ReservedSpace != 11 || !slices.Equal(got[0].Filter, []string{"type==regular"}) || got[0].KeepDuration != time.Hour || got[0].All {
		t.Errorf("rule with the old key: %+v", got)
	}
	if got[1].ReservedSpace != 22 || got[1].MaxUsedSpace != 33 || got[1].MinFreeSpace < 1e9 || !got[1].All {
		t.Errorf("rule with the new keys: %+v", got)
	}
}

func TestParsePlatforms(t *testing.T) {
	ps, err := parsePlatforms([]string{"linux/amd64", "linux/aarch64", "linux/arm/v7"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range ps {
		names = append(names, platforms.Format(p))
	}
	if want := []string{"linux/amd64", "linux/arm64", "linux/arm/v7"}; !slices.Equal(names, want) {
		t.Errorf("platforms %q, want %q", names, want)
	}
	_, err = parsePlatforms([]string{"linux/amd64", "not//a platform"})
	says(t, err, `"not//a platform"`)
}

func TestIdentityMapping(t *testing.T) {
	if m, err := identityMapping(""); m != nil || err != nil {
		t.Errorf("no user: %v, %v", m, err)
	}
	_, err := identityMapping("nobody-of-that-name")
	says(t, err, "user remap", "nobody-of-that-name")
}

func TestRuntime(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	_, err := runtimeOf("")
	if !errors.Is(err, ErrNoRuntime) {
		t.Errorf("nothing installed: %v", err)
	}
	says(t, err, "apt-get install runc", "--oci-worker-binary")
	_, err = runtimeOf("crun")
	says(t, err, "OCI runtime crun", "not found")
	for _, name := range []string{"runc", "buildkit-runc", "crun"} {
		bin := filepath.Join(dir, name)
		if err := os.WriteFile(bin, []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if found, err := runtimeOf(""); (err == nil) != (name != "crun") || err == nil && found != name {
			t.Errorf("with %s: %s, %v", name, found, err)
		}
		for _, asked := range []string{bin, name} {
			if found, err := runtimeOf(asked); err != nil || found != asked {
				t.Errorf("%s: %s, %v", asked, found, err)
			}
		}
		if err := os.Remove(bin); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStargzTuning(t *testing.T) {
	for name, c := range map[string]struct {
		raw  map[string]any
		want tuning
	}{
		"none":  {nil, tuning{}},
		"ours":  {map[string]any{"noprefetch": true, "no_background_fetch": true}, tuning{true, true}},
		"other": {map[string]any{"no_background_fetch": true, "blob": map[string]any{"chunk_size": int64(50000)}}, tuning{NoBackgroundFetch: true}},
	} {
		if got, err := stargzTuning(c.raw); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, c.want)
		}
	}
	_, err := stargzTuning(map[string]any{"noprefetch": "perhaps"})
	says(t, err, "[worker.oci.stargzSnapshotter]")
}

// TestDoor needs root and /dev/fuse for the lazy ones.
func TestDoor(t *testing.T) {
	best := "erofs"
	if err := snapshot.Supported(t.TempDir(), snapshot.DoorEROFS); err != nil {
		t.Log(err)
		best = "fuse"
	}
	for name, c := range map[string]struct {
		mount, snapshotter, proxy string
		lazy                      bool
		name, reason, err         string
	}{
		"auto":                   {mount: "auto", snapshotter: "auto", lazy: true, name: best, reason: "works here"},
		"zero value":             {lazy: true, name: best, reason: "works here"},
		"stargz":                 {mount: "auto", snapshotter: "stargz", lazy: true, name: best, reason: "works here"},
		"fuse":                   {mount: "fuse", lazy: true, name: "fuse", reason: "FUSE"},
		"off":                    {mount: "off", name: "overlayfs", reason: `"off" in the configuration`},
		"off with stargz":        {mount: "off", snapshotter: "stargz", name: "overlayfs", reason: `"off" in the configuration`},
		"other snapshotter":      {mount: "auto", snapshotter: "native", name: "native", reason: `"native" is configured`},
		"overlayfs":              {mount: "auto", snapshotter: "overlayfs", name: "overlayfs", reason: `"overlayfs" is configured`},
		"off and other":          {mount: "off", snapshotter: "native", name: "native", reason: `"off"`},
		"fuse and other":         {mount: "fuse", snapshotter: "native", err: `the snapshotter "native"`},
		"unknown snapshotter":    {mount: "auto", snapshotter: "zfs", err: `unknown snapshotter "zfs"`},
		"proxy without a socket": {mount: "auto", snapshotter: "x", proxy: "/nowhere/sock", err: "proxy snapshotter"},
		"proxy":                  {mount: "auto", snapshotter: "x", proxy: "sock", name: "x", reason: "proxy snapshotter is configured"},
		"fuse and proxy":         {mount: "fuse", snapshotter: "x", proxy: "sock", err: "leave one of them out"},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "state")
			opt := Options{Config: &bkconfig.Config{Root: root}, Lazy: config.Lazy{Mount: c.mount}}
			opt.Config.Workers.OCI.Snapshotter = c.snapshotter
			if c.proxy == "sock" {
				c.proxy = filepath.Join(t.TempDir(), "sock")
				if err := os.WriteFile(c.proxy, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			opt.Config.Workers.OCI.ProxySnapshotterPath = c.proxy
			f, door, err := snapshotterFactory(opt, &report.Reporter{})
			if c.err != "" {
				says(t, err, c.err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if door.Lazy != c.lazy || door.Name != c.name || !strings.Contains(door.Reason, c.reason) {
				t.Errorf("door %+v", door)
			}
			// BuildKit keys its lazy paths on this name.
			if (f.Name == "stargz") != c.lazy || f.New == nil {
				t.Errorf("factory %+v", f)
			}
			if left, _ := os.ReadDir(root); len(left) != 0 {
				t.Errorf("left in the state directory: %v", left)
			}
		})
	}
}

func TestStateDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := snapshotterFactory(Options{Config: &bkconfig.Config{Root: filepath.Join(file, "state")}}, &report.Reporter{})
	says(t, err, "state directory", file)
}

// failing runs nothing in a container: a lazy read fails meanwhile, if it's told so, and something is executed there.
type failing struct {
	bkexecutor.Executor
	err  error
	read func()
	exec func() // in the container
}

func (f failing) Run(ctx context.Context, _ string, rootfs bkexecutor.Mount, _ []bkexecutor.Mount, _ bkexecutor.ProcessInfo, _ chan<- struct{}) (resourcestypes.Recorder, error) {
	ref, err := rootfs.Src.Mount(ctx, false)
	if err != nil {
		return nil, err
	}
	if _, _, err := ref.Mount(); err != nil {
		return nil, err
	}
	f.exec()
	f.read()
	return nil, f.err
}

func (f failing) Exec(context.Context, string, bkexecutor.ProcessInfo) error {
	f.read()
	return f.err
}

func TestExecutorExplains(t *testing.T) {
	exit := fmt.Errorf("process failed: %w", &gatewayapi.ExitError{ExitCode: 5})
	gone := errors.New("503 of the registry")
	own, anothers := digest.FromString("own"), digest.FromString("another's")
	at := func(dir string) (digest.Digest, bool) { return own, dir == "/snapshots/1/fs" }
	for name, c := range map[string]struct {
		err      error
		layer    digest.Digest // that could not be read
		explains bool
	}{
		"fine":                    {nil, "", false},
		"fine in spite of a read": {nil, own, false},
		"failed by itself":        {exit, "", false},
		"failed by itself, while a layer of another build could not be read": {exit, anothers, false},
		"failed because of a read": {exit, own, true},
	} {
		t.Run(name, func(t *testing.T) {
			var rep report.Reporter
			f := &failing{err: c.err, read: func() {
				if c.layer != "" {
					rep.Denied(c.layer, gone)
				}
			}}
			e := &executor{reporter: &rep, Executor: f, layerAt: at, expect: func(string, []fill.Expected) {}}
			var exec, ended error
			f.exec = func() {
				exec = e.Exec(t.Context(), "container", bkexecutor.ProcessInfo{})
				time.Sleep(time.Millisecond)
				f.read = func() {}
				ended = e.Exec(t.Context(), "container", bkexecutor.ProcessInfo{})
			}
			_, run := e.Run(t.Context(), "container", bkexecutor.Mount{Src: mounted{{Type: "bind", Source: "/snapshots/1/fs"}}}, nil, bkexecutor.ProcessInfo{}, nil)
			for who, err := range map[string]error{"the container": run, "what was executed in it": exec, "what was executed afterwards": ended} {
				if (err == nil) != (c.err == nil) {
					t.Fatalf("%s: error %v", who, err)
				}
				if err == nil {
					continue
				}
				if inner, ok := errors.AsType[*gatewayapi.ExitError](err); !ok || inner.ExitCode != 5 {
					t.Errorf("%s: the exit code is lost in %q", who, err)
				}
				if c.explains && who != "what was executed afterwards" {
					says(t, err, "lazy layers could not be read", gone.Error(), c.err.Error())
				} else if err != c.err { //nolint:errorlint // the very same
					t.Errorf("%s: error %q", who, err)
				}
			}
			if len(e.running) > 0 {
				t.Errorf("containers that still run: %v", e.running)
			}
		})
	}
}
