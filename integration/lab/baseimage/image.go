// Package baseimage makes base images that a person would build on, without
// pulling anything: a Go development image from the local Go toolchain on
// Debian's busybox-static ([Go]), a Debian development image by debootstrap
// ([Debian]), and images of hand-made layers for tests ([Layer], [TarOf]).
//
// An [Image] is a list of tar files and a configuration. [Image.Build]
// compresses each layer as eStargz, gzip or zstd, each layer in its own
// format if wanted, and gives a go-containerregistry image that can be pushed
// ([Push]) or written as an OCI layout. Compressed layers are kept beside their
// tar files, so a second Build takes no time; a changed tar needs a new name.
package baseimage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"go.podman.io/storage/pkg/chunked/compressor"
	"golang.org/x/sync/errgroup"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// Format is how a layer is compressed.
type Format string

// The formats of layers.
const (
	EStargz Format = "estargz"
	Gzip    Format = "gzip"
	Zstd    Format = "zstd"

	// ZstdChunked is zstd:chunked as Podman writes it, StargzChunked as stargz-snapshotter does.
	ZstdChunked   Format = "zstd-chunked"
	StargzChunked Format = "stargz-chunked"
)

// Formats are those that contestants of a benchmark pull.
var Formats = []Format{EStargz, Gzip, Zstd}

// A Layer is an uncompressed layer.
type Layer struct {
	Name string // for the image's history
	Tar  string // path of the tar file
}

// An Image is what Build makes an image of.
type Image struct {
	Layers []Layer
	Config v1.Config
	// Platform is what the image is for; the zero value is this machine.
	Platform v1.Platform
}

// Facts are the figures of an image.
type Facts struct {
	Layers   int   `json:"layers"`
	Files    int   `json:"files"`    // entries of all layers
	Unpacked int64 `json:"unpacked"` // bytes of all tar files
}

