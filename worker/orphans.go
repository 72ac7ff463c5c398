package worker

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/moby/buildkit/cache/metadata"
)

// labelFlat is what BuildKit's cache manager gives the lease of a record.
const labelFlat = "containerd.io/gc.flat"

// variants is behind the record's ID in the ID of its other lease, which has its blobs in other compressions.
const variants = "-variants"

// dropOrphans deletes the leases of cache records that there are not, and returns how many. A daemon that is killed between making a lease and
// its record, in two databases, leaves one: it would keep layers on the disk that are in no list and that no prune frees. To be called before
// anything is made.
func dropOrphans(ctx context.Context, records *metadata.Store, manager leases.Manager) (dropped int, err error) {
	items, err := records.All()
	if err != nil {
		return 0, fmt.Errorf("list cache records: %w", err)
	}
	known := make(map[string]bool, len(items))
	for _, item := range items {
		known[item.ID()] = true
	}
	list, err := manager.List(ctx)
	if err != nil {
		return 0, fmt.Errorf("list leases: %w", err)
	}
	for _, lease := range list {
		id, ofVariants := strings.CutSuffix(lease.ID, variants)
		if _, ofRecord := lease.Labels[labelFlat]; known[id] || !ofRecord && !ofVariants {
			continue
		}
		if err := manager.Delete(ctx, lease); err != nil {
			return dropped, fmt.Errorf("delete lease %s: %w", lease.ID, err)
		}
		dropped++
	}
	return dropped, nil
}
