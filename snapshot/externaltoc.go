package snapshot

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/util/containerdutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
)

// Where stargz-snapshotter keeps tables of contents that aren't in the layers: in an image with the same tag and this
// suffix, each as a layer with an annotation that says whose it is.
// https://github.com/containerd/stargz-snapshotter/blob/main/docs/smaller-estargz.md
const (
	tocImageSuffix   = "-esgztoc"
	annotationTOCFor = "containerd.io/snapshot/stargz/layer.digest"
)

// maxTOCImage bounds the manifest of such an image, in bytes: registries take no larger ones.
const maxTOCImage = 4 << 20

// tocImage returns the reference of the image that has the tables of contents of ref's layers.
func tocImage(ref reference.Spec) (reference.Spec, error) {
	tag, _, _ := strings.Cut(ref.Object, "@")
	if tag == "" {
		return ref, fmt.Errorf("%w, which is found by a tag only: %s has none", estargz.ErrExternalTOC, ref)
	}
	ref.Object = tag + tocImageSuffix
	return ref, nil
}

// externalTOC fetches the layer's table of contents from where it is kept, as a gzip'ed tar. That it is the right one is for
// the caller to see, by its digest.
func (s *served) externalTOC(ctx context.Context) ([]byte, error) {
	s.blobMu.Lock()
	src := s.src
	s.blobMu.Unlock()
	return externalTOC(ctx, src.ref, s.key.Blob, func() ([]docker.RegistryHost, error) {
		return s.engine.opt.Hosts(src.ref, src.sessions)
	})
}

func externalTOC(ctx context.Context, image reference.Spec, of digest.Digest, hosts blob.Hosts) ([]byte, error) {
	ref, err := tocImage(image)
	if err != nil {
		return nil, err
	}
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) { return hosts() }})
	toc, err := fetchTOC(ctx, resolver, ref, of.String())
	if err != nil {
		return nil, fmt.Errorf("%w, %s: %w", estargz.ErrExternalTOC, ref, err)
	}
	return toc, nil
}

func fetchTOC(ctx context.Context, resolver remotes.Resolver, ref reference.Spec, of string) ([]byte, error) {
	_, desc, err := resolver.Resolve(ctx, ref.String())
	if err != nil {
		return nil, err
	}
	if images.IsManifestType(desc.MediaType) && desc.Size > maxTOCImage {
		return nil, fmt.Errorf("its manifest has %d bytes", desc.Size)
	}
	fetcher, err := resolver.Fetcher(ctx, ref.String())
	if err != nil {
		return nil, err
	}
	manifest, err := containerdutil.FetchManifestPlatform(ctx, fetcher, desc, platforms.DefaultSpec())
	if err != nil {
		return nil, err
	}
	for _, l := range manifest.Layers {
		if l.Annotations[annotationTOCFor] == of {
			return fetchAll(ctx, fetcher, l)
		}
	}
	return nil, fmt.Errorf("it has none for %s", of)
}

// fetchAll reads a blob that is small.
func fetchAll(ctx context.Context, fetcher remotes.Fetcher, desc ocispecs.Descriptor) ([]byte, error) {
	if desc.Size > estargz.MaxCompressedTOC {
		return nil, fmt.Errorf("%s has %d bytes, more than a table of contents may have", desc.Digest, desc.Size)
	}
	body, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(io.LimitReader(body, desc.Size))
}