// Build compresses the layers and assembles the image: every layer in the
// one format given, or the n-th layer in the n-th.
func (im Image) Build(ctx context.Context, formats ...Format) (v1.Image, error) {
	if len(formats) != 1 && len(formats) != len(im.Layers) {
		return nil, fmt.Errorf("build base image: %d formats for %d layers", len(formats), len(im.Layers))
	}
	blobs := make([]*blob, len(im.Layers))
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(max(1, runtime.GOMAXPROCS(0)/2)) // estargz.Build is parallel itself
	for i, l := range im.Layers {
		f := formats[0]
		if len(formats) > 1 {
			f = formats[i]
		}
		eg.Go(func() (err error) {
			blobs[i], err = compress(ctx, l.Tar, f)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, fmt.Errorf("build base image: %w", err)
	}
	adds := make([]mutate.Addendum, len(blobs))
	for i, b := range blobs {
		adds[i] = mutate.Addendum{
			Layer:       b,
			MediaType:   b.mediaType(),
			Annotations: b.annotations(),
			History:     v1.History{CreatedBy: im.Layers[i].Name, Created: v1.Time{Time: time.Unix(0, 0).UTC()}},
		}
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.Append(base, adds...)
	if err != nil {
		return nil, fmt.Errorf("build base image: %w", err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("build base image: %w", err)
	}
	cf = cf.DeepCopy()
	cf.Config = im.Config
	cf.OS, cf.Architecture, cf.Variant = im.Platform.OS, im.Platform.Architecture, im.Platform.Variant
	if cf.OS == "" {
		cf.OS, cf.Architecture = runtime.GOOS, runtime.GOARCH
	}
	return mutate.ConfigFile(img, cf)
}

// Push pushes an image or index (a v1.Image or v1.ImageIndex) as name, for example
// "base:estargz", and returns its digest. What the registry has already is not sent again.
func Push(ctx context.Context, reg *registry.Registry, nameTag string, img remote.Taggable, opts ...remote.Option) (digest.Digest, error) {
	ref, err := name.ParseReference(reg.Ref(nameTag))
	if err != nil {
		return "", fmt.Errorf("push base image: %w", err)
	}
	opts = append([]remote.Option{
		remote.WithContext(ctx),
		remote.WithTransport(reg.Transport()),
		remote.WithAuth(reg.Authenticator()),
	}, opts...)
	switch img := img.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, img, opts...)
	case v1.Image:
		err = remote.Write(ref, img, opts...)
	default:
		err = remote.Put(ref, img, opts...)
	}
	if err != nil {
		return "", fmt.Errorf("push base image %s: %w", ref, err)
	}
	d, err := partial.Descriptor(img.(partial.Describable))
	if err != nil {
		return "", fmt.Errorf("push base image %s: %w", ref, err)
	}
	return digest.Digest(d.Digest.String()), nil
}

// blob is a compressed layer in a file.
type blob struct {
	meta
	path string
}

type meta struct {
	Format    Format  `json:"format"`
	Blob      v1.Hash `json:"digest"`
	Diff      v1.Hash `json:"diffID"`
	Bytes     int64   `json:"size"`
	Unpacked  int64   `json:"uncompressed"`
	TOCDigest string  `json:"toc,omitempty"`
	// Chunked are the annotations of zstd:chunked.
	Chunked map[string]string `json:"chunked,omitempty"`
}

var _ v1.Layer = (*blob)(nil)

func (b *blob) Digest() (v1.Hash, error)             { return b.Blob, nil }
func (b *blob) DiffID() (v1.Hash, error)             { return b.Diff, nil }
func (b *blob) Size() (int64, error)                 { return b.Bytes, nil }
func (b *blob) MediaType() (types.MediaType, error)  { return b.mediaType(), nil }
func (b *blob) Compressed() (io.ReadCloser, error)   { return os.Open(b.path) }
func (b *blob) Uncompressed() (io.ReadCloser, error) { return decompress(b.path, b.Format) }

func (b *blob) mediaType() types.MediaType {
	switch b.Format {
	case Zstd, ZstdChunked, StargzChunked:
		return types.OCILayerZStd
	}
	return types.OCILayer
}

func (b *blob) annotations() map[string]string {
	if b.Format != EStargz {
		return b.Chunked
	}
	return map[string]string{
		estargz.TOCJSONDigestAnnotation:         b.TOCDigest,
		estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(b.Unpacked, 10),
	}
}

func decompress(path string, f Format) (io.ReadCloser, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	var r io.Reader
	if f == Zstd || f == ZstdChunked || f == StargzChunked {
		var d *zstd.Decoder
		if d, err = zstd.NewReader(file); err == nil {
			r = d.IOReadCloser()
		}
	} else {
		r, err = gzip.NewReader(file)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("decompress %s: %w", path, err), file.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{r, file}, nil
}

// compress returns the layer in the wanted format, from the file beside the
// tar if there is one.
func compress(ctx context.Context, tarPath string, f Format) (*blob, error) {
	out := tarPath + "." + string(f)
	b := &blob{path: out}
	if raw, err := os.ReadFile(out + ".json"); err == nil {
		if err := json.Unmarshal(raw, &b.meta); err == nil {
			if st, err := os.Stat(out); err == nil && st.Size() == b.Bytes {
				return b, nil
			}
		}
	}
	in, err := os.Open(tarPath)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	tmp, err := os.CreateTemp(filepath.Dir(out), filepath.Base(out)+".tmp-")
	if err != nil {
		return nil, err
	}
	defer func() {
		tmp.Close()
		os.Remove(tmp.Name()) // gone already if all went well
	}()
	blobDigest := digest.Canonical.Digester()
	w := io.MultiWriter(tmp, blobDigest.Hash())
	b.meta = meta{Format: f}
	switch f {
	case EStargz:
		err = b.writeEStargz(ctx, in, w)
	case StargzChunked:
		err = b.writeStargzChunked(in, w)
	default:
		err = b.writePlain(in, w)
	}
	if err != nil {
		return nil, fmt.Errorf("compress %s as %s: %w", tarPath, f, err)
	}
	if b.Blob, err = v1.NewHash(blobDigest.Digest().String()); err != nil {
		return nil, err
	}
	st, err := tmp.Stat()
	if err != nil {
		return nil, err
	}
	b.Bytes = st.Size()
	raw, err := json.Marshal(b.meta)
	if err != nil {
		return nil, err
	}
	if err := os.Rename(tmp.Name(), out); err != nil {
		return nil, err
	}
	return b, os.WriteFile(out+".json", raw, 0o644)
}

func (b *blob) writeEStargz(ctx context.Context, in *os.File, w io.Writer) error {
	st, err := in.Stat()
	if err != nil {
		return err
	}
	eb, err := estargz.Build(io.NewSectionReader(in, 0, st.Size()), estargz.WithContext(ctx),
		estargz.WithCompressionLevel(gzip.DefaultCompression))
	if err != nil {
		return err
	}
	defer eb.Close()
	if _, err := io.Copy(w, eb); err != nil {
		return err
	}
	if err := eb.Close(); err != nil {
		return err
	}
	b.TOCDigest = eb.TOCDigest().String()
	if b.Unpacked, err = eb.UncompressedSize(); err != nil {
		return err
	}
	b.Diff, err = v1.NewHash(eb.DiffID().String())
	return err
}

func (b *blob) writePlain(in io.Reader, w io.Writer) error {
	var cw io.WriteCloser
	var err error
	switch b.Format {
	case Zstd:
		cw, err = zstd.NewWriter(w)
	case ZstdChunked:
		b.Chunked = map[string]string{}
		cw, err = compressor.ZstdCompressor(w, b.Chunked, nil)
	default:
		cw, err = gzip.NewWriterLevel(w, gzip.DefaultCompression)
	}
	if err != nil {
		return err
	}
	diff := digest.Canonical.Digester()
	if b.Unpacked, err = io.Copy(cw, io.TeeReader(in, diff.Hash())); err != nil {
		return err
	}
	if err := cw.Close(); err != nil {
		return err
	}
	b.Diff, err = v1.NewHash(diff.Digest().String())
	return err
}

func (b *blob) writeStargzChunked(in io.Reader, w io.Writer) error {
	diff := digest.Canonical.Digester()
	b.Chunked = map[string]string{}
	sw := estargz.NewWriterWithCompressor(w, &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: b.Chunked})
	if err := sw.AppendTarLossLess(io.TeeReader(in, diff.Hash())); err != nil {
		return err
	}
	toc, err := sw.Close()
	if err != nil {
		return err
	}
	b.Chunked[estargz.TOCJSONDigestAnnotation] = toc.String()
	if _, err := io.Copy(diff.Hash(), in); err != nil { // what is behind the end of the tar
		return err
	}
	b.Diff, err = v1.NewHash(diff.Digest().String())
	return err
}

// CompressedSize returns the sum of an image's layer blobs.
func CompressedSize(img v1.Image) (int64, error) {
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	var n int64
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, nil
}
