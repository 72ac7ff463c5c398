package exporter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
)

// eStargz is BuildKit's compression type but for the writer. What is eStargz already is taken as it is, unless this daemon has written it
// with other options.
type eStargz struct {
	compression.Type
	opt   estargz.WriteOptions // with the level, once it has replaced BuildKit's
	order *ordering            // nil leaves files where they are
	tocs  *tocs                // of what is exported, if they are external
	// inBase reports of a cache's layers whether they are an image's that the build is FROM. Of those of an image, its base's DiffIDs say so.
	inBase func(ocispecs.Descriptor) bool
}

// rewrites reports whether layers that this daemon has written otherwise are written again without force.
func (e *eStargz) rewrites() bool { return e.order != nil || e.opt.ExternalTOC }

// pool bounds what all exports of the daemon take.
var pool = sync.OnceValue(func() *estargz.Pool { return estargz.NewPool(0) })

func newEStargz(opt estargz.WriteOptions) *eStargz {
	return &eStargz{Type: compression.EStargz, opt: opt, tocs: newTOCs()}
}

// replace puts this writer in the place of BuildKit's, if that is what is asked for. Without a writer it does nothing.
func (e *eStargz) replace(c compression.Config) compression.Config {
	if e != nil && c.Type == compression.EStargz {
		w := *e
		w.opt.Level = c.Level
		c.Type = &w
	}
	return c
}

// forCache returns the writer for a cache of what is exported: its layers may be others, and so are their tables of contents.
func (e *eStargz) forCache(inBase func(ocispecs.Descriptor) bool) *eStargz {
	if e == nil {
		return nil
	}
	w := *e
	w.tocs, w.inBase = newTOCs(), inBase
	return &w
}

// Compress implements compression.Type.
func (e *eStargz) Compress(ctx context.Context, comp compression.Config) (compression.Compressor, compression.Finalizer) {
	opt := e.opt
	opt.Level = comp.Level
	opt.Pool = pool()
	w := &eStargzWriter{ctx: ctx, opt: opt, order: e.order, options: e.label()}
	w.layerWriter = layerWriter[eStargzWritten]{format: "eStargz", takes: compression.Gzip, write: w.write}
	return w.open, w.finalize
}

// NeedsConversion implements compression.Type. BuildKit asks it of a layer that is to be eStargz, and of what that has been converted to
// before.
func (e *eStargz) NeedsConversion(ctx context.Context, cs content.Store, desc ocispecs.Descriptor) (bool, error) {
	if err := convertible(desc); err != nil {
		return false, err
	}
	info, err := cs.Info(ctx, desc.Digest)
	if cerrdefs.IsNotFound(err) {
		// A lazy layer is referenced, and not fetched to be looked at. One dialect of zstd:chunked has the same annotation.
		from, ferr := compression.FromMediaType(desc.MediaType)
		if _, err := digest.Parse(desc.Annotations[stargz.TOCJSONDigestAnnotation]); err == nil && ferr == nil && from == compression.Gzip {
			return false, nil
		}
	}
	if err == nil && images.IsLayerType(desc.MediaType) && e.writtenOtherwise(info.Labels) {
		return true, nil
	}
	if err == nil && info.Labels[estargzLossyLabel] != "" {
		return false, nil // it is as good as it gets, and BuildKit would miss a table of contents
	}
	return e.Type.NeedsConversion(ctx, cs, desc)
}

// convertible returns why nothing can be made of a layer but what it is. It's an error only where somebody forces that.
func convertible(desc ocispecs.Descriptor) error {
	if !images.IsLayerType(desc.MediaType) {
		return nil
	}
	_, err := compression.FromMediaType(desc.MediaType)
	if strings.HasSuffix(desc.MediaType, "+encrypted") {
		err = errors.New("it is encrypted")
	}
	if err != nil {
		return inconvertible(desc, err)
	}
	return nil
}

