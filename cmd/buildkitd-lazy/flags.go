package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/agext/levenshtein"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/util/disk"
	"github.com/moby/buildkit/util/profiler"
	"github.com/moby/sys/userns"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
)

// daemonFlags are the flags of stock buildkitd and its OCI worker, and our own, in the groups of --help. def supplies
// the defaults that --help shows.
func daemonFlags(def *bkconfig.Config) []cli.Flag {
	oci := &def.Workers.OCI
	inUserNS := userns.RunningInUserNS()
	var flags []cli.Flag
	add := func(category string, fs ...cli.Flag) {
		for _, f := range fs {
			place(f, category)
		}
		flags = append(flags, fs...)
	}

	add("Daemon",
		configFlag(),
		rootFlag(def),
		&cli.BoolFlag{
			Name:  "rootless",
			Usage: "default to what works in rootless containers; true inside a user namespace",
			Value: inUserNS,
		},
	)
	add("Listening",
		&cli.StringSliceFlag{
			Name:  "addr",
			Usage: "listening `ADDRESS`: unix://path, tcp://host:port or fd:// (socket activation); repeatable",
			Value: def.GRPC.Address[:1],
		},
		&cli.StringFlag{
			Name:  "group",
			Usage: "`GROUP` (name or gid) which owns the unix sockets",
			Value: optional(def.GRPC.GID, strconv.Itoa),
		},
		&cli.StringFlag{
			Name:  "tlscert",
			Usage: "certificate `FILE` for tcp and fd addresses",
			Value: def.GRPC.TLS.Cert,
		},
		&cli.StringFlag{
			Name:  "tlskey",
			Usage: "key `FILE` of that certificate",
			Value: def.GRPC.TLS.Key,
		},
		&cli.StringFlag{
			Name:  "tlscacert",
			Usage: "`FILE` of the CA that clients' certificates must be signed by",
			Value: def.GRPC.TLS.CA,
		},
	)
	add("Lazy loading", lazyMountFlag())
	add("Worker (OCI)",
		&cli.StringFlag{
			Name:  "oci-worker",
			Usage: "`true` or auto: the OCI worker cannot be switched off, there is no other",
			Value: orAuto(optional(oci.Enabled, strconv.FormatBool)),
		},
		ociBinaryFlag(def),
		&cli.StringSliceFlag{
			Name:  "oci-worker-labels",
			Usage: "`LABEL` of the worker (com.example.foo=bar); repeatable",
		},
		&cli.StringSliceFlag{
			Name:  "oci-worker-platform",
			Usage: "`PLATFORM` to build for instead of the detected ones; repeatable",
		},
		&cli.StringFlag{
			Name:  "oci-worker-snapshotter",
			Usage: "snapshotter `NAME` (auto, overlayfs, fuse-overlayfs, native, stargz)",
			Value: orAuto(oci.Snapshotter),
		},
		&cli.StringFlag{
			Name:  "oci-worker-proxy-snapshotter-path",
			Usage: "`SOCKET` of a proxy snapshotter (without unix://)",
		},
		&cli.IntFlag{
			Name:  "oci-max-parallelism",
			Usage: "`NUMBER` of build steps that run at the same time; 0 is no limit",
			Value: oci.MaxParallelism,
		},
		&cli.BoolFlag{
			Name:  "oci-worker-rootless",
			Usage: "run build steps rootless; true inside a user namespace",
			Value: inUserNS,
		},
	)
	add("Network of build steps",
		&cli.StringFlag{
			Name:  "oci-worker-net",
			Usage: "network `MODE` (auto, bridge, cni or host)",
			Value: oci.Mode,
		},
		&cli.StringFlag{
			Name:  "oci-cni-config-path",
			Usage: "CNI configuration `FILE`",
			Value: oci.CNIConfigPath,
		},
		&cli.StringFlag{
			Name:  "oci-cni-binary-dir",
			Usage: "`DIR` of CNI plugins",
			Value: oci.CNIBinaryPath,
		},
		&cli.IntFlag{
			Name:  "oci-cni-pool-size",
			Usage: "`NUMBER` of network namespaces to keep ready",
			Value: oci.CNIPoolSize,
		},
		&cli.BoolFlag{
			Name:  "proxy-network",
			Usage: "enforce the proxy network for all builds",
		},
	)
	add("Garbage collection",
		&cli.BoolFlag{
			Name:        "oci-worker-gc",
			Usage:       "collect garbage automatically",
			Value:       oci.GC == nil || *oci.GC,
			DefaultText: strconv.FormatBool(oci.GC == nil || *oci.GC),
		},
		&cli.StringFlag{
			Name:   "oci-worker-gc-keepstorage",
			Usage:  "`MB` to keep: reserved[,free[,maximum]]",
			Value:  keepStorage(def),
			Hidden: len(oci.GCPolicy) != 0, // a policy in the file makes the flag meaningless
		},
	)
	add("Security",
		&cli.StringSliceFlag{
			Name:  "allow-insecure-entitlement",
			Usage: "`ENTITLEMENT` that builds may ask for (network.host, security.insecure, device); repeatable",
		},
		&cli.StringFlag{
			Name:  "oci-worker-apparmor-profile",
			Usage: "AppArmor `PROFILE` of build steps",
		},
		&cli.BoolFlag{
			Name:  "oci-worker-selinux",
			Usage: "apply SELinux labels",
		},
		&cli.BoolFlag{
			Name:  "oci-worker-no-process-sandbox",
			Usage: "let build steps see, kill and trace the daemon's processes; rootless only",
		},
	)
	add("Devices",
		&cli.BoolFlag{
			Name:  "cdi-disabled",
			Usage: "switch the Container Device Interface off",
		},
		&cli.StringSliceFlag{
			Name:  "cdi-spec-dir",
			Usage: "`DIR` of CDI specifications; repeatable",
		},
	)
	add("Logs and debugging",
		&cli.BoolFlag{
			Name:  "debug",
			Usage: "log at level debug, and print stack traces of errors",
		},
		&cli.BoolFlag{
			Name:   "trace",
			Usage:  "log at level trace (deprecated: --log-level=trace)",
			Hidden: true,
		},
		&cli.StringFlag{
			Name:    "log-level",
			Usage:   "log `LEVEL` (panic, fatal, error, warn, info, debug, trace)",
			Value:   "info",
			Sources: cli.EnvVars("BUILDKITD_LOG_LEVEL"),
		},
		&cli.StringFlag{
			Name:  "log-format",
			Usage: "log `FORMAT`, json or text",
			Value: "text",
		},
		&cli.StringFlag{
			Name:    "debugaddr",
			Usage:   "`ADDRESS` for pprof, /metrics and /debug (eg. 127.0.0.1:6060)",
			Value:   def.GRPC.DebugAddress,
			Sources: cli.EnvVars("BUILDKITD_DEBUGADDR"),
		},
		&cli.StringFlag{
			Name:  "otel-socket-path",
			Usage: "`SOCKET` that build steps send their traces to",
		},
		&cli.BoolFlag{
			Name:  "save-cache-debug",
			Usage: "record what cache keys are made of, for /debug/cache",
		},
	)
	return flags
}

