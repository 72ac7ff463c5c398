package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/util/appdefaults"
	"github.com/moby/buildkit/util/disk"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
)

// load runs the command line as far as the settings. text is that of the configuration file.
func load(t *testing.T, text string, args ...string) (settings, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "buildkitd.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	app := newApp(new(bytes.Buffer), new(bytes.Buffer))
	var s settings
	app.Action = func(_ context.Context, c *cli.Command) (err error) {
		s, err = loadSettings(c)
		return err
	}
	err := app.Run(t.Context(), append([]string{"buildkitd-lazy", "--config", path}, args...))
	return s, err
}

func TestSettings(t *testing.T) {
	const file = `
root = "/file"
insecure-entitlements = ["security.insecure"]
proxyNetwork = true
[log]
level = "warn"
format = "json"
[grpc]
address = ["unix:///file.sock"]
debugAddress = "1.2.3.4:5"
gid = 5
[grpc.tls]
cert = "file.cert"
key = "file.key"
ca = "file.ca"
[otel]
socketPath = "/file.otel"
[cdi]
disabled = true
specDirs = ["/file.cdi"]
[worker.oci]
enabled = true
snapshotter = "native"
platforms = ["linux/arm64"]
rootless = true
noProcessSandbox = true
networkMode = "host"
cniConfigPath = "/file.cni"
cniBinaryPath = "/file.bin"
cniPoolSize = 3
binary = "filerunc"
proxySnapshotterPath = "/file.proxy"
apparmor-profile = "file"
selinux = true
max-parallelism = 2
gc = false
reservedSpace = "1GB"
[worker.oci.labels]
from = "file"
also = "file"
[lazy]
mount = "fuse"
fetch-timeout = "5s"
`
	for _, tt := range []struct {
		flag           string
		value          func(*settings) any
		builtin, file  any // without the flag: without a file, with the file above
		flagged, empty any // with the flag; empty is the value with the file where it differs from flagged
	}{
		{flag: "--root=/flag", value: func(s *settings) any { return s.buildkit.Root }, builtin: appdefaults.Root, file: "/file", flagged: "/flag"},
		{flag: "--addr=tcp://f --addr=unix://g,h", value: func(s *settings) any { return s.buildkit.GRPC.Address }, builtin: []string{appdefaults.Address}, file: []string{"unix:///file.sock"}, flagged: []string{"tcp://f", "unix://g,h"}},
		{flag: "--debugaddr=x:1", value: func(s *settings) any { return s.buildkit.GRPC.DebugAddress }, builtin: "", file: "1.2.3.4:5", flagged: "x:1"},
		{flag: "--group=77", value: func(s *settings) any { return *s.buildkit.GRPC.GID }, builtin: os.Getgid(), file: 5, flagged: 77},
		{flag: "--tlscert=a", value: func(s *settings) any { return s.buildkit.GRPC.TLS.Cert }, builtin: "", file: "file.cert", flagged: "a"},
		{flag: "--tlskey=a", value: func(s *settings) any { return s.buildkit.GRPC.TLS.Key }, builtin: "", file: "file.key", flagged: "a"},
		{flag: "--tlscacert=a", value: func(s *settings) any { return s.buildkit.GRPC.TLS.CA }, builtin: "", file: "file.ca", flagged: "a"},
		{flag: "--allow-insecure-entitlement=network.host --allow-insecure-entitlement=device", value: func(s *settings) any { return s.buildkit.Entitlements }, builtin: []string(nil), file: []string{"security.insecure"}, flagged: []string{"network.host", "device"}},
		{flag: "--proxy-network=false", value: func(s *settings) any { return s.buildkit.ProxyNetwork }, builtin: false, file: true, flagged: false},
		{flag: "--otel-socket-path=/o", value: func(s *settings) any { return s.buildkit.OTEL.SocketPath }, builtin: appdefaults.TraceSocketPath(false), file: "/file.otel", flagged: "/o"},
		{flag: "--cdi-disabled=false", value: func(s *settings) any { return s.buildkit.CDI.Disabled != nil && *s.buildkit.CDI.Disabled }, builtin: false, file: true, flagged: false},
		{flag: "--cdi-spec-dir=/a --cdi-spec-dir=/b", value: func(s *settings) any { return s.buildkit.CDI.SpecDirs }, builtin: appdefaults.CDISpecDirs, file: []string{"/file.cdi"}, flagged: []string{"/a", "/b"}},
		{flag: "--log-level=error", value: func(s *settings) any { return s.buildkit.Log.Level }, builtin: "", file: "warn", flagged: "error"},
		{flag: "--debug", value: func(s *settings) any { return s.buildkit.Log.Level }, builtin: "", file: "warn", flagged: "debug"},
		{flag: "--trace", value: func(s *settings) any { return s.buildkit.Log.Level }, builtin: "", file: "warn", flagged: "trace"},
		{flag: "--log-format=text", value: func(s *settings) any { return s.buildkit.Log.Format }, builtin: "", file: "json", flagged: "text"},

		{flag: "--oci-worker=auto", value: func(s *settings) any { return s.buildkit.Workers.OCI.Enabled != nil }, builtin: false, file: true, flagged: false},
		{flag: "--oci-worker-labels=a=b=c --oci-worker-labels=also=flag", value: func(s *settings) any { return s.buildkit.Workers.OCI.Labels }, builtin: map[string]string{}, file: map[string]string{"from": "file", "also": "file"}, flagged: map[string]string{"a": "b=c", "also": "flag"}, empty: map[string]string{"from": "file", "a": "b=c", "also": "flag"}},
		{flag: "--oci-worker-snapshotter=overlayfs", value: func(s *settings) any { return s.buildkit.Workers.OCI.Snapshotter }, builtin: "auto", file: "native", flagged: "overlayfs"},
		{flag: "--oci-worker-proxy-snapshotter-path=/p", value: func(s *settings) any { return s.buildkit.Workers.OCI.ProxySnapshotterPath }, builtin: "", file: "/file.proxy", flagged: "/p"},
		{flag: "--oci-worker-platform=linux/386", value: func(s *settings) any {
			return slices.Contains(s.buildkit.Workers.OCI.Platforms, "linux/386") && len(s.buildkit.Workers.OCI.Platforms) == 1
		}, builtin: false, file: false, flagged: true},
		{flag: "--oci-worker-net=cni", value: func(s *settings) any { return s.buildkit.Workers.OCI.Mode }, builtin: "auto", file: "host", flagged: "cni"},
		{flag: "--oci-cni-config-path=/c", value: func(s *settings) any { return s.buildkit.Workers.OCI.CNIConfigPath }, builtin: appdefaults.DefaultCNIConfigPath, file: "/file.cni", flagged: "/c"},
		{flag: "--oci-cni-binary-dir=/c", value: func(s *settings) any { return s.buildkit.Workers.OCI.CNIBinaryPath }, builtin: appdefaults.DefaultCNIBinDir, file: "/file.bin", flagged: "/c"},
		{flag: "--oci-cni-pool-size=9", value: func(s *settings) any { return s.buildkit.Workers.OCI.CNIPoolSize }, builtin: 0, file: 3, flagged: 9},
		{flag: "--oci-worker-binary=crun", value: func(s *settings) any { return s.buildkit.Workers.OCI.Binary }, builtin: "", file: "filerunc", flagged: "crun"},
		{flag: "--oci-worker-apparmor-profile=p", value: func(s *settings) any { return s.buildkit.Workers.OCI.ApparmorProfile }, builtin: "", file: "file", flagged: "p"},
		{flag: "--oci-worker-selinux=false", value: func(s *settings) any { return s.buildkit.Workers.OCI.SELinux }, builtin: false, file: true, flagged: false},
		{flag: "--oci-max-parallelism=4", value: func(s *settings) any { return s.buildkit.Workers.OCI.MaxParallelism }, builtin: 0, file: 2, flagged: 4},
		{flag: "--oci-worker-no-process-sandbox=false", value: func(s *settings) any { return s.buildkit.Workers.OCI.NoProcessSandbox }, builtin: false, file: true, flagged: false},
		{flag: "--rootless=false", value: func(s *settings) any { return s.buildkit.Workers.OCI.Rootless }, builtin: false, file: true, flagged: false},
		{flag: "--oci-worker-gc", value: func(s *settings) any { gc := s.buildkit.Workers.OCI.GC; return gc == nil || *gc }, builtin: true, file: false, flagged: true},
		{flag: "--oci-worker-gc-keepstorage=1,2,3", value: func(s *settings) any {
			gc := s.buildkit.Workers.OCI.GCConfig
			return []int64{gc.GCReservedSpace.Bytes, gc.GCMinFreeSpace.Bytes, gc.GCMaxUsedSpace.Bytes}
		}, builtin: []int64{0, 0, 0}, file: []int64{1 << 30, 0, 0}, flagged: []int64{1e6, 2e6, 3e6}},
		{flag: "--oci-worker-gc-keepstorage=7", value: func(s *settings) any { return s.buildkit.Workers.OCI.GCReservedSpace.Bytes }, builtin: int64(0), file: int64(1 << 30), flagged: int64(7e6)},

		{flag: "--lazy-mount=off", value: func(s *settings) any { return s.lazy.Mount }, builtin: config.MountAuto, file: config.MountFUSE, flagged: config.MountOff},
		{flag: "--lazy-mount=auto", value: func(s *settings) any { return s.lazy }, builtin: config.Default(), file: config.Lazy{Mount: config.MountFUSE, BackgroundFetch: true, FetchTimeout: 5 * time.Second}, flagged: config.Default(), empty: config.Lazy{Mount: config.MountAuto, BackgroundFetch: true, FetchTimeout: 5 * time.Second}},
	} {
		t.Run(tt.flag, func(t *testing.T) {
			args := strings.Fields(tt.flag)
			withBoth := tt.empty
			if withBoth == nil {
				withBoth = tt.flagged
			}
			for _, step := range []struct {
				what, text string
				args       []string
				want       any
			}{
				{"defaults", "", nil, tt.builtin},
				{"file", file, nil, tt.file},
				{"flag", "", args, tt.flagged},
				{"file and flag", file, args, withBoth},
			} {
				s, err := load(t, step.text, step.args...)
				if err != nil {
					t.Fatalf("%s: %v", step.what, err)
				}
				if got := tt.value(&s); !reflect.DeepEqual(got, step.want) {
					t.Errorf("%s: got %v, want %v", step.what, got, step.want)
				}
			}
		})
	}
}

