package main

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/platforms"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/util/appdefaults"
	"github.com/moby/buildkit/util/archutil"
	"github.com/moby/sys/userns"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
)

// rootlessPaths reports whether the defaults are a user's own paths: inside a user namespace, unless $USER says that
// it is root's - then it is a container which looks like a machine.
func rootlessPaths() bool {
	u := os.Getenv("USER")
	return userns.RunningInUserNS() && u != "" && u != "root"
}

func defaultConfigPath() string {
	if rootlessPaths() {
		return filepath.Join(appdefaults.UserConfigDir(), "buildkitd.toml")
	}
	return filepath.Join(appdefaults.ConfigDir, "buildkitd.toml")
}

// builtinDefaults are what --help shows: the file at the default path with the defaults filled in. A broken file is
// reported when the daemon starts with it, not by --help or --version.
func builtinDefaults() bkconfig.Config {
	file, err := config.Load(defaultConfigPath())
	if err != nil {
		file = config.Config{}
	}
	setDefaults(&file.BuildKit)
	return file.BuildKit
}

// setDefaults fills in what the file leaves out, as stock does.
func setDefaults(cfg *bkconfig.Config) {
	rootless := rootlessPaths()
	if cfg.Root == "" {
		cfg.Root = appdefaults.Root
		if rootless {
			cfg.Root = appdefaults.UserRoot()
		}
	}
	if len(cfg.GRPC.Address) == 0 {
		cfg.GRPC.Address = []string{appdefaults.Address}
		if rootless {
			cfg.GRPC.Address = []string{appdefaults.UserAddress()}
		}
	}
	if cfg.Workers.OCI.Platforms == nil {
		cfg.Workers.OCI.Platforms = formatPlatforms(archutil.SupportedPlatforms(false))
	}
	setNetworkDefaults(&cfg.Workers.OCI.NetworkConfig, rootless)
	if cfg.OTEL.SocketPath == "" {
		cfg.OTEL.SocketPath = traceSocketPath("")
	}
	if len(cfg.CDI.SpecDirs) == 0 {
		cfg.CDI.SpecDirs = appdefaults.CDISpecDirs
	}
}

// traceSocketPath is where the daemon with the state directory root takes the traces of build steps; "" stands for
// the default root, which has stock's socket. With another root there may be a second daemon on this host: it would
// take the socket away, and the one that ends first removes it from under the other's steps, which then fail.
func traceSocketPath(root string) string {
	rootless := rootlessPaths()
	path := appdefaults.TraceSocketPath(rootless)
	usual := appdefaults.Root
	if rootless {
		usual = appdefaults.UserRoot()
	}
	abs, err := filepath.Abs(root)
	if root == "" || err != nil || abs == filepath.Clean(usual) {
		return path
	}
	sum := sha256.Sum256([]byte(abs))
	return strings.TrimSuffix(path, ".sock") + "-" + hex.EncodeToString(sum[:4]) + ".sock"
}

func setNetworkDefaults(nc *bkconfig.NetworkConfig, rootless bool) {
	fill := func(to *string, value string) {
		if *to == "" {
			*to = value
		}
	}
	cni := appdefaults.DefaultCNIConfigPath
	if rootless {
		cni = appdefaults.UserCNIConfigPath
	}
	fill(&nc.Mode, "auto")
	fill(&nc.CNIConfigPath, cni)
	fill(&nc.CNIBinaryPath, appdefaults.DefaultCNIBinDir)
	fill(&nc.BridgeName, appdefaults.BridgeName)
	fill(&nc.BridgeSubnet, appdefaults.BridgeSubnet)
}

func formatPlatforms(ps []ocispecs.Platform) []string {
	out := make([]string, 0, len(ps))
	for _, p := range ps {
		out = append(out, platforms.Format(platforms.Normalize(p)))
	}
	return out
}
