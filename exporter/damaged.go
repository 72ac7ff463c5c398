package exporter

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/iohelper"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// writesOurs reports whether layers of a type are written by this package.
func writesOurs(t compression.Type) bool {
	switch t.(type) {
	case *eStargz, *zstdChunked:
		return true
	}
	return false
}

// conversionFailed is what BuildKit says of a conversion that failed, and not of a layer that couldn't be had, of which nothing is to be found out.
const conversionFailed = "failed to convert"

// blame finds the layer that has made a forced export fail. BuildKit's conversion doesn't say which one it was, and has its source's errors
// past the writer; nor does it say whose conversion it was that two exports have shared. So what has been fetched and isn't converted is
// converted again, into nothing, by who is going to fail anyway.
func blame(ctx context.Context, cs content.Store, ref cache.ImmutableRef, cfg cacheconfig.RefConfig, s session.Group, failed error) error {
	if ctx.Err() != nil || !strings.Contains(failed.Error(), conversionFailed) || errors.Is(failed, syscall.ENOSPC) || errors.Is(failed, syscall.EDQUOT) {
		return failed
	}
	plain := cfg
	plain.Compression.Force = false
	chain := ref.LayerChain()
	defer func() { _ = chain.Release(context.WithoutCancel(ctx)) }()
	for _, r := range chain {
		remotes, err := r.GetRemotes(ctx, false, plain, false, s)
		if err != nil || len(remotes) == 0 || len(remotes[0].Descriptors) == 0 {
			continue // it has no blob yet
		}
		descs := remotes[0].Descriptors
		desc := descs[len(descs)-1]
		if _, err := cs.Info(ctx, desc.Digest); err != nil {
			continue
		}
		needs, err := cfg.Compression.Type.NeedsConversion(ctx, cs, desc)
		if err != nil {
			return failed // which is this one, and names the layer
		}
		if !needs {
			continue
		}
		if err := tryLayer(ctx, cs, desc, cfg.Compression); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return failed
}

// tryLayer converts a layer into nothing. The error says which layer it is.
func tryLayer(ctx context.Context, cs content.Store, desc ocispecs.Descriptor, comp compression.Config) error {
	from, err := compression.FromMediaType(desc.MediaType)
	if err != nil {
		return convertible(desc)
	}
	source, err := from.Decompress(ctx, cs, desc)
	if err != nil {
		return damaged(desc, fmt.Errorf("decompress: %w", err))
	}
	defer source.Close()
	compress, _ := comp.Type.Compress(ctx, comp)
	w, err := compress(&iohelper.NopWriteCloser{Writer: io.Discard}, comp.Type.MediaType())
	if err != nil {
		return err
	}
	in := &failingReader{r: source}
	_, err = io.Copy(w, in)
	// Without the rest of its tar a layer isn't written.
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	switch {
	case err == nil:
		return nil
	case in.err != nil:
		return damaged(desc, fmt.Errorf("decompress: %w", in.err))
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, tar.ErrHeader):
		return damaged(desc, err)
	}
	return inconvertible(desc, err)
}

// A failingReader keeps the error of its source, which isn't its end.
type failingReader struct {
	r   io.Reader
	err error
}

// Read implements io.Reader.
func (r *failingReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

func damaged(desc ocispecs.Descriptor, why error) error {
	return fmt.Errorf("layer %s is damaged: %w; make its image anew: without force-compression=true the layer is exported as it is, and fails who unpacks it", desc.Digest, why)
}

func inconvertible(desc ocispecs.Descriptor, why error) error {
	return fmt.Errorf("layer %s can't be converted: %w; without force-compression=true it is exported as it is", desc.Digest, why)
}

// madeOfLabel is how the labels begin that say of which tars an eStargz layer was made: files put in order may make the same of several.
const madeOfLabel = "buildkitd-lazy/made-of."

func madeOf(tar digest.Digest) string { return madeOfLabel + tar.Encoded()[:16] }

// checkDiffIDs refuses layers of which something has been made that the configuration of their image didn't promise: BuildKit would write
// a configuration that agrees with them, and pass a layer for right that nobody could unpack.
func checkDiffIDs(ctx context.Context, cs content.Store, ref cache.ImmutableRef, cfg cacheconfig.RefConfig, s session.Group, remotes []*solver.Remote) error {
	if len(remotes) == 0 {
		return nil
	}
	cfg.Compression.Force = false
	before, err := ref.GetRemotes(ctx, false, cfg, false, s)
	if err != nil || len(before) == 0 || len(before[0].Descriptors) != len(remotes[0].Descriptors) {
		return err
	}
	for i, desc := range before[0].Descriptors {
		now := remotes[0].Descriptors[i]
		want, promised := desc.Annotations[labels.LabelUncompressed]
		if now.Digest == desc.Digest || !promised || unpacksOtherwise(ctx, cs, desc) {
			continue
		}
		if _, err := cs.Info(ctx, desc.Digest); cerrdefs.IsNotFound(err) {
			continue // it was converted while it arrived, and verified: see tarReader
		}
		tars, err := tarsOf(ctx, cs, now, cfg.Compression.Type)
		if err != nil {
			return err
		}
		if len(tars) > 0 && !slices.Contains(tars, want) {
			return damaged(desc, fmt.Errorf("its DiffID is %s, and not %s as the configuration of its image says", tars[0], want))
		}
	}
	return nil
}

// unpacksOtherwise reports whether BuildKit makes another tar of a layer than it holds: it leaves out eStargz's table of contents.
func unpacksOtherwise(ctx context.Context, cs content.Store, desc ocispecs.Descriptor) bool {
	info, err := cs.Info(ctx, desc.Digest)
	return desc.Annotations[stargz.TOCJSONDigestAnnotation] != "" || err == nil && info.Labels[isEStargzLabel] == "true"
}

// tarsOf returns the digests of the tars that a layer was made of; none of one that was written before that was kept.
func tarsOf(ctx context.Context, cs content.Store, desc ocispecs.Descriptor, t compression.Type) (tars []string, err error) {
	if _, ok := t.(*zstdChunked); ok {
		return []string{desc.Annotations[labels.LabelUncompressed]}, nil
	}
	info, err := cs.Info(ctx, desc.Digest)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	for _, l := range slices.Sorted(maps.Keys(info.Labels)) {
		if strings.HasPrefix(l, madeOfLabel) {
			tars = append(tars, info.Labels[l])
		}
	}
	return tars, nil
}
