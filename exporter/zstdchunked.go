package exporter

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/docker/go-units"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	_ "github.com/buildkitd-lazy/buildkitd-lazy/exporter/retain" // or what finalize returns would be dropped
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

const (
	nameZstdChunked   = "zstdchunked"
	zstdChunkedPrefix = "zstdchunked-"
	keyZstdChunkSize  = zstdChunkedPrefix + "chunk-size"

	// lossyLabel marks a blob that can't be zstd:chunked, whoever tries, and names the file because of which, if it is one.
	lossyLabel = "buildkitd-lazy/zstdchunked.lossy"
	noFile     = "true"
	// zstdOptionsLabel is what optionsLabel is of eStargz.
	zstdOptionsLabel = "buildkitd-lazy/zstdchunked.options."
)

// zstdChunked is BuildKit's zstd but for the writer, and for what is taken as it is: zstd:chunked, whoever wrote it, unless this daemon has
// with other options.
type zstdChunked struct {
	compression.Type
	opt zstdchunked.WriteOptions // with the level, once it has replaced BuildKit's
}

// replace puts this writer in the place of BuildKit's, if that is what is asked for. Without a writer it does nothing.
func (z *zstdChunked) replace(c compression.Config) compression.Config {
	if z != nil && c.Type == compression.Zstd {
		w := *z
		w.opt.Level = c.Level
		c.Type = &w
	}
	return c
}

// zstdLabel names the options that make a difference to what is written.
func zstdLabel(opt zstdchunked.WriteOptions) string {
	level := 0
	if opt.Level != nil {
		level = *opt.Level
	}
	return zstdOptionsLabel + digest.FromString(fmt.Sprintf("%d %d", level, cmp.Or(opt.ChunkSize, frames.DefaultChunkSize))).Encoded()[:16]
}

// writtenOtherwise reports whether a blob with these labels is ours, of other options. It may be of several.
func (z *zstdChunked) writtenOtherwise(labels map[string]string) bool {
	ours := false
	for l := range labels {
		if l == zstdLabel(z.opt) {
			return false
		}
		ours = ours || strings.HasPrefix(l, zstdOptionsLabel)
	}
	return ours
}

// takeZstdChunked returns nil if the attributes don't ask for zstd:chunked. If they do, it makes them ask for zstd, which BuildKit knows.
func takeZstdChunked(what string, layers bool, attrs map[string]string) (*zstdChunked, error) {
	compressionKey := string(exptypes.OptKeyLayerCompression)
	wanted := layers && attrs[compressionKey] == nameZstdChunked
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		switch {
		case !strings.HasPrefix(k, zstdChunkedPrefix):
		case !layers:
			return nil, fmt.Errorf("unknown attribute %q of the %s, which writes no layers", k, what)
		case k != keyZstdChunkSize:
			return nil, fmt.Errorf("unknown attribute %q of the %s: there is %s", k, what, keyZstdChunkSize)
		case !wanted:
			return nil, fmt.Errorf("%s=%s is for compression=zstdchunked only; choose that or leave %s out", k, attrs[k], k)
		}
	}
	if !wanted {
		return nil, nil
	}
	z := &zstdChunked{Type: compression.Zstd}
	if v, given := attrs[keyZstdChunkSize]; given {
		n, err := units.RAMInBytes(v)
		if err != nil {
			return nil, fmt.Errorf("%s=%q is no size: give bytes, or a number with a unit as in 64k or 4MiB", keyZstdChunkSize, v)
		}
		if n < leastChunkSize || n > frames.MaxChunkSize {
			return nil, fmt.Errorf("%s=%s is out of range: want %d to %d bytes", keyZstdChunkSize, v, leastChunkSize, int64(frames.MaxChunkSize))
		}
		z.opt.ChunkSize = n
	}
	key := string(exptypes.OptKeyOCITypes)
	if oci, err := strconv.ParseBool(attrs[key]); err == nil && !oci {
		return nil, fmt.Errorf("compression=zstdchunked conflicts with %s=false: Docker's media types have no annotations, and without those that say where its table of contents is a layer can't be pulled lazily; leave %s out or choose compression=zstd", key, key)
	}
	delete(attrs, keyZstdChunkSize)
	attrs[compressionKey] = compression.Zstd.String()
	return z, nil
}

// String implements compression.Type.
func (z *zstdChunked) String() string { return nameZstdChunked }

// OnlySupportOCITypes implements compression.Type.
func (z *zstdChunked) OnlySupportOCITypes() bool { return true }

// NeedsConversion implements compression.Type. A layer that is zstd and nothing else needs it.
func (z *zstdChunked) NeedsConversion(ctx context.Context, cs content.Store, desc ocispecs.Descriptor) (bool, error) {
	if err := convertible(desc); err != nil || !images.IsLayerType(desc.MediaType) {
		return false, err
	}
	t, err := compression.FromMediaType(desc.MediaType)
	if err != nil {
		return false, err
	}
	if t != compression.Zstd {
		return true, nil
	}
	info, err := cs.Info(ctx, desc.Digest)
	if toc, _, terr := zstdchunked.Find(desc.Annotations); terr == nil && toc != "" {
		return err == nil && z.writtenOtherwise(info.Labels), nil // a lazy layer is referenced, and not fetched to be looked at
	}
	// One that couldn't be better is as good as it gets, or BuildKit would look in vain for what it has converted it to.
	return err != nil || info.Labels[lossyLabel] == "", nil
}

// Compress implements compression.Type.
func (z *zstdChunked) Compress(ctx context.Context, comp compression.Config) (compression.Compressor, compression.Finalizer) {
	opt := z.opt
	opt.Level, opt.Pool, opt.NoDiffID = comp.Level, pool(), true
	w := &zstdChunkedWriter{opt: opt}
	w.layerWriter = layerWriter[zstdchunked.Written]{
		format: "zstd:chunked", takes: compression.Zstd,
		write: func(dest io.Writer, tar io.Reader) (zstdchunked.Written, error) {
			return zstdchunked.Write(ctx, dest, tar, opt)
		},
	}
	return w.open, w.finalize
}

// A zstdChunkedWriter writes one layer.
type zstdChunkedWriter struct {
	layerWriter[zstdchunked.Written]
	opt zstdchunked.WriteOptions
}

// finalize implements compression.Finalizer: it says what the blob that was written last is.
func (l *zstdChunkedWriter) finalize(ctx context.Context, cs content.Store) (map[string]string, error) {
	written, err := l.last()
	if err != nil {
		return nil, err
	}
	label, value := zstdLabel(l.opt), noFile
	if written.Annotations == nil {
		if label = lossyLabel; written.Lossy != "" {
			value = quoted(written.Lossy)
		}
		bklog.G(ctx).WithField("layer", written.Digest).WithField("file", written.Lossy).
			Warn("a table of contents can't say what this layer's tar says; it is exported as zstd, without one, and can't be pulled lazily")
	}
	if err := l.label(ctx, cs, written.Digest, map[string]string{label: value}); err != nil {
		return nil, err
	}
	return maps.Clone(written.Annotations), nil
}
