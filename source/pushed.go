package source

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/moby/buildkit/cache"
	"github.com/opencontainers/go-digest"
)

// Pushed notes that a registry has the layers of the ref in that repository, e.g. "registry.example/team/app", so that it can be told to
// take them from there when they are pushed to another one. For layers in the content store BuildKit notes it on the blob. A lazy layer
// has none, so it's kept with the layer's origin, and goes with that.
func (s *Snapshotter) Pushed(ctx context.Context, ref cache.ImmutableRef, repository string) (err error) {
	chain := ref.LayerChain()
	defer func() { err = errors.Join(err, chain.Release(context.WithoutCancel(ctx))) }()
	for _, record := range chain {
		dt, err := record.GetExternal(originKey)
		if err != nil {
			continue // no layer of an image in a registry
		}
		var from origin
		if err := json.Unmarshal(dt, &from); err != nil {
			return fmt.Errorf("origin of a lazy layer: %w", err)
		}
		if slices.Contains(from.Pushed, repository) {
			continue
		}
		from.Pushed = append(from.Pushed, repository)
		if len(from.Pushed) > keepPushed {
			from.Pushed = slices.Delete(from.Pushed, 0, 1)
		}
		if dt, err = json.Marshal(from); err != nil {
			return err
		}
		if err := record.SetExternal(originKey, dt); err != nil {
			return fmt.Errorf("keep where layer %s has been pushed to: %w", from.Desc.Digest, err)
		}
		s.origins.add(from)
	}
	return nil
}

// keepPushed is how many repositories are remembered of a layer. One of each registry will do.
const keepPushed = 32

// Repositories returns the repositories that a lazy layer has been pushed to.
func (s *Snapshotter) Repositories(dgst digest.Digest) []string {
	from, _ := s.origins.get(dgst)
	return from.Pushed
}