// The flags that `check` shares with the daemon.

func configFlag() *cli.StringFlag {
	return &cli.StringFlag{Name: "config", Usage: "configuration `FILE`", Value: defaultConfigPath()}
}

func rootFlag(def *bkconfig.Config) *cli.StringFlag {
	return &cli.StringFlag{Name: "root", Usage: "`DIR` of all state", Value: def.Root}
}

func ociBinaryFlag(def *bkconfig.Config) *cli.StringFlag {
	return &cli.StringFlag{
		Name:        "oci-worker-binary",
		Usage:       "`NAME` or path of the OCI runtime",
		Value:       def.Workers.OCI.Binary,
		DefaultText: "buildkit-runc, else runc",
	}
}

func lazyMountFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:        "lazy-mount",
		Usage:       "how lazy layers are mounted, `MODE` auto, erofs, fuse or off (pull every layer first); overrides mount in [lazy]",
		DefaultText: config.MountAuto,
		Sources:     cli.EnvVars("BUILDKITD_LAZY_MOUNT"),
	}
}

// ignoredContainerdFlags are those of stock's containerd worker, so that a command line written for stock works as
// long as it doesn't ask for that worker. They have no effect but --containerd-worker, which is checked.
func ignoredContainerdFlags() []cli.Flag {
	const usage = "no effect: there is no containerd worker here"
	flags := []cli.Flag{&cli.StringFlag{Name: "containerd-worker", Usage: "there is no containerd worker here; anything but true is accepted", Value: "auto", Hidden: true}}
	for _, name := range []string{
		"addr", "namespace", "runtime", "net", "snapshotter", "apparmor-profile", "gc-keepstorage",
	} {
		flags = append(flags, &cli.StringFlag{Name: "containerd-worker-" + name, Usage: usage, Hidden: true})
	}
	for _, name := range []string{"containerd-cni-config-path", "containerd-cni-binary-dir"} {
		flags = append(flags, &cli.StringFlag{Name: name, Usage: usage, Hidden: true})
	}
	for _, name := range []string{"labels", "platform"} {
		flags = append(flags, &cli.StringSliceFlag{Name: "containerd-worker-" + name, Usage: usage, Hidden: true})
	}
	for _, name := range []string{"selinux", "rootless", "gc"} {
		flags = append(flags, &cli.BoolFlag{Name: "containerd-worker-" + name, Usage: usage, Hidden: true})
	}
	for _, name := range []string{"containerd-cni-pool-size", "containerd-max-parallelism"} {
		flags = append(flags, &cli.IntFlag{Name: name, Usage: usage, Hidden: true})
	}
	for _, f := range flags {
		place(f, "")
	}
	return flags
}

