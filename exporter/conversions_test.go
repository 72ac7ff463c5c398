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
	stargz "github.com/containerd/stargz-snapshotter/estargz"
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
	toc  []byte // behind it
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

func (l *lazyLayer) Tar(context.Context, ocispecs.Descriptor, session.Group) (io.ReadCloser, []byte, error) {
	if l.tar == nil {
		return nil, nil, cerrdefs.ErrNotFound
	}
	return &brokenTar{bytes.NewReader(l.tar), l.err}, l.toc, nil
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

// The DiffID of eStargz is that of a tar and the table of contents behind it.
func TestConvertWhatHasArrivedOfEStargz(t *testing.T) {
	theirs := contentStore(t)
	from, err := convert(t.Context(), theirs, put(t, theirs, layerTar(t, "a", "b")), ours(estargz.WriteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	blob, err := content.ReadBlob(t.Context(), theirs, *from)
	if err != nil {
		t.Fatal(err)
	}
	want, err := convert(t.Context(), theirs, *from, oursChunked(zstdchunked.WriteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	footer := len(blob) - stargz.FooterSize
	toc := blob[tocOffset(blob[footer:]):footer]
	other, err := convert(t.Context(), theirs, put(t, theirs, layerTar(t, "a")), ours(estargz.WriteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	otherBlob, err := content.ReadBlob(t.Context(), theirs, *other)
	if err != nil {
		t.Fatal(err)
	}
	otherTOC := otherBlob[tocOffset(otherBlob[len(otherBlob)-stargz.FooterSize:]):]
	for name, c := range map[string]struct {
		toc  []byte
		read int
	}{
		"its table of contents": {toc, 0},
		"another one":           {otherTOC, 1},
		"none":                  {nil, 1},
		"something else":        {[]byte("no table of contents"), 1},
		"a part of it":          {toc[:len(toc)/2], 1},
	} {
		t.Run(name, func(t *testing.T) {
			l := &lazyLayer{blob: blob, tar: layerTar(t, "a", "b"), toc: c.toc}
			conversions := &Conversions{Content: contentStore(t), Layers: l}
			got, err := conversions.stream(t.Context(), *from, oursChunked(zstdchunked.WriteOptions{}), nil)
			if err != nil || got.Digest != want.Digest || l.read != c.read {
				t.Errorf("it is %+v, %v, want %s; the blob was read %d times, want %d", got, err, want.Digest, l.read, c.read)
			}
		})
	}
}