// estargzLossyLabel marks a blob that can't be lazy, and names the file because of which.
const estargzLossyLabel = optionsLabel + "lossy"

// optionsLabel is how the labels begin that say with which options this daemon has written a blob. There may be several: a small layer is
// the same with most of them. The value is how many of its files come first.
const optionsLabel = "buildkitd-lazy/estargz."

// label names the options that make a difference to what is written: all but the pool.
func (e *eStargz) label() string {
	opt, level, list := e.opt, -1, ""
	if opt.Level != nil {
		level = *opt.Level
	}
	opt.Level, opt.Pool = nil, nil
	if e.order != nil {
		list = e.order.list.Digest().String()
	}
	return optionsLabel + digest.FromString(fmt.Sprintf("%d %+v %s", level, opt, list)).Encoded()[:16]
}

// writtenOtherwise reports whether a blob with these labels is ours, of other options.
func (e *eStargz) writtenOtherwise(labels map[string]string) bool {
	_, same := labels[e.label()]
	return !same && isOurs(labels)
}

// isOurs reports whether this daemon has written a blob with these labels.
func isOurs(labels map[string]string) bool {
	for l := range labels {
		if strings.HasPrefix(l, optionsLabel) {
			return true
		}
	}
	return false
}

// An eStargzWriter writes one layer.
type eStargzWriter struct {
	layerWriter[eStargzWritten]
	ctx     context.Context
	opt     estargz.WriteOptions
	order   *ordering
	options string // the label that stands for them
}

type eStargzWritten struct {
	estargz.Written     // its tar as it was before its files were put in order
	first           int // files that come first in it
}

// write writes the layer of a tar, with its files in order.
func (l *eStargzWriter) write(dest io.Writer, tar io.Reader) (w eStargzWritten, err error) {
	if l.order == nil {
		w.Written, err = estargz.Write(l.ctx, dest, tar, l.opt)
		return w, err
	}
	before := digest.SHA256.Digester()
	o, err := l.order.list.Tar(l.ctx, io.TeeReader(tar, before.Hash()), l.order.dir)
	if err != nil {
		return w, err
	}
	defer o.Close()
	w.Written, err = estargz.Write(l.ctx, dest, o, l.opt)
	w.Tar, w.first = before.Digest(), o.First
	return w, err
}

// finalize implements compression.Finalizer: it says what the blob that was written last is, in labels and annotations as BuildKit's
// own writer does.
func (l *eStargzWriter) finalize(ctx context.Context, cs content.Store) (map[string]string, error) {
	written, err := l.last()
	if err != nil {
		return nil, err
	}
	said := map[string]string{
		// What is there is the digest of the tar without the TOC.
		labels.LabelUncompressed: written.DiffID.String(),
		l.options:                strconv.Itoa(written.first),
		madeOf(written.Tar):      written.Tar.String(),
	}
	external := l.opt.ExternalTOC && written.Lossy == ""
	if written.Lossy != "" {
		said[estargzLossyLabel] = quoted(written.Lossy)
	}
	if external {
		toc, err := storeTOC(ctx, cs, &written.Written)
		if err != nil {
			return nil, err
		}
		maps.Copy(said, toc)
	}
	if err := l.label(ctx, cs, written.Digest, said); err != nil {
		return nil, err
	}
	annotations := map[string]string{
		labels.LabelUncompressed:               written.DiffID.String(),
		stargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(written.TarSize, 10),
	}
	switch {
	case external: // for who asks for it: see tocs.annotate
	case written.Lossy == "":
		annotations[stargz.TOCJSONDigestAnnotation] = written.TOCDigest.String()
	default:
		// With the annotation, readers would show the file as another one.
		bklog.G(ctx).WithField("layer", written.Digest).WithField("file", written.Lossy).
			Warn("a table of contents can't say what this layer's tar says; it is exported without the annotation by which it would be pulled lazily")
	}
	return annotations, nil
}
