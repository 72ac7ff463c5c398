package worker

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/executor/oci"
	"github.com/moby/buildkit/solver/llbsolver/cdidevices"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/disk"
	"github.com/moby/buildkit/util/network/cniprovider"
	"github.com/moby/buildkit/util/network/netproviders"
	"github.com/moby/buildkit/worker/base"
	"github.com/moby/buildkit/worker/runc"
	"github.com/moby/sys/user"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// baseOptions turns the configuration into BuildKit's worker options, as stock
// buildkitd does.
func baseOptions(opt Options, factory runc.SnapshotterFactory) (base.WorkerOpt, error) {
	cfg := opt.Config.Workers.OCI
	idmap, err := identityMapping(cfg.UserRemapUnsupported)
	if err != nil {
		return base.WorkerOpt{}, err
	}
	mode := cfg.Mode
	if cfg.Rootless && mode == "auto" {
		mode = "host"
	}
	processes := oci.ProcessSandbox
	if cfg.NoProcessSandbox {
		if !cfg.Rootless {
			return base.WorkerOpt{}, errors.New("--oci-worker-no-process-sandbox needs --rootless: without it, build containers could kill any process of this host")
		}
		bklog.L.Warn("no process sandbox: build containers can kill, and perhaps trace, processes outside; use this only where the daemon is itself in an unprivileged container")
		processes = oci.NoProcessSandbox
	}
	devices, err := deviceManager(opt.Config.CDI)
	if err != nil {
		return base.WorkerOpt{}, err
	}
	var dns *oci.DNSConfig
	if d := opt.Config.DNS; d != nil {
		dns = &oci.DNSConfig{Nameservers: d.Nameservers, Options: d.Options, SearchDomains: d.SearchDomains}
	}
	network := netproviders.Opt{
		Mode: mode,
		CNI: cniprovider.Opt{
			Root:         opt.Config.Root,
			ConfigPath:   cfg.CNIConfigPath,
			BinaryDir:    cfg.CNIBinaryPath,
			PoolSize:     cfg.CNIPoolSize,
			BridgeName:   cfg.BridgeName,
			BridgeSubnet: cfg.BridgeSubnet,
		},
	}
	var parallelism *semaphore.Weighted
	if cfg.MaxParallelism > 0 {
		parallelism = semaphore.NewWeighted(int64(cfg.MaxParallelism))
	}
	wopt, err := runc.NewWorkerOpt(opt.Config.Root, factory, cfg.Rootless, processes, cfg.Labels, idmap, network, dns,
		cfg.Binary, cfg.ApparmorProfile, cfg.SELinux, parallelism, opt.TraceSocket, cfg.DefaultCgroupParent, devices)
	if err != nil {
		return wopt, err
	}
	wopt.Applier = newApplier(wopt.ContentStore)
	wopt.GCPolicy = gcPolicy(cfg.GCConfig, opt.Config.Root)
	wopt.BuildkitVersion = opt.Version
	if len(cfg.Platforms) > 0 {
		if wopt.Platforms, err = parsePlatforms(cfg.Platforms); err != nil {
			return wopt, err
		}
	}
	return wopt, nil
}

func parsePlatforms(names []string) ([]ocispecs.Platform, error) {
	ps := make([]ocispecs.Platform, len(names))
	for i, name := range names {
		p, err := platforms.Parse(name)
		if err != nil {
			return nil, fmt.Errorf("invalid platform %q: %w", name, err)
		}
		ps[i] = platforms.Normalize(p)
	}
	return ps, nil
}

// identityMapping reads the subordinate ids of a user; nil for none. As in stock
// buildkitd this remapping is unsupported and kept for those who use it anyway.
func identityMapping(name string) (*user.IdentityMapping, error) {
	if name == "" {
		return nil, nil
	}
	m, err := user.LoadIdentityMapping(name)
	if err != nil {
		return nil, fmt.Errorf("user remap %q: %w", name, err)
	}
	return &m, nil
}

func gcPolicy(cfg bkconfig.GCConfig, root string) []client.PruneInfo {
	if cfg.GC != nil && !*cfg.GC {
		return nil
	}
	// Without the file system's size, percentages count as 0, as upstream.
	stat, _ := disk.GetDiskStat(root)
	if len(cfg.GCPolicy) == 0 {
		cfg.GCPolicy = bkconfig.DefaultGCPolicy(cfg, stat)
	}
	out := make([]client.PruneInfo, len(cfg.GCPolicy))
	for i, rule := range cfg.GCPolicy {
		reserved := rule.ReservedSpace
		if reserved == (bkconfig.DiskSpace{}) {
			reserved = rule.KeepBytes //nolint:staticcheck // the old name of the key still counts
		}
		out[i] = client.PruneInfo{
			Filter:        rule.Filters,
			All:           rule.All,
			KeepDuration:  rule.KeepDuration.Duration,
			ReservedSpace: reserved.AsBytes(stat),
			MaxUsedSpace:  rule.MaxUsedSpace.AsBytes(stat),
			MinFreeSpace:  rule.MinFreeSpace.AsBytes(stat),
		}
	}
	return out
}

func deviceManager(cfg bkconfig.CDIConfig) (*cdidevices.Manager, error) {
	if cfg.Disabled != nil && *cfg.Disabled {
		return nil, nil
	}
	if len(cfg.SpecDirs) == 0 {
		return nil, errors.New("CDI is enabled, but no directory of specifications is configured: set --cdi-spec-dir or --cdi-disabled")
	}
	cache, err := cdi.NewCache(cdi.WithSpecDirs(cfg.SpecDirs...))
	if err != nil {
		return nil, fmt.Errorf("CDI: %w", err)
	}
	if err := cache.Refresh(); err != nil {
		return nil, fmt.Errorf("CDI: %w", err)
	}
	for dir, errs := range cache.GetErrors() {
		for _, err := range errs {
			if errors.Is(err, fs.ErrNotExist) {
				continue // most hosts have no devices to offer
			}
			bklog.L.WithField("dir", dir).WithError(err).Warn("CDI specification can't be used")
		}
	}
	return cdidevices.NewManager(cache, cfg.AutoAllowed), nil
}
