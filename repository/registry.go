package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/reference"
	dockerref "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
)

// Hosts returns the hosts that serve a registry, with their credentials, in the order to ask them.
type Hosts func(registry string) ([]docker.RegistryHost, error)

// MaxManifest is how many bytes a manifest or an index may have: registries take no larger ones.
const MaxManifest = 4 << 20

// registry is a repository of a registry, and a name in it.
type registry struct {
	ref   reference.Spec
	hosts Hosts
	path  string       // of the repository, without the registry
	way   atomic.Int32 // a way, in which it takes blobs
}

var _ Repository = (*registry)(nil)

func newRegistry(s string, hosts Hosts) (*registry, error) {
	named, err := dockerref.ParseDockerRef(s)
	if err != nil {
		return nil, fmt.Errorf("reference %q: %w; want NAME[:TAG|@DIGEST] in a registry, or %sDIR[:TAG|@DIGEST]", s, err, LayoutPrefix)
	}
	ref, err := reference.Parse(named.String())
	if err != nil {
		return nil, fmt.Errorf("reference %q: %w", s, err)
	}
	return &registry{ref: ref, hosts: hosts, path: strings.TrimPrefix(ref.Locator, ref.Hostname()+"/")}, nil
}

// String implements Repository.
func (r *registry) String() string { return r.ref.String() }

// Tag implements Repository.
func (r *registry) Tag() string {
	tag, _, _ := strings.Cut(r.ref.Object, "@")
	return tag
}

// Spec returns the reference of a repository that is in a registry.
func Spec(r Repository) (ref reference.Spec, hosts Hosts, ok bool) {
	reg, ok := r.(*registry)
	if !ok {
		return ref, nil, false
	}
	return reg.ref, reg.hosts, true
}

func (r *registry) registryHosts() ([]docker.RegistryHost, error) { return r.hosts(r.ref.Hostname()) }

func (r *registry) resolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: docker.RegistryHosts(r.hosts)})
}

// refused reports whether it's the credentials that an error is about.
func refused(err error) bool {
	if s, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		return s.StatusCode == http.StatusUnauthorized || s.StatusCode == http.StatusForbidden
	}
	return errors.Is(err, docker.ErrInvalidAuthorization)
}

// Resolve implements Repository.
func (r *registry) Resolve(ctx context.Context) (ocispecs.Descriptor, error) {
	_, desc, err := r.resolver().Resolve(ctx, r.ref.String())
	if err != nil {
		err = withoutQuery(err)
		switch {
		case strings.HasPrefix(err.Error(), r.String()+": "):
			return desc, err // it says where
		case refused(err):
			err = fmt.Errorf("%w; `docker login %s` with an account that may read it, or mind the name", err, r.ref.Hostname())
		}
		return desc, fmt.Errorf("resolve %s: %w", r, err)
	}
	return desc, nil
}

// Open implements Repository.
func (r *registry) Open(ctx context.Context, desc ocispecs.Descriptor) (io.ReadCloser, error) {
	if images.IsManifestType(desc.MediaType) || images.IsIndexType(desc.MediaType) {
		fetcher, err := r.resolver().Fetcher(ctx, r.ref.String())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r, err)
		}
		body, err := fetcher.Fetch(ctx, desc)
		if err != nil {
			return nil, fmt.Errorf("manifest %s of %s: %w", desc.Digest, r, withoutQuery(err))
		}
		return body, nil
	}
	b := blob.New(r.ref, desc.Digest, desc.Size, r.registryHosts, blob.Options{})
	b.AcceptWhole()
	size, err := b.Size(ctx)
	if err != nil {
		return nil, err
	}
	return b.Fetch(ctx, 0, size)
}

// ReaderAt implements Repository.
func (r *registry) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (ReaderAt, error) {
	return &rangeReader{ctx, blob.New(r.ref, desc.Digest, desc.Size, r.registryHosts, blob.Options{})}, nil
}

// rangeReader reads a blob by ranges.
type rangeReader struct {
	ctx  context.Context //nolint:containedctx // an io.ReaderAt has no other way to get one
	blob *blob.Reader
}

// ReadAt implements io.ReaderAt.
func (r *rangeReader) ReadAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	body, err := r.blob.Fetch(r.ctx, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer body.Close()
	return io.ReadFull(body, p)
}

