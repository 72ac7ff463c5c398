package exporter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/containerd/containerd/v2/core/content"
	cdcompression "github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A tarReader reads the tar of a layer out of its blob, while that arrives: the one that BuildKit makes of it, without the table of contents if it is
// eStargz. Its end only comes when all of the blob has been read, whose reader verifies it, and the DiffID is the one that the layer's image
// promises.
type tarReader struct {
	desc   ocispecs.Descriptor
	blob   *arriving
	plain  io.ReadCloser // what is being decompressed
	diffID digest.Digester
	footer []byte // the end of the blob, if it was read ahead of the rest
	toc    bool   // what is behind plain is the table of contents
	err    error  // of the last Read
}

// openTar returns the tar of a layer. The blob is the caller's to close, after the tar.
func openTar(blob content.ReaderAt, desc ocispecs.Descriptor) (*tarReader, error) {
	t := &tarReader{desc: desc, blob: &arriving{r: io.NewSectionReader(blob, 0, blob.Size())}, diffID: digest.Canonical.Digester()}
	payload := io.Reader(t.blob)
	if from, err := compression.FromMediaType(desc.MediaType); err == nil && from == compression.Gzip {
		p := make([]byte, min(stargz.FooterSize, blob.Size()))
		if n, err := blob.ReadAt(p, blob.Size()-int64(len(p))); n < len(p) {
			return nil, err
		}
		t.footer = p
		if toc := tocOffset(p); toc > 0 && toc < blob.Size() {
			t.toc, payload = true, io.LimitReader(t.blob, toc)
		}
	}
	return t, t.decompress(payload)
}

// presentTar returns a tar that needn't be decompressed, and is closed with it. toc is what was behind it in the blob, if that is eStargz.
func presentTar(tar io.ReadCloser, toc []byte, desc ocispecs.Descriptor) *tarReader {
	return &tarReader{desc: desc, blob: &arriving{r: bytes.NewReader(toc)}, plain: tar, diffID: digest.Canonical.Digester(), toc: toc != nil}
}

// tocOffset returns where the table of contents begins, by the end of a blob; 0 if there is none.
func tocOffset(end []byte) int64 {
	for _, d := range []stargz.Decompressor{new(stargz.GzipDecompressor), new(stargz.LegacyGzipDecompressor)} {
		if n := int64(len(end)) - d.FooterSize(); n >= 0 {
			if _, toc, _, err := d.ParseFooter(end[n:]); err == nil {
				return toc
			}
		}
	}
	return 0
}

func (t *tarReader) decompress(from io.Reader) error {
	plain, err := cdcompression.DecompressStream(from)
	if err != nil {
		return t.damaged(err)
	}
	t.plain = plain
	return nil
}

// Read implements io.Reader.
func (t *tarReader) Read(p []byte) (n int, err error) {
	if t.err != nil {
		return 0, t.err
	}
	for n == 0 && err == nil {
		n, err = t.plain.Read(p)
	}
	t.diffID.Hash().Write(p[:n])
	switch {
	case errors.Is(err, io.EOF):
		t.err = t.end()
	case err != nil:
		t.err = t.damaged(err)
	}
	return n, t.err
}

// end reads what is behind the tar, and returns io.EOF if that's all as it should be.
func (t *tarReader) end() error {
	if t.toc {
		t.toc = false
		err := t.plain.Close()
		t.plain = io.NopCloser(nil)
		if err := errors.Join(err, t.decompress(t.blob)); err != nil {
			return err
		}
		header := make([]byte, 512)
		n, err := io.ReadFull(t.plain, header)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return t.damaged(err)
		}
		h, err := tar.NewReader(bytes.NewReader(header[:n])).Next()
		if err != nil || h.Name != stargz.TOCTarName {
			return damaged(t.desc, errors.New("it ends like eStargz, and has no table of contents"))
		}
		t.diffID.Hash().Write(header)
		if _, err := io.Copy(t.diffID.Hash(), t.plain); err != nil {
			return t.damaged(err)
		}
	}
	if err := t.rest(); err != nil {
		return err
	}
	if want, promised := t.desc.Annotations[labels.LabelUncompressed]; promised && t.diffID.Digest().String() != want {
		return damaged(t.desc, fmt.Errorf("its DiffID is %s, and not %s as the configuration of its image says", t.diffID.Digest(), want))
	}
	return io.EOF
}

