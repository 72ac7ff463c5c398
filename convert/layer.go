package convert

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	gohash "hash"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
)

type role int

const (
	roleOther role = iota
	roleLayer      // of an image
)

// A blobJob is a blob of the source, and what becomes of it.
type blobJob struct {
	desc     ocispecs.Descriptor
	role     role
	platform string
	content  []byte // of a configuration
	reason   string // why it isn't converted, or isn't lazy then
	claim    string // that it is of the format already
	lazy     bool   // or will be
	diffID   digest.Digest

	read   atomic.Int64
	action Action
	now    ocispecs.Descriptor // digest, size and media type
	was    *memory             // of a converted one
	lossy  string
	first  int // files that come first, if this conversion has counted them
}

func (b *blobJob) layer() Layer {
	return Layer{Digest: b.desc.Digest, Size: b.desc.Size, Platform: b.platform}
}

// A blobKey is what becomes of a blob depends on: without its annotations, a layer isn't lazy.
type blobKey struct {
	digest digest.Digest
	claim  string
}

// blob returns the job of a blob, which several manifests may have.
func (c *conversion) blob(desc ocispecs.Descriptor, r role, platform string) *blobJob {
	k := blobKey{desc.Digest, c.opt.Format.Claim(desc)}
	if b := c.blobs[k]; b != nil {
		return b
	}
	b := &blobJob{desc: desc, role: r, platform: platform, claim: k.claim}
	c.blobs[k] = b
	c.order = append(c.order, b)
	return b
}

// plan says what is to become of a layer.
func (b *blobJob) plan(f Format, diffID digest.Digest, os string) error {
	if err := b.desc.Digest.Validate(); err != nil {
		return fmt.Errorf("layer %q: digest: %w", b.desc.Digest, err)
	}
	if b.diffID != "" && b.diffID != diffID {
		return fmt.Errorf("layer %s has two DiffIDs: %s and %s", b.desc.Digest, b.diffID, diffID)
	}
	b.diffID, b.role = diffID, roleLayer
	_, err := images.DiffCompression(context.Background(), b.desc.MediaType)
	switch {
	case images.IsNonDistributable(b.desc.MediaType):
		b.reason = "it is a foreign layer"
	case strings.HasSuffix(b.desc.MediaType, "+encrypted"):
		b.reason = "it is encrypted"
	case err != nil:
		b.reason = fmt.Sprintf("its media type %q is not one of a tar", b.desc.MediaType)
	case os == "windows":
		b.reason = "it is a layer of Windows"
	case b.desc.Annotations[annotationBy] == f.Key() && b.claim == "":
		b.reason = "it was converted before, and its table of contents can't be used" // each time it would get another one
	default:
		b.reason = f.Keeps(b.desc)
		b.lazy = b.reason != ""
	}
	return nil
}

// move brings a blob to the destination, converted if it's to be.
func (c *conversion) move(ctx context.Context, b *blobJob) error {
	b.now = ocispecs.Descriptor{MediaType: b.desc.MediaType, Digest: b.desc.Digest, Size: b.desc.Size}
	if b.role == roleLayer {
		b.now.MediaType = oci(b.desc.MediaType)
	}
	err := c.become(ctx, b)
	if err != nil {
		what := "blob"
		if b.role == roleLayer {
			what = "layer"
		}
		return fmt.Errorf("%s %s of %s: %w", what, b.desc.Digest, c.src, explain(err))
	}
	return nil
}

func (c *conversion) become(ctx context.Context, b *blobJob) error {
	if images.IsNonDistributable(b.desc.MediaType) && len(b.desc.URLs) > 0 {
		b.action = Kept
		return nil
	}
	if b.role != roleLayer || b.reason != "" {
		return c.copied(ctx, b, nil)
	}
	if b.claim != "" {
		if lazy, err := c.lazy(ctx, b); lazy || err != nil {
			return err
		}
	}
	if m, ok := c.remembered(memoryKey{b.desc.Digest, c.opt.Format.Key()}); ok {
		there, err := c.has(ctx, ocispecs.Descriptor{Digest: m.Digest, Size: m.Size}, m.At)
		if err != nil {
			return err
		}
		if there {
			c.use(b, m)
			return nil
		}
	}
	return c.again(ctx, b, c.converted)
}