// TestTraceSocketIsNotShared is about two daemons on one host: each has its socket for the traces of build steps.
func TestTraceSocketIsNotShared(t *testing.T) {
	socket := func(text string, args ...string) string {
		s, err := load(t, text, args...)
		if err != nil {
			t.Fatal(err)
		}
		return s.buildkit.OTEL.SocketPath
	}
	usual := appdefaults.TraceSocketPath(false)
	one, other := socket("", "--root=/one"), socket(`root = "/other"`)
	if one == other || one == usual || other == usual || filepath.Dir(one) != filepath.Dir(usual) {
		t.Errorf("the daemons of /one and /other, beside one of the default root (%s), have the sockets %s and %s", usual, one, other)
	}
	for what, got := range map[string][2]string{
		"the default root, given":  {socket("", "--root="+appdefaults.Root+"/"), usual},
		"the same root once more":  {socket("", "--root=/one/"), one},
		"a socket in the file":     {socket("[otel]\nsocketPath = \"/s\"\n", "--root=/one"), "/s"},
		"a socket as a flag":       {socket("", "--root=/one", "--otel-socket-path=/f"), "/f"},
		"the usual one, as a flag": {socket("", "--root=/one", "--otel-socket-path="+usual), usual},
	} {
		if got[0] != got[1] {
			t.Errorf("%s: socket %s, want %s", what, got[0], got[1])
		}
	}
}