// Close implements io.Closer.
func (r *rangeReader) Close() error { return nil }

// Has implements Repository.
func (r *registry) Has(ctx context.Context, desc ocispecs.Descriptor) (bool, error) {
	resp, err := r.again(ctx, http.MethodHead, "blobs/"+desc.Digest.String(), nil, "", nil)
	if err != nil {
		return false, err
	}
	drain(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		return desc.Size == 0 || resp.ContentLength < 0 || resp.ContentLength == desc.Size, nil
	case http.StatusNotFound:
		return false, nil
	}
	return false, r.failed(resp, nil, "look for blob "+desc.Digest.String())
}

// Mount implements Repository.
func (r *registry) Mount(ctx context.Context, desc ocispecs.Descriptor, from Repository) (bool, error) {
	src, ok := from.(*registry)
	if !ok || src.ref.Hostname() != r.ref.Hostname() || src.path == r.path {
		return false, nil
	}
	host, err := r.pushHost()
	if err != nil {
		return false, err
	}
	ctx = docker.ContextWithAppendPullRepositoryScope(ctx, src.path)
	resp, err := r.again(ctx, http.MethodPost, "blobs/uploads/", map[string]string{"mount": desc.Digest.String(), "from": src.path}, "", nil)
	if err != nil {
		if context.Cause(ctx) != nil {
			return false, err
		}
		return false, nil // a token server that gives none for both, for example; whatever else is wrong shows with the upload
	}
	drain(resp)
	if resp.StatusCode == http.StatusAccepted { // an upload instead
		if u, err := r.begun(ctx, host, resp); err == nil {
			u.cancel()
		}
	}
	return resp.StatusCode == http.StatusCreated, nil
}

// PutManifest implements Repository.
func (r *registry) PutManifest(ctx context.Context, desc ocispecs.Descriptor, manifest []byte, tag string) error {
	name := tag
	if name == "" {
		name = desc.Digest.String()
	}
	resp, err := r.again(ctx, http.MethodPut, "manifests/"+name, nil, desc.MediaType, bytes.NewReader(manifest))
	if err != nil {
		return err
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK {
		return r.failed(resp, explain(resp), "push manifest "+desc.Digest.String())
	}
	if got := resp.Header.Get(digestHeader); got != "" && got != desc.Digest.String() {
		return fmt.Errorf("%s: the registry keeps the manifest %s as %s", r, desc.Digest, got)
	}
	return nil
}

// mediaTypeOf guesses a manifest's media type.
func mediaTypeOf(manifest []byte) string {
	var m struct {
		MediaType string            `json:"mediaType"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	_ = json.Unmarshal(manifest, &m) // one that can't be read shows when it's used
	switch {
	case m.MediaType != "":
		return m.MediaType
	case m.Manifests != nil:
		return ocispecs.MediaTypeImageIndex
	}
	return ocispecs.MediaTypeImageManifest
}

// Put writes a blob that is in memory.
func Put(ctx context.Context, r Repository, desc ocispecs.Descriptor, p []byte) error {
	if got := digest.FromBytes(p); got != desc.Digest {
		return fmt.Errorf("blob %s: digest mismatch: got %s", desc.Digest, got)
	}
	if reg, ok := r.(*registry); ok {
		u, err := reg.begin(ctx)
		if err != nil {
			return err
		}
		defer u.cancel()
		return u.complete(ctx, desc.Digest, int64(len(p)), bytes.NewReader(p))
	}
	u, err := r.Create(ctx)
	if err != nil {
		return err
	}
	defer u.Cancel()
	if _, err := u.Write(p); err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	return u.Commit(ctx, desc.Digest, int64(len(p)))
}

// Name returns the repository's name without what the reference names in it: "registry.example/team/image", or "" of a layout.
func Name(r Repository) string {
	if reg, ok := r.(*registry); ok {
		return reg.ref.Locator
	}
	return ""
}

// Sibling returns the repository of that name, if it is another one in the same registry as r.
func Sibling(r Repository, name string) (Repository, bool) {
	reg, ok := r.(*registry)
	if !ok || name == reg.ref.Locator || !strings.HasPrefix(name, reg.ref.Hostname()+"/") {
		return nil, false
	}
	sibling, err := newRegistry(name, reg.hosts)
	return sibling, err == nil
}
