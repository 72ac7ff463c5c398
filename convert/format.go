package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
)

// A Format is what layers become. It is safe for concurrent use.
type Format interface {
	// Key names the format, its writer's version and all options that a layer depends on.
	Key() string
	// MediaType is the layers'.
	MediaType() string
	// Claim is what a layer's descriptor says of its table of contents, by which readers find and verify it; "" if it doesn't say that the layer is of
	// the format.
	Claim(desc ocispecs.Descriptor) string
	// Keeps returns why a layer that is of another format stays what it is, "" if it doesn't.
	Keeps(desc ocispecs.Descriptor) string
	// Check returns why a layer that claims to be of the format isn't, "" if it is. One that isn't may be converted; one that must not be used
	// is an error.
	Check(blob io.ReaderAt, desc ocispecs.Descriptor) (not string, err error)
	// Write makes a layer of a tar, and finds out whether readers take its table of contents, which is written last.
	Write(ctx context.Context, w io.Writer, tar io.Reader) (Written, error)
}

// Written is a layer that a Format has made.
type Written struct {
	Digest, DiffID digest.Digest
	Size           int64
	// Tar is the digest of the tar, of which the DiffID may be another one.
	Tar digest.Digest
	// Annotations are what readers want in the descriptor.
	Annotations map[string]string
	// Lossy is a name that the format can't hold, "" if there is none. Such a layer isn't lazy.
	Lossy string
	// Unusable is why readers don't take its table of contents, "" if they do: a tar may say what none of them can mount, such as that a file is a
	// hardlink to one that it hasn't got. Such a layer isn't lazy either, and has no annotations.
	Unusable string
	// First is how many files come first: see [InOrder].
	First int
}

// NewEStargz returns the format eStargz.
func NewEStargz(opt estargz.WriteOptions) Format {
	if opt.Pool == nil {
		opt.Pool = estargz.NewPool(0)
	}
	if opt.ChunkSize == 0 {
		opt.ChunkSize = estargz.DefaultChunkSize
	}
	if opt.MinChunkSize == 0 {
		opt.MinChunkSize = estargz.DefaultMinChunkSize
	}
	return eStargz{opt}
}

type eStargz struct{ opt estargz.WriteOptions }

// eStargzVersion is another one whenever the writer makes something else of the same tar and options.
const eStargzVersion = 1

// Key implements Format.
func (e eStargz) Key() string {
	level := -1
	if e.opt.Level != nil {
		level = *e.opt.Level
	}
	return fmt.Sprintf("estargz/%d level=%d chunk-size=%d min-chunk-size=%d", eStargzVersion, level, e.opt.ChunkSize, e.opt.MinChunkSize)
}

// MediaType implements Format.
func (eStargz) MediaType() string { return ocispecs.MediaTypeImageLayerGzip }

// Claim implements Format.
func (eStargz) Claim(desc ocispecs.Descriptor) string {
	toc, err := digest.Parse(desc.Annotations[stargz.TOCJSONDigestAnnotation])
	if err != nil {
		return ""
	}
	return toc.String()
}

// Keeps implements Format.
func (eStargz) Keeps(ocispecs.Descriptor) string { return "" }

// Check implements Format. A layer with its table of contents in another image is lazy under one name only, and so isn't good enough.
func (eStargz) Check(blob io.ReaderAt, desc ocispecs.Descriptor) (not string, err error) {
	toc := digest.Digest(desc.Annotations[stargz.TOCJSONDigestAnnotation])
	_, err = estargz.Open(blob, desc.Size, estargz.Options{TOCDigest: toc})
	return holds(err)
}

// holds reports what the error of an opening says of the layer.
func holds(err error) (not string, _ error) {
	if mismatch, ok := errors.AsType[*estargz.DigestError](err); ok {
		return "", fmt.Errorf("its table of contents isn't the one that the manifest promises, so somebody changed one of the two: %w", mismatch)
	}
	if errors.Is(err, fs.ErrInvalid) || errors.Is(err, estargz.ErrExternalTOC) {
		return err.Error(), nil
	}
	return "", err
}

// Write implements Format.
func (e eStargz) Write(ctx context.Context, w io.Writer, tar io.Reader) (Written, error) {
	made, err := estargz.Write(ctx, w, tar, e.opt)
	if err != nil {
		return Written{}, err
	}
	out := Written{Digest: made.Digest, DiffID: made.DiffID, Size: made.Size, Tar: made.Tar, Lossy: made.Lossy}
	if made.Lossy == "" {
		_, err := estargz.Parse(made.TOC, made.End, estargz.Options{TOCDigest: made.TOCDigest})
		if out.Unusable, err = holds(err); err != nil || out.Unusable != "" {
			return out, err
		}
	}
	out.Annotations = map[string]string{stargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(made.TarSize, 10)}
	if made.Lossy == "" {
		out.Annotations[stargz.TOCJSONDigestAnnotation] = made.TOCDigest.String()
	}
	return out, nil
}