func TestSettingsFromEnvironment(t *testing.T) {
	t.Setenv("BUILDKITD_LOG_LEVEL", "error")
	t.Setenv("BUILDKITD_DEBUGADDR", "localhost:1")
	t.Setenv("BUILDKITD_LAZY_MOUNT", "off")
	s, err := load(t, "[log]\nlevel = \"warn\"\n[lazy]\nmount = \"fuse\"\n")
	if err != nil {
		t.Fatal(err)
	}
	if s.buildkit.Log.Level != "error" || s.buildkit.GRPC.DebugAddress != "localhost:1" || s.lazy.Mount != config.MountOff {
		t.Errorf("level %q, debug address %q, mount %q", s.buildkit.Log.Level, s.buildkit.GRPC.DebugAddress, s.lazy.Mount)
	}
	if s, err = load(t, "", "--log-level=debug", "--lazy-mount=fuse"); err != nil || s.buildkit.Log.Level != "debug" || s.lazy.Mount != config.MountFUSE {
		t.Errorf("flags over environment: level %q, mount %q, %v", s.buildkit.Log.Level, s.lazy.Mount, err)
	}
}

func TestWrongSettings(t *testing.T) {
	for _, tt := range []struct{ text, args, want string }{
		{args: "--containerd-worker=true", want: "there is no containerd worker in buildkitd-lazy"},
		{args: "--containerd-worker=1", want: "there is no containerd worker in buildkitd-lazy"},
		{text: "[worker.containerd]\nenabled = true\n", want: "there is no containerd worker in buildkitd-lazy"},
		{args: "--containerd-worker=yes", want: "--containerd-worker=yes: want true, false or auto"},
		{args: "--oci-worker=false", want: "the OCI worker is switched off and buildkitd-lazy has no other"},
		{text: "[worker.oci]\nenabled = false\n", want: "the OCI worker is switched off and buildkitd-lazy has no other"},
		{args: "--oci-worker-labels=x", want: "--oci-worker-labels=x: want key=value"},
		{args: "--oci-worker-gc-keepstorage=1,x", want: "--oci-worker-gc-keepstorage=1,x: want reserved[,free[,maximum]] in MB"},
		{args: "--allow-insecure-entitlement=network", want: "--allow-insecure-entitlement=network: unknown entitlement"},
		{args: "--group=no-such-group-here", want: "--group=no-such-group-here: group: unknown group no-such-group-here"},
		{args: "--lazy-mount=eros", want: `--lazy-mount (or BUILDKITD_LAZY_MOUNT): unknown mount "eros"; want auto, erofs, fuse or off`},
		{text: "[lazy]\nmont = 1\n", want: `buildkitd.toml:2: unknown key "mont" in [lazy]; did you mean "mount"?`},
	} {
		t.Run(tt.text+tt.args, func(t *testing.T) {
			_, err := load(t, tt.text, strings.Fields(tt.args)...)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v\nwant %s", err, tt.want)
			}
		})
	}
}