// has reports whether a blob is at the destination, or can be there without its bytes being moved, as it was seen in repositories.
func (c *conversion) has(ctx context.Context, desc ocispecs.Descriptor, seen []string) (bool, error) {
	if ok, err := c.dst.Has(ctx, desc); ok || err != nil {
		return ok, err
	}
	for _, at := range seen {
		if from, ok := repository.Sibling(c.dst, at); ok {
			if ok, err := c.dst.Mount(ctx, desc, from); ok || err != nil {
				return ok, err
			}
		}
	}
	return false, nil
}

// use takes what a layer has become before.
func (c *conversion) use(b *blobJob, m memory) {
	b.action, b.lossy = Reused, m.Lossy
	b.lazy = c.opt.Format.Claim(ocispecs.Descriptor{MediaType: c.opt.Format.MediaType(), Annotations: m.Annotations}) != ""
	switch {
	case b.lazy:
	case m.Unusable != "":
		b.reason = "its table of contents can't be used: " + m.Unusable
	case m.Lossy != "":
		b.reason = fmt.Sprintf("a table of contents can't say what its tar says of %q", m.Lossy)
	default:
		b.reason = "its table of contents would be larger than readers take it"
	}
	b.now = ocispecs.Descriptor{MediaType: c.opt.Format.MediaType(), Digest: m.Digest, Size: m.Size}
	b.was, b.diffID = &m, m.DiffID
	c.remember(m)
}

const reasonLazy = "it is lazy already"

// lazy copies a layer that claims to be of the format, and reports whether it is, which is found out once.
func (c *conversion) lazy(ctx context.Context, b *blobJob) (bool, error) {
	k := c.lazyKey(b.desc.Digest, b.claim)
	m, ok := c.remembered(k)
	if !ok {
		not, err := c.whyNot(ctx, b.desc)
		if err != nil || not != "" {
			return false, err
		}
		m = memory{From: k.from, By: k.by, Digest: b.desc.Digest, Size: b.desc.Size, DiffID: b.diffID, Annotations: formatsOwn(b.desc)}
	}
	b.lazy, b.reason = true, reasonLazy
	if err := c.copied(ctx, b, m.At); err != nil {
		return true, err
	}
	c.remember(m)
	return true, nil
}

// whyNot returns why a layer of the source isn't what it claims to be, "" if it is.
func (c *conversion) whyNot(ctx context.Context, desc ocispecs.Descriptor) (not string, err error) {
	from, err := c.src.ReaderAt(ctx, desc)
	if err != nil {
		return "", err
	}
	defer from.Close()
	return c.opt.Format.Check(from, desc)
}

// copied brings a blob to the destination as it is. It was seen in these repositories, besides the source.
func (c *conversion) copied(ctx context.Context, b *blobJob, seen []string) error {
	b.action = Present
	if ok, err := c.has(ctx, b.desc, seen); ok || err != nil {
		return err
	}
	if ok, err := c.dst.Mount(ctx, b.desc, c.src); ok || err != nil {
		return err
	}
	b.action = Copied
	return c.again(ctx, b, c.transfer)
}

// Attempts to move a blob, and what is waited before the second one; twice as long before the next.
const (
	attempts = 3
	pause    = time.Second
)

