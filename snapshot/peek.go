package snapshot

import (
	"context"
	"errors"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
)

// Contents are what a layer's table of contents says.
type Contents struct {
	Format string // FormatEStargz or FormatZstdChunked
	Layer  *layer.Layer
	// Size is that of the table in bytes, compressed.
	Size int64
	// Prefetch is how many bytes at the beginning of the blob its maker wants to be fetched ahead: 0 for none, estargz.NoLandmark if
	// nothing is said.
	Prefetch int64
}

// Peek opens a layer as a mount does, and keeps nothing of it. toc is the digest of its table of contents, and in is its format as LabelFormats
// has it. The errors are the same: a [MismatchError], or a [MountError] if the layer can be pulled all the same.
//
// ref and hosts say where a table of contents may be that isn't in the layer; without hosts, such a one isn't to be had.
func Peek(ctx context.Context, from io.ReaderAt, desc ocispecs.Descriptor, toc digest.Digest, in string, ref reference.Spec, hosts blob.Hosts) (Contents, error) {
	f, err := parseFormat(in)
	if err != nil {
		return Contents{}, &MountError{Layer: desc.Digest, Err: err}
	}
	t, err := f.open(from, desc.Size, toc, nil, func() ([]byte, error) {
		if hosts == nil {
			return nil, estargz.ErrExternalTOC
		}
		return externalTOC(ctx, ref, desc.Digest, hosts, blob.Options{})
	})
	switch {
	case err == nil:
		return Contents{Format: t.format, Layer: t.layer, Size: int64(len(t.packed)), Prefetch: t.prefetch}, nil
	case ctx.Err() != nil:
		return Contents{}, context.Cause(ctx)
	}
	if err = explainOpening(desc.Digest, err); isMismatch(err) {
		return Contents{}, err
	}
	return Contents{}, &MountError{Layer: desc.Digest, Err: err}
}

// PeekBelow returns the [MountError] of a layer that can't be mounted above others, for what it would hide of them. below are the layers
// under it, topmost first.
func PeekBelow(dgst digest.Digest, l *layer.Layer, below []*layer.Layer) error {
	for _, dir := range impliedOf(l) {
		for _, lower := range below {
			i, err := lower.Lookup(strings.TrimPrefix(dir, "/"))
			if err != nil {
				continue // not there
			}
			in := lower.Inode(i)
			xattrs := make([]string, len(in.Xattrs))
			for i, x := range in.Xattrs {
				xattrs[i] = x.Name
			}
			if err := checkHidden(dir, in.Mode, in.UID, in.GID, xattrs); err != nil {
				return &MountError{Layer: dgst, Err: err}
			}
			break
		}
	}
	return nil
}

func isMismatch(err error) bool {
	_, ok := errors.AsType[*MismatchError](err)
	return ok
}