// Command lines written for stock go on working, with a word about what has no effect.
func TestContainerdFlagsAreAccepted(t *testing.T) {
	for _, args := range []string{"", "--containerd-worker=false", "--containerd-worker=auto", "--containerd-worker false --oci-worker true"} {
		s, err := load(t, "", strings.Fields(args)...)
		if err != nil || len(s.warnings) != 0 {
			t.Errorf("%q: %v, warnings %q", args, err, s.warnings)
		}
	}
	s, err := load(t, "[worker.containerd]\nenabled = false\nnamespace = \"x\"\n", "--containerd-worker-addr=/run/x.sock", "--containerd-worker-rootless=false", "--containerd-cni-pool-size=2", "--containerd-worker-labels=a=b")
	if err != nil || len(s.warnings) != 4 {
		t.Errorf("%v, warnings %q", err, s.warnings)
	}
}

func TestLookupGroup(t *testing.T) {
	for _, tt := range []struct {
		group string
		want  int
	}{{"root", 0}, {"0", 0}, {"4321", 4321}} {
		if got, err := lookupGroup(tt.group); err != nil || got != tt.want {
			t.Errorf("%s: %d, %v", tt.group, got, err)
		}
	}
	if _, err := lookupGroup("99999999999999999999"); err == nil || !strings.Contains(err.Error(), "out of range") {
		t.Errorf("too large: %v", err)
	}
}

