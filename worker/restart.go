package worker

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/resolver"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// registryOf returns how to fetch blobs from the repository of an image that no build has resolved yet.
func registryOf(hosts docker.RegistryHosts, sm *session.Manager) func(ref string) func(session.Group) content.Provider {
	return func(ref string) func(session.Group) content.Provider {
		return func(g session.Group) content.Provider {
			return &repository{resolver.DefaultPool.GetResolver(hosts, ref, resolver.ScopeType{}, sm, g), ref}
		}
	}
}

type repository struct {
	remotes.Resolver
	ref string
}

// ReaderAt implements content.Provider.
func (r *repository) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	f, err := r.Fetcher(ctx, r.ref)
	if err != nil {
		return nil, err
	}
	return contentutil.FromFetcher(f).ReaderAt(ctx, desc)
}
