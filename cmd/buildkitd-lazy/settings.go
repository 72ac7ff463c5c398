package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/sys/userns"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
)

// settings are the file, the defaults, the environment and the flags, in rising precedence.
type settings struct {
	buildkit bkconfig.Config
	lazy     config.Lazy
	warnings []string // to be logged once the logger is configured
}

var (
	errRootless = errors.New("rootless mode has to be started as the mapped root of a user namespace: start it below rootlesskit")

	errContainerdWorker = errors.New("there is no containerd worker in buildkitd-lazy, its lazy layers live in its own OCI worker: remove --containerd-worker=true and [worker.containerd] enabled, or run stock buildkitd")

	errNoWorker = errors.New("the OCI worker is switched off and buildkitd-lazy has no other: remove --oci-worker=false and [worker.oci] enabled = false")
)

// loadSettings reads the file that --config names and applies the flags to it.
func loadSettings(c *cli.Command) (settings, error) {
	file, err := config.Load(c.String("config"))
	if err != nil {
		return settings{}, err
	}
	s := settings{buildkit: file.BuildKit, lazy: file.Lazy, warnings: file.Warnings}
	if !file.Found && c.IsSet("config") {
		s.warn("configuration file %s does not exist; going on with defaults", c.String("config"))
	}
	if s.buildkit.Debug { //nolint:staticcheck // deprecated, but in people's files
		s.warn(`key "debug" is deprecated; write level = "debug" in [log]`)
	}
	if s.buildkit.Trace { //nolint:staticcheck // deprecated, but in people's files
		s.warn(`key "trace" is deprecated; write level = "trace" in [log]`)
	}
	setDefaults(&s.buildkit)
	for _, apply := range []func(*cli.Command) error{s.applyDaemonFlags, s.applyOCIFlags, s.applyContainerdFlags, s.applyLazyFlags} {
		if err := apply(c); err != nil {
			return settings{}, err
		}
	}
	if file.BuildKit.OTEL.SocketPath == "" && !c.IsSet("otel-socket-path") {
		s.buildkit.OTEL.SocketPath = traceSocketPath(s.buildkit.Root)
	}
	return s, nil
}

func (s *settings) warn(format string, args ...any) {
	s.warnings = append(s.warnings, fmt.Sprintf(format, args...))
}

func (s *settings) applyDaemonFlags(c *cli.Command) error {
	cfg := &s.buildkit
	if c.IsSet("debug") && c.Bool("debug") {
		cfg.Log.Level = "debug"
	}
	if c.IsSet("trace") {
		s.warn("--trace is deprecated; use --log-level=trace")
		if c.Bool("trace") {
			cfg.Log.Level = "trace"
		}
	}
	set(c, "log-format", &cfg.Log.Format, c.String)
	set(c, "log-level", &cfg.Log.Level, c.String)
	set(c, "root", &cfg.Root, c.String)
	set(c, "addr", &cfg.GRPC.Address, c.StringSlice)
	set(c, "debugaddr", &cfg.GRPC.DebugAddress, c.String)
	set(c, "proxy-network", &cfg.ProxyNetwork, c.Bool)
	set(c, "otel-socket-path", &cfg.OTEL.SocketPath, c.String)
	set(c, "cdi-spec-dir", &cfg.CDI.SpecDirs, c.StringSlice)
	if c.IsSet("cdi-disabled") {
		cfg.CDI.Disabled = new(c.Bool("cdi-disabled"))
	}

	// An empty value leaves the file's alone. Stock starts from the values of the file at the default path here even
	// where --config names another; that can't be meant.
	setNonEmpty(c, "tlscert", &cfg.GRPC.TLS.Cert)
	setNonEmpty(c, "tlskey", &cfg.GRPC.TLS.Key)
	setNonEmpty(c, "tlscacert", &cfg.GRPC.TLS.CA)
	if cfg.GRPC.TLS.CA != "" && cfg.GRPC.TLS.Cert == "" && cfg.GRPC.TLS.Key == "" {
		s.warn("a CA certificate for clients without a certificate and key of our own has no effect: no TLS")
	}

	if cfg.GRPC.UID == nil {
		cfg.GRPC.UID = new(os.Getuid())
	}
	if cfg.GRPC.GID == nil {
		cfg.GRPC.GID = new(os.Getgid())
	}
	if group := c.String("group"); c.IsSet("group") && group != "" {
		gid, err := lookupGroup(group)
		if err != nil {
			return err
		}
		cfg.GRPC.GID = &gid
	}

	if ents := c.StringSlice("allow-insecure-entitlement"); c.IsSet("allow-insecure-entitlement") {
		for _, e := range ents {
			if !slices.Contains([]string{"security.insecure", "network.host", "device"}, e) {
				return fmt.Errorf("--allow-insecure-entitlement=%s: unknown entitlement; want network.host, security.insecure or device", e)
			}
		}
		cfg.Entitlements = ents
	}
	return nil
}