func TestSettingsWarn(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.toml")
	for _, tt := range []struct{ text, args, want string }{
		{args: "--config " + missing, want: "configuration file " + missing + " does not exist"},
		{text: "debug = true\n", want: `key "debug" is deprecated`},
		{text: "trace = true\n", want: `key "trace" is deprecated`},
		{text: "[lasy]\n", want: "did you mean [lazy]?"},
		{args: "--trace", want: "--trace is deprecated"},
		{args: "--tlscacert=x", want: "no TLS"},
	} {
		s, err := load(t, tt.text, strings.Fields(tt.args)...)
		if err != nil || len(s.warnings) != 1 || !strings.Contains(s.warnings[0], tt.want) {
			t.Errorf("%s%s: %v, warnings %q, want %s", tt.text, tt.args, err, s.warnings, tt.want)
		}
	}
}

func TestKeepStorageRoundTrip(t *testing.T) {
	for _, s := range []string{"1", "1,2", "1,2,3", "0,0,5"} {
		cfg, err := parseKeepStorage(s)
		if err != nil {
			t.Fatal(err)
		}
		if got := formatKeepStorage(cfg, disk.DiskStat{}); got != s {
			t.Errorf("%s came back as %s", s, got)
		}
	}
	var old bkconfig.GCConfig
	old.GCKeepStorage.Bytes = 12e6 //nolint:staticcheck // the key's old name
	if got := formatKeepStorage(old, disk.DiskStat{}); got != "12" {
		t.Errorf("gckeepstorage = 12 MB is %s", got)
	}
	// Before the first start, what will be the default after it.
	dir := t.TempDir()
	there, later := &bkconfig.Config{Root: dir}, &bkconfig.Config{Root: filepath.Join(dir, "not", "yet")}
	if a, b := keepStorage(there), keepStorage(later); a != b || strings.Count(a, ",") != 2 {
		t.Errorf("%s where the state directory is, %s where it will be", a, b)
	}
}

func TestSystem(t *testing.T) {
	zero := 0
	if err := setupSystem(&bkconfig.SystemConfig{MaxRegistryConcurrency: &zero}); err == nil || !strings.Contains(err.Error(), "maxRegistryConcurrency in [system] is 0") {
		t.Error(err)
	}
	for _, log := range []bkconfig.LogConfig{{Format: "xml"}, {Level: "loud"}} {
		if err := setupLogging(bkconfig.Config{Log: log}); err == nil || !strings.Contains(err.Error(), "want ") {
			t.Errorf("%+v: %v", log, err)
		}
	}
}

func TestProvenanceEnv(t *testing.T) {
	dir := t.TempDir()
	if env, err := provenanceEnv(filepath.Join(dir, "none")); err != nil || env != nil {
		t.Errorf("no directory: %v, %v", env, err)
	}
	for name, text := range map[string]string{"a.json": `{"a": 1, "b": 1}`, "b.json": `{"b": 2}`, "c.txt": `not JSON`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env, err := provenanceEnv(dir)
	if want := map[string]any{"a": 1.0, "b": 2.0}; err != nil || !reflect.DeepEqual(env, want) {
		t.Errorf("got %v, %v, want %v", env, err, want)
	}
	if err := os.WriteFile(filepath.Join(dir, "d.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := provenanceEnv(dir); err == nil || !strings.Contains(err.Error(), "d.json") {
		t.Errorf("broken file: %v", err)
	}
}
