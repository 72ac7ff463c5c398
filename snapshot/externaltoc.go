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
	src := s.repos.first().src
	hosts := func() ([]docker.RegistryHost, error) { return s.engine.opt.Hosts(src.ref, src.sessions) }
	return externalTOC(ctx, src.ref, s.key.Blob, hosts, blob.Options{RetryFor: s.engine.opt.Blob.RetryFor})
}

func externalTOC(ctx context.Context, image reference.Spec, of digest.Digest, hosts blob.Hosts, opt blob.Options) ([]byte, error) {
	ref, err := tocImage(image)
	if err != nil {
		return nil, err
	}
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) { return hosts() }})
	var toc []byte
	desc, err := findTOC(ctx, resolver, ref, of.String())
	if err == nil {
		toc, err = fetchTOC(ctx, blob.New(ref, desc.Digest, desc.Size, hosts, opt), desc)
	}
	if err != nil {
		return nil, fmt.Errorf("%w, %s: %w", estargz.ErrExternalTOC, ref, err)
	}
	return toc, nil
}

// findTOC returns the layer of an image that is the table of contents of another layer.
func findTOC(ctx context.Context, resolver remotes.Resolver, ref reference.Spec, of string) (found ocispecs.Descriptor, err error) {
	_, desc, err := resolver.Resolve(ctx, ref.String())
	if err != nil {
		return found, err
	}
	if images.IsManifestType(desc.MediaType) && desc.Size > maxTOCImage {
		return found, fmt.Errorf("its manifest has %d bytes", desc.Size)
	}
	fetcher, err := resolver.Fetcher(ctx, ref.String())
	if err != nil {
		return found, err
	}
	manifest, err := containerdutil.FetchManifestPlatform(ctx, fetcher, desc, platforms.DefaultSpec())
	if err != nil {
		return found, err
	}
	for _, l := range manifest.Layers {
		if l.Annotations[annotationTOCFor] == of {
			return l, nil
		}
	}
	return found, fmt.Errorf("it has none for %s", of)
}

// fetchTOC reads a table of contents as layers are read, but for that all of it is wanted.
func fetchTOC(ctx context.Context, from *blob.Reader, desc ocispecs.Descriptor) ([]byte, error) {
	if desc.Size < 1 || desc.Size > estargz.MaxCompressedTOC {
		return nil, fmt.Errorf("%s has %d bytes, which no table of contents has", desc.Digest, desc.Size)
	}
	from.AcceptWhole()
	body, err := from.Fetch(ctx, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}
