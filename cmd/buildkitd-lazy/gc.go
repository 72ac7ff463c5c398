package main

import (
	"fmt"
	"strconv"
	"strings"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/util/disk"
)

const megabyte = 1_000_000

// formatKeepStorage is the value of --oci-worker-gc-keepstorage that means cfg: "reserved[,free[,maximum]]", in MB.
func formatKeepStorage(cfg bkconfig.GCConfig, stat disk.DiskStat) string {
	if cfg.IsUnset() {
		cfg.GCReservedSpace = cfg.GCKeepStorage //nolint:staticcheck // the key's old name is still in people's files
	}
	if cfg.IsUnset() {
		cfg = bkconfig.DetectDefaultGCCap(stat)
	}
	mb := func(d bkconfig.DiskSpace, stat disk.DiskStat) string {
		return strconv.FormatInt(d.AsBytes(stat)/megabyte, 10)
	}
	out := mb(cfg.GCReservedSpace, disk.DiskStat{}) // stock: a reserved percentage is shown as the fixed cap
	free, maximum := mb(cfg.GCMinFreeSpace, stat), mb(cfg.GCMaxUsedSpace, stat)
	switch {
	case maximum != "0":
		return out + "," + free + "," + maximum
	case free != "0":
		return out + "," + free
	}
	return out
}

// parseKeepStorage is the inverse. The empty string sets nothing.
func parseKeepStorage(s string) (bkconfig.GCConfig, error) {
	var cfg bkconfig.GCConfig
	if s == "" {
		return cfg, nil
	}
	spaces := []*bkconfig.DiskSpace{&cfg.GCReservedSpace, &cfg.GCMinFreeSpace, &cfg.GCMaxUsedSpace}
	for i, part := range strings.SplitN(s, ",", len(spaces)) {
		n, err := strconv.ParseInt(part, 10, 64)
		if err != nil {
			return bkconfig.GCConfig{}, fmt.Errorf("--oci-worker-gc-keepstorage=%s: want reserved[,free[,maximum]] in MB: %w", s, err)
		}
		spaces[i].Bytes = n * megabyte
	}
	return cfg, nil
}