func (s *settings) applyOCIFlags(c *cli.Command) error {
	cfg := &s.buildkit.Workers.OCI
	cfg.Snapshotter = orAuto(cfg.Snapshotter)
	if c.IsSet("oci-worker") {
		enabled, err := boolOrAuto(c, "oci-worker")
		if err != nil {
			return err
		}
		cfg.Enabled = enabled
	}
	if cfg.Enabled != nil && !*cfg.Enabled {
		return errNoWorker
	}

	labels := map[string]string{}
	maps.Copy(labels, cfg.Labels)
	for _, l := range c.StringSlice("oci-worker-labels") {
		k, v, ok := strings.Cut(l, "=")
		if !ok {
			return fmt.Errorf("--oci-worker-labels=%s: want key=value", l)
		}
		labels[k] = v
	}
	cfg.Labels = labels

	if c.IsSet("rootless") || c.Bool("rootless") {
		cfg.Rootless = c.Bool("rootless")
	}
	if c.IsSet("oci-worker-rootless") {
		if !userns.RunningInUserNS() || os.Geteuid() > 0 {
			return errRootless
		}
		cfg.Rootless = c.Bool("oci-worker-rootless")
	}
	if ps := c.StringSlice("oci-worker-platform"); len(ps) > 0 {
		cfg.Platforms = ps
	}
	if c.IsSet("oci-worker-gc") {
		cfg.GC = new(c.Bool("oci-worker-gc"))
	}
	if c.IsSet("oci-worker-gc-keepstorage") {
		gc, err := parseKeepStorage(c.String("oci-worker-gc-keepstorage"))
		if err != nil {
			return err
		}
		cfg.GCReservedSpace, cfg.GCMinFreeSpace, cfg.GCMaxUsedSpace = gc.GCReservedSpace, gc.GCMinFreeSpace, gc.GCMaxUsedSpace
	}
	set(c, "oci-worker-snapshotter", &cfg.Snapshotter, c.String)
	set(c, "oci-worker-proxy-snapshotter-path", &cfg.ProxySnapshotterPath, c.String)
	set(c, "oci-worker-no-process-sandbox", &cfg.NoProcessSandbox, c.Bool)
	set(c, "oci-worker-net", &cfg.Mode, c.String)
	set(c, "oci-cni-config-path", &cfg.CNIConfigPath, c.String) // stock reads a flag here that does not exist
	set(c, "oci-cni-binary-dir", &cfg.CNIBinaryPath, c.String)
	set(c, "oci-cni-pool-size", &cfg.CNIPoolSize, c.Int)
	set(c, "oci-worker-binary", &cfg.Binary, c.String)
	set(c, "oci-worker-apparmor-profile", &cfg.ApparmorProfile, c.String)
	set(c, "oci-worker-selinux", &cfg.SELinux, c.Bool)
	set(c, "oci-max-parallelism", &cfg.MaxParallelism, c.Int)
	return nil
}

// applyContainerdFlags refuses a containerd worker; "auto" is content without one.
func (s *settings) applyContainerdFlags(c *cli.Command) error {
	enabled := s.buildkit.Workers.Containerd.Enabled
	if c.IsSet("containerd-worker") {
		var err error
		if enabled, err = boolOrAuto(c, "containerd-worker"); err != nil {
			return err
		}
	}
	if enabled != nil && *enabled {
		return errContainerdWorker
	}
	for _, f := range ignoredContainerdFlags() {
		if name := f.Names()[0]; name != "containerd-worker" && c.IsSet(name) {
			s.warn("--%s has no effect: there is no containerd worker here", name)
		}
	}
	return nil
}

func (s *settings) applyLazyFlags(c *cli.Command) error {
	if !c.IsSet("lazy-mount") {
		return nil
	}
	mount, err := config.ParseMount(c.String("lazy-mount"))
	if err != nil {
		return fmt.Errorf("--lazy-mount (or BUILDKITD_LAZY_MOUNT): %w; want auto, erofs, fuse or off", err)
	}
	s.lazy.Mount = mount
	return nil
}

// set assigns a flag's value where the flag, or its environment variable, was given.
func set[T any](c *cli.Command, name string, to *T, value func(string) T) {
	if c.IsSet(name) {
		*to = value(name)
	}
}

func setNonEmpty(c *cli.Command, name string, to *string) {
	if v := c.String(name); c.IsSet(name) && v != "" {
		*to = v
	}
}

// boolOrAuto parses a flag that takes true, false or auto; auto is nil.
func boolOrAuto(c *cli.Command, name string) (*bool, error) {
	s := c.String(name)
	if s == "" || strings.EqualFold(s, "auto") {
		return nil, nil
	}
	b, err := strconv.ParseBool(s)
	if err != nil {
		return nil, fmt.Errorf("--%s=%s: want true, false or auto", name, s)
	}
	return &b, nil
}

// lookupGroup returns the gid of a group given by name or by number.
func lookupGroup(group string) (int, error) {
	gid, err := strconv.Atoi(group)
	switch {
	case err == nil:
		return gid, nil
	case !errors.Is(err, strconv.ErrSyntax):
		return 0, fmt.Errorf("--group=%s: %w", group, err)
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fmt.Errorf("--group=%s: %w; create the group, or give its number", group, err)
	}
	return strconv.Atoi(g.Gid)
}
