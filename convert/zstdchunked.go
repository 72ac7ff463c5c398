package convert

import (
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// NewZstdChunked returns the format zstd:chunked, in Podman's dialect.
func NewZstdChunked(opt zstdchunked.WriteOptions) Format {
	if opt.Pool == nil {
		opt.Pool = frames.NewPool(0)
	}
	if opt.ChunkSize == 0 {
		opt.ChunkSize = frames.DefaultChunkSize
	}
	opt.NoDiffID = false // it's compared with what the image says
	return zstdChunked{opt}
}

type zstdChunked struct{ opt zstdchunked.WriteOptions }

// zstdChunkedVersion is another one whenever the writer makes something else of the same tar and options.
const zstdChunkedVersion = 1

// Key implements Format.
func (z zstdChunked) Key() string {
	level := 0
	if z.opt.Level != nil {
		level = *z.opt.Level
	}
	return fmt.Sprintf("zstdchunked/%d level=%d chunk-size=%d", zstdChunkedVersion, level, z.opt.ChunkSize)
}

// MediaType implements Format.
func (zstdChunked) MediaType() string { return ocispecs.MediaTypeImageLayerZstd }

// Claim implements Format.
func (zstdChunked) Claim(desc ocispecs.Descriptor) string {
	toc, at, err := zstdchunked.Find(desc.Annotations)
	if err != nil || toc == "" || oci(desc.MediaType) != ocispecs.MediaTypeImageLayerZstd {
		return ""
	}
	return fmt.Sprintf("%s at %s", toc, at)
}

// Keeps implements Format.
func (zstdChunked) Keeps(desc ocispecs.Descriptor) string {
	if oci(desc.MediaType) == ocispecs.MediaTypeImageLayerGzip && (eStargz{}).Claim(desc) != "" {
		return "it is lazy already, as eStargz: its tar has a table of contents that would become a file"
	}
	return ""
}

// Check implements Format.
func (zstdChunked) Check(blob io.ReaderAt, desc ocispecs.Descriptor) (not string, err error) {
	toc, at, err := zstdchunked.Find(desc.Annotations)
	if err != nil {
		return "", err
	}
	_, err = zstdchunked.Open(blob, desc.Size, zstdchunked.Options{TOCDigest: toc, Position: at})
	return holds(err)
}

// Write implements Format.
func (z zstdChunked) Write(ctx context.Context, w io.Writer, tar io.Reader) (Written, error) {
	made, err := zstdchunked.Write(ctx, w, tar, z.opt)
	if err != nil {
		return Written{}, err
	}
	out := Written{Digest: made.Digest, DiffID: made.DiffID, Size: made.Size, Tar: made.DiffID, Lossy: made.Lossy}
	if made.Annotations != nil {
		_, err := zstdchunked.Parse(made.TOC, made.End, zstdchunked.Options{TOCDigest: digest.FromBytes(made.TOC)})
		if out.Unusable, err = holds(err); err != nil || out.Unusable != "" {
			return out, err
		}
	}
	out.Annotations = made.Annotations
	return out, nil
}
