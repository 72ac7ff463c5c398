package exporter

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// lazyLayer is a layer whose blob is elsewhere, and of whose tar something may have arrived.
type lazyLayer struct {
	blob []byte // nil if nobody knows where it is
	tar  []byte // nil if nothing has arrived
	err  error  // of the tar, behind that
	read int    // how often the blob was
}

func (l *lazyLayer) Convert(context.Context, ocispecs.Descriptor, session.Group) (content.ReaderAt, error) {
	if l.blob == nil {
		return nil, cerrdefs.ErrNotFound
	}
	l.read++
	return blobBytes{bytes.NewReader(l.blob)}, nil
}

func (l *lazyLayer) Tar(context.Context, ocispecs.Descriptor, session.Group) (io.ReadCloser, error) {
	if l.tar == nil {
		return nil, cerrdefs.ErrNotFound
	}
	return &brokenTar{bytes.NewReader(l.tar), l.err}, nil
}

type brokenTar struct {
	io.Reader
	err error
}

func (b *brokenTar) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && b.err != nil {
		err = b.err
	}
	return n, err
}

func (*brokenTar) Close() error { return nil }

// A lazy layer becomes what its blob would in the content store, out of what has arrived of it if that is right, and else out of its blob. Where it
// can't be converted, nothing is left.
func TestConvertLazyLayer(t *testing.T) {
	theirs := contentStore(t)
	whole := layerTar(t, "a", "b")
	from, err := convert(t.Context(), theirs, put(t, theirs, whole), oursChunked(zstdchunked.WriteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	blob, err := content.ReadBlob(t.Context(), theirs, *from)
	if err != nil {
		t.Fatal(err)
	}
	from.Annotations[labels.LabelUncompressed] = digest.FromBytes(whole).String()
	gone := errors.New("the registry is gone")
	for to, comp := range map[string]compression.Config{
		"estargz":      ours(estargz.WriteOptions{}),
		"gzip":         compression.New(compression.Gzip),
		"uncompressed": compression.New(compression.Uncompressed),
	} {
		want, err := convert(t.Context(), theirs, *from, comp)
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			layer *lazyLayer
			read  int
			err   error
		}{
			"arrives":             {&lazyLayer{blob: blob}, 1, nil},
			"has arrived":         {&lazyLayer{blob: blob, tar: whole}, 0, nil},
			"another has arrived": {&lazyLayer{blob: blob, tar: layerTar(t, "a", "c")}, 1, nil},
			"no tar has arrived":  {&lazyLayer{blob: blob, tar: []byte("no tar")}, 1, nil},
			"a part can't be had": {&lazyLayer{blob: blob, tar: whole[:50_000], err: gone}, 1, nil},
			"nobody has it":       {&lazyLayer{}, 0, cerrdefs.ErrNotFound},
			"the rest is gone":    {&lazyLayer{tar: whole[:50_000], err: gone}, 0, cerrdefs.ErrNotFound},
		} {
			t.Run(to+"/"+name, func(t *testing.T) {
				cs := contentStore(t)
				other := put(t, cs, layerTar(t, "other"))
				conversions := &Conversions{Content: cs, Layers: c.layer}
				got, err := conversions.stream(t.Context(), *from, comp, nil)
				if !errors.Is(err, c.err) || c.layer.read != c.read {
					t.Errorf("error %v, want %v; the blob was read %d times, want %d", err, c.err, c.layer.read, c.read)
				}
				if c.err == nil && (got == nil || got.Digest != want.Digest || got.MediaType != want.MediaType || got.Size != want.Size) {
					t.Errorf("it is %+v, want %+v", got, want)
				}
				var left []digest.Digest
				if err := cs.Walk(t.Context(), func(i content.Info) error {
					if i.Digest != want.Digest && i.Digest != other.Digest {
						left = append(left, i.Digest)
					}
					return nil
				}); err != nil || len(left) > 0 {
					t.Errorf("left: %v, %v", left, err)
				}
				if being, err := cs.ListStatuses(t.Context()); err != nil || len(being) > 0 {
					t.Errorf("being written: %v, %v", being, err)
				}
			})
		}
	}
}
