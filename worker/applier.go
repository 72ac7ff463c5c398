package worker

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/util/winlayers"
	"github.com/moby/sys/userns"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// newApplier is BuildKit's applier, with ours for eStargz layers in it. The one around that
// takes Windows layers, and knows a media type that containerd does not; the outermost names the layer in errors.
func newApplier(blobs content.Provider) diff.Applier {
	return &named{winlayers.NewFileSystemApplierWithWindows(blobs, &applier{
		Applier: apply.NewFileSystemApplier(blobs),
		blobs:   blobs,
	})}
}

// named says which layer can't be unpacked, which neither containerd nor BuildKit does.
type named struct{ diff.Applier }

// errEncrypted is what the bytes of an encrypted layer are, when nobody decrypts them: no tar.
var errEncrypted = errors.New("it is encrypted, and this daemon has no keys: build on an image that isn't")

// Apply implements diff.Applier.
func (a *named) Apply(ctx context.Context, desc ocispecs.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispecs.Descriptor, error) {
	applied, err := a.Applier.Apply(ctx, desc, mounts, opts...)
	if err == nil || context.Cause(ctx) != nil {
		return applied, err
	}
	if strings.HasSuffix(desc.MediaType, "+encrypted") {
		err = fmt.Errorf("%w: %w", errEncrypted, err)
	}
	return applied, fmt.Errorf("unpack layer %s: %w", desc.Digest, err)
}

// applier unpacks eStargz layers as a lazy mount shows them: without the files that
// only the format needs. BuildKit unpacks them where they can't be lazy, and also for
// a merge or a diff of layers that nothing has mounted yet, and a step must not
// see which of these happened.
type applier struct {
	diff.Applier // of all other layers
	blobs        content.Provider
}

// Apply implements diff.Applier: what containerd's does, but for the filter. The
// descriptor that it returns is that of the whole tar file, hidden files included.
func (a *applier) Apply(ctx context.Context, desc ocispecs.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (_ ocispecs.Descriptor, err error) {
	if _, ok := desc.Annotations[estargz.TOCJSONDigestAnnotation]; !ok {
		return a.Applier.Apply(ctx, desc, mounts, opts...)
	}
	var cfg diff.ApplyConfig
	for _, o := range opts {
		if err := o(ctx, desc, &cfg); err != nil {
			return ocispecs.Descriptor{}, err
		}
	}
	if cfg.SyncFs || cfg.Progress != nil { // BuildKit asks for neither
		return ocispecs.Descriptor{}, fmt.Errorf("sync and progress for an eStargz layer: %w", cerrdefs.ErrNotImplemented)
	}
	ra, err := a.blobs.ReaderAt(ctx, desc)
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	defer ra.Close()

	stages := []diff.StreamProcessor{diff.NewProcessorChain(desc.MediaType, content.NewReader(ra))}
	stream := stages[0]
	for {
		if stream, err = diff.GetProcessor(ctx, stream, cfg.ProcessorPayloads); err != nil {
			return ocispecs.Descriptor{}, fmt.Errorf("media type %s: %w", desc.MediaType, err)
		}
		defer stream.Close()
		stages = append(stages, stream)
		if stream.MediaType() == ocispecs.MediaTypeImageLayer {
			break
		}
	}

	diffID := digest.Canonical.Digester()
	var size counter
	whole := io.TeeReader(stream, io.MultiWriter(diffID.Hash(), &size))
	if err := unpackFiltered(ctx, mounts, whole); err != nil {
		return ocispecs.Descriptor{}, err
	}
	// What follows the last entry counts.
	if _, err := io.Copy(io.Discard, whole); err != nil {
		return ocispecs.Descriptor{}, err
	}
	for _, s := range stages {
		if s, ok := s.(interface{ Err() error }); ok {
			err = errors.Join(err, s.Err())
		}
	}
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer, Digest: diffID.Digest(), Size: int64(size)}, nil
}

// unpackFiltered chooses how to unpack as containerd's core/diff/apply does: straight
// into the upper directory of an overlay, with its kind of whiteouts, else through
// a mount.
func unpackFiltered(ctx context.Context, mounts []mount.Mount, tarball io.Reader) error {
	opts := []archive.ApplyOpt{archive.WithFilter(visible)}
	// A user namespace can't make an overlay's whiteouts:
	// https://github.com/containerd/containerd/issues/3762
	if len(mounts) == 1 && mounts[0].Type == "overlay" && !userns.RunningInUserNS() {
		if upper, lower := overlayDirs(mounts[0].Options); upper != "" {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
			if len(lower) > 0 {
				opts = append(opts, archive.WithParents(lower))
			}
			_, err := archive.Apply(ctx, upper, tarball, opts...)
			return err
		}
	}
	return mount.WithTempMount(ctx, mounts, func(root string) error {
		_, err := archive.Apply(ctx, root, tarball, opts...)
		return err
	})
}

func overlayDirs(options []string) (upper string, lower []string) {
	for _, o := range options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = dir
		} else if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lower = strings.Split(dirs, ":")
		}
	}
	return upper, lower
}

// visible is false for the files that eStargz adds to the root of a layer:
// https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md
// The format's builders replace what a layer had by these names; a directory, or
// a file further down, is none of theirs.
func visible(h *tar.Header) (bool, error) {
	if h.Typeflag == tar.TypeDir {
		return true, nil
	}
	switch path.Clean("/" + h.Name) {
	case "/" + estargz.TOCTarName, "/" + estargz.PrefetchLandmark, "/" + estargz.NoPrefetchLandmark:
		return false, nil
	}
	return true, nil
}

// counter counts the bytes written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}
