// Package repository reads and writes images where they are kept: in a repository of a registry, or in an OCI layout on the disk.
//
// What is written needs no digest beforehand: an [Upload] takes bytes as they are made, and gets its digest when all of them are
// there. Nothing of it lands on disk on the way to a registry, nor in memory, unless the registry doesn't take it as it comes: the first upload that it
// refuses for that is to be made again, and it and the next ones are sent in chunks of 16 MiB, or out of a file. An upload that isn't committed leaves
// nothing behind, and a name is given last, so that a reader of it finds a whole image or the one that was there before.
//
// What is read isn't verified, but for what [ReadAll] returns.
//
// A read from a registry is retried and resumed, at mirrors too, as package blob does it; requests without a body that a registry
// answers with 5xx or 429 are made again. An upload is not: who makes the bytes has to make them again, and [Transient] says
// whether that may help. A host that neither takes nor sends a byte for five minutes has failed. All of it is safe for concurrent use, but for a single Upload.
package repository

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Repository is where an image is or comes to be.
type Repository interface {
	// String is the reference as the user would write it, in full.
	String() string
	// Tag is what the reference names, "" if it does so by digest alone.
	Tag() string
	// Resolve returns the descriptor of what the reference names. Without it, the error wraps errdefs.ErrNotFound.
	Resolve(ctx context.Context) (ocispecs.Descriptor, error)
	// Open returns a blob or manifest. The caller closes it. ctx bounds the reader as well.
	Open(ctx context.Context, desc ocispecs.Descriptor) (io.ReadCloser, error)
	// ReaderAt reads ranges of a blob. The caller closes it.
	ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (ReaderAt, error)

	// CheckPush finds out whether anything can be written, and leaves nothing behind.
	CheckPush(ctx context.Context) error
	// Has reports whether a blob is there.
	Has(ctx context.Context, desc ocispecs.Descriptor) (bool, error)
	// Mount makes a blob of another repository one of this, if both are in one registry and that is possible; what is not possible is no
	// error.
	Mount(ctx context.Context, desc ocispecs.Descriptor, from Repository) (bool, error)
	// Create begins a blob.
	Create(ctx context.Context) (Upload, error)
	// PutManifest writes a manifest; tag, if not empty, names it from then on.
	PutManifest(ctx context.Context, desc ocispecs.Descriptor, manifest []byte, tag string) error
}

// A ReaderAt reads ranges of a blob.
type ReaderAt interface {
	io.ReaderAt
	io.Closer
}

// An Upload is a blob that is being written. Either Commit or Cancel ends it; Cancel after either does nothing.
type Upload interface {
	io.Writer
	// Commit makes it a blob. An error means that it is none.
	Commit(ctx context.Context, dgst digest.Digest, size int64) error
	// Cancel gives up what was written.
	Cancel()
}

// LayoutPrefix begins the reference of an image in an OCI layout.
const LayoutPrefix = "oci-layout://"

// Parse returns the repository that a user means: oci-layout://DIR[:TAG|@DIGEST], or a reference as docker takes it.
func Parse(ref string, hosts Hosts) (Repository, error) {
	if rest, ok := strings.CutPrefix(ref, LayoutPrefix); ok {
		return newLayout(rest)
	}
	if scheme, _, ok := strings.Cut(ref, "://"); ok {
		return nil, fmt.Errorf("reference %q: unknown scheme %s; want NAME[:TAG|@DIGEST] in a registry, or %sDIR[:TAG|@DIGEST]", ref, scheme, LayoutPrefix)
	}
	return newRegistry(ref, patient(hosts, silentFor))
}

// ReadAll returns a blob or manifest of at most limit bytes, which has the digest and size that the descriptor says.
func ReadAll(ctx context.Context, r Repository, desc ocispecs.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, fmt.Errorf("%s of %s has %d bytes, more than the %d that are allowed for its type %q", desc.Digest, r, desc.Size, limit, desc.MediaType)
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("a descriptor of %s: digest %q: %w", r, desc.Digest, err)
	}
	body, err := r.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	p, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s of %s: %w", desc.Digest, r, err)
	}
	if got := desc.Digest.Algorithm().FromBytes(p); got != desc.Digest || int64(len(p)) != desc.Size {
		return nil, fmt.Errorf("%s of %s is corrupt: got %d bytes with the digest %s, want %d bytes", desc.Digest, r, len(p), got, desc.Size)
	}
	return p, nil
}