// attachProfiler adds BuildKit's hidden --profile-* flags.
func attachProfiler(app *cli.Command) {
	before := len(app.Flags)
	profiler.Attach(app)
	for _, f := range app.Flags[before:] {
		place(f, "")
	}
}

// place puts a flag into a group of --help and takes it out of subcommands, which would inherit it otherwise.
func place(f cli.Flag, category string) {
	switch f := f.(type) {
	case *cli.StringFlag:
		f.Category, f.Local = category, true
	case *cli.StringSliceFlag:
		f.Category, f.Local = category, true
	case *cli.BoolFlag:
		f.Category, f.Local = category, true
	case *cli.IntFlag:
		f.Category, f.Local = category, true
	}
}

// usageError is what a wrong command line gets: one line which names the flag and the one that was probably meant.
func usageError(_ context.Context, c *cli.Command, err error, _ bool) error {
	help := "; " + c.FullName() + " --help lists the flags"
	name, unknown := strings.CutPrefix(err.Error(), "flag provided but not defined: -")
	if !unknown {
		return errors.New(err.Error() + help)
	}
	visible := []cli.Flag{}
	for _, f := range c.Flags {
		if v, ok := f.(cli.VisibleFlag); ok && v.IsVisible() {
			visible = append(visible, f)
		}
	}
	if near := cli.SuggestFlag(visible, name, false); near != "" && levenshtein.Distance(near, "--"+name, nil) <= len(name)/2 {
		return fmt.Errorf("unknown flag --%s; did you mean %s? (%s)", name, near, strings.TrimPrefix(help, "; "))
	}
	return fmt.Errorf("unknown flag --%s%s", name, help)
}

func optional[T any](v *T, format func(T) string) string {
	if v == nil {
		return ""
	}
	return format(*v)
}

func orAuto(s string) string {
	if s == "" {
		return "auto"
	}
	return s
}

// keepStorage is the default of --oci-worker-gc-keepstorage on the disk that holds the state directory, or will.
func keepStorage(def *bkconfig.Config) string {
	stat, err := disk.GetDiskStat(def.Root)
	for dir := def.Root; err != nil && dir != filepath.Dir(dir); {
		dir = filepath.Dir(dir)
		stat, err = disk.GetDiskStat(dir)
	}
	return formatKeepStorage(def.Workers.OCI.GCConfig, stat)
}