// rest reads what nobody has wanted, and returns an error if the bytes that have arrived aren't the blob's.
func (t *tarReader) rest() error {
	if _, err := io.Copy(io.Discard, t.blob); err != nil {
		return err
	}
	if !bytes.HasSuffix(t.blob.last, t.footer) {
		return &changedError{fmt.Errorf("layer %s: its end was sent twice, and differently", t.desc.Digest)}
	}
	return nil
}

// damaged says why a layer can't be decompressed, if it isn't because other bytes have arrived.
func (t *tarReader) damaged(why error) error {
	if err := t.rest(); err != nil {
		return err
	}
	return damaged(t.desc, fmt.Errorf("decompress: %w", why))
}

// explain says why nothing could be made of the tar.
func (t *tarReader) explain(ctx context.Context, err error) error {
	_, entry := errors.AsType[*layer.EntryError](err)
	noTar := errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader)
	switch {
	case ctx.Err() != nil:
		return err
	case t.err != nil && !errors.Is(t.err, io.EOF):
		return t.err
	case !entry && !noTar:
		return fmt.Errorf("layer %s: %w", t.desc.Digest, err)
	}
	if rerr := t.rest(); rerr != nil {
		return rerr
	}
	if noTar {
		return damaged(t.desc, err)
	}
	return inconvertible(t.desc, err)
}

// Close implements io.Closer.
func (t *tarReader) Close() error { return t.plain.Close() }

// arriving reads a blob, and keeps its end.
type arriving struct {
	r    io.Reader
	last []byte
	err  error
}

// Read implements io.Reader.
func (a *arriving) Read(p []byte) (int, error) {
	if a.err != nil {
		return 0, a.err
	}
	n, err := a.r.Read(p)
	a.err = err
	if n >= stargz.FooterSize {
		a.last = append(a.last[:0], p[n-stargz.FooterSize:n]...)
	} else {
		a.last = append(a.last, p[:n]...)
		a.last = append(a.last[:0], a.last[max(0, len(a.last)-stargz.FooterSize):]...)
	}
	return n, err
}

// A changedError is temporary, as a net.Error: who gets it reads the layer again.
type changedError struct{ error }

func (*changedError) Temporary() bool { return true }
func (*changedError) Timeout() bool   { return false }

// tarStore is a content store that has the tar of a layer in the place of its blob, to be read once, and knows what is written.
type tarStore struct {
	content.Store
	blob digest.Digest
	tar  *tarReader
	ref  string // of what is written
}

// Writer implements content.Ingester.
func (s *tarStore) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	s.ref = o.Ref
	return s.Store.Writer(ctx, opts...)
}

// abort removes what was written, which else stays until the lease ends.
func (s *tarStore) abort(ctx context.Context) error {
	if s.ref == "" {
		return nil
	}
	if err := s.Abort(context.WithoutCancel(ctx), s.ref); err != nil && !cerrdefs.IsNotFound(err) {
		return fmt.Errorf("remove what was written: %w", err)
	}
	return nil
}

// Info implements content.InfoProvider.
func (s *tarStore) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	if dgst == s.blob {
		return content.Info{Digest: dgst, Labels: map[string]string{isEStargzLabel: "false"}}, nil
	}
	return s.Store.Info(ctx, dgst)
}

// ReaderAt implements content.Provider.
func (s *tarStore) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if desc.Digest == s.blob {
		return &onceReader{r: s.tar}, nil
	}
	return s.Store.ReaderAt(ctx, desc)
}

// A onceReader is read from the start to the end, of which nobody knows where it is.
type onceReader struct {
	r   io.Reader
	off int64
}

// Size implements content.ReaderAt.
func (*onceReader) Size() int64 { return math.MaxInt64 }

// ReadAt implements io.ReaderAt.
func (o *onceReader) ReadAt(p []byte, off int64) (n int, err error) {
	if off != o.off {
		return 0, fmt.Errorf("read at %d what is at %d: %w", off, o.off, errors.ErrUnsupported)
	}
	for n < len(p) && err == nil {
		var m int
		m, err = o.r.Read(p[n:])
		n += m
	}
	o.off += int64(n)
	return n, err
}

// Close implements io.Closer.
func (*onceReader) Close() error { return nil }