// again tries until it works, or there is no hope.
func (c *conversion) again(ctx context.Context, b *blobJob, try func(context.Context, *blobJob) error) error {
	for n, wait := 1, pause; ; n, wait = n+1, 2*wait {
		b.read.Store(0)
		err := try(ctx, b)
		if err == nil || n == attempts || ctx.Err() != nil || !repository.Transient(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// transfer streams a blob.
func (c *conversion) transfer(ctx context.Context, b *blobJob) error {
	in, err := c.open(ctx, b)
	if err != nil {
		return err
	}
	defer in.Close()
	up, err := c.dst.Create(ctx)
	if err != nil {
		return err
	}
	defer up.Cancel()
	size, err := io.CopyBuffer(up, struct{ io.Reader }{in}, make([]byte, 256<<10))
	if err != nil {
		return err
	}
	if err := in.verify(); err != nil {
		return err
	}
	return up.Commit(ctx, b.desc.Digest, size)
}

// converted streams a layer through the format's writer.
func (c *conversion) converted(ctx context.Context, b *blobJob) error {
	b.action = Converted
	in, err := c.open(ctx, b)
	if err != nil {
		return err
	}
	defer in.Close()
	plain, err := decompress(in)
	if err != nil {
		return in.explain(err, err)
	}
	defer plain.Close()
	up, err := c.dst.Create(ctx)
	if err != nil {
		return err
	}
	defer up.Cancel()
	decompressed := &failingReader{Reader: plain}
	made, err := c.opt.Format.Write(ctx, up, decompressed)
	if err != nil {
		return in.explain(err, decompressed.err)
	}
	if err := in.verify(); err != nil {
		return err
	}
	if made.Tar != b.diffID {
		return fmt.Errorf("its DiffID is %s, and not %s as the image's configuration says: "+damaged, made.Tar, b.diffID)
	}
	if err := up.Commit(ctx, made.Digest, made.Size); err != nil {
		return err
	}
	c.use(b, memory{
		From: b.desc.Digest, By: c.opt.Format.Key(), Digest: made.Digest, Size: made.Size, DiffID: made.DiffID,
		Annotations: made.Annotations, Lossy: made.Lossy, Unusable: made.Unusable,
	})
	b.action, b.first = Converted, made.First
	return nil
}

// A blobReader is a blob of the source on its way, whose digest is computed as it is read.
type blobReader struct {
	io.ReadCloser
	b        *blobJob
	sum      gohash.Hash
	progress func(Update)
	told     int64
	err      error // of the last Read, if it wasn't the end
}

// A failingReader keeps the error of its reader, unless that is its end.
type failingReader struct {
	io.Reader
	err error
}

// Read implements io.Reader.
func (r *failingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

const damaged = "the source is damaged; make it anew, or convert another image"

// explain says what to do about a layer that can't be decompressed, or isn't a tar, if the blob is the one that was asked for.
func (r *blobReader) explain(err, decompressing error) error {
	noTar := errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader)
	if r.err != nil || repository.Transient(err) || decompressing == nil && !noTar {
		return err
	}
	if verr := r.verify(); verr != nil {
		return fmt.Errorf("%w: %w", verr, err)
	}
	return fmt.Errorf("%w: %s", err, damaged)
}

func (c *conversion) open(ctx context.Context, b *blobJob) (*blobReader, error) {
	body, err := c.src.Open(ctx, b.desc)
	if err != nil {
		return nil, err
	}
	if alg := b.desc.Digest.Algorithm(); !alg.Available() {
		return nil, errors.Join(fmt.Errorf("digests of the type %s can't be verified", alg), body.Close())
	}
	c.opt.Progress(Update{Layer: b.layer(), Action: b.action})
	return &blobReader{ReadCloser: body, b: b, sum: b.desc.Digest.Algorithm().Hash(), progress: c.opt.Progress}, nil
}

// tellEvery is how many bytes of a blob are one update.
const tellEvery = 1 << 20

// Read implements io.Reader.
func (r *blobReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.sum.Write(p[:n])
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	if total := r.b.read.Add(int64(n)); total-r.told >= tellEvery {
		r.told = total
		r.progress(Update{Layer: r.b.layer(), Action: r.b.action, Read: total})
	}
	return n, err
}

// verify reads what nobody has wanted, and compares the digest.
func (r *blobReader) verify() error {
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{r}); err != nil {
		return err
	}
	if got := digest.NewDigestFromBytes(r.b.desc.Digest.Algorithm(), r.sum.Sum(nil)); got != r.b.desc.Digest {
		return fmt.Errorf("the source sent other bytes than it promised: their digest is %s", got)
	}
	return nil
}

// maxWindow bounds what zstd takes to decompress a layer, in bytes: that of its level 22 and --long.
const maxWindow = 128 << 20

// decompress tells compressions by their first bytes, as containerd does: media types are not always true.
func decompress(r io.Reader) (io.ReadCloser, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		return z, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(in), nil
}

// explain says what to do about errors that don't say it themselves.
func explain(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w; make room and convert it again: layers that are complete stay", err)
	}
	return err
}
