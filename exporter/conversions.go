package exporter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/converter"
	"github.com/moby/buildkit/util/flightcontrol"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/progress/logs"
	"github.com/moby/buildkit/util/resolver/retryhandler"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Conversions are what forced exports make of lazy layers.
//
// BuildKit puts the blob of such a layer into the content store, and converts it there. Here its tar goes from where it is into the writer, and of
// the blob nothing is kept. As far as the layer's format allows it, the tar is made of what steps have read, and of the blob only the rest is fetched.
// BuildKit then finds that these layers need no conversion, and what they have become is put in their place: its own records of what a blob has
// become hang on the blob, which isn't there.
//
// What a layer has become is noted in BuildKit's record of it, and held by the lease in which BuildKit holds such blobs: it goes with the record. Who
// wants the same at the same time, of whichever record, waits for the one that makes it.
type Conversions struct {
	// Content is where converted layers are written.
	Content content.Store
	// Leases hold them.
	Leases leases.Manager
	// Layers are the lazy ones.
	Layers LazyLayers

	flights flightcontrol.Group[*made]

	mu sync.Mutex // of what records have noted
}

// LazyLayers are layers whose blobs aren't in the content store.
type LazyLayers interface {
	// Convert reads a blob from where it is, once, from the start to the end, and keeps nothing of it. One that is in the content store, or of
	// which nobody knows where it is, is ErrNotFound of containerd's.
	Convert(ctx context.Context, desc ocispecs.Descriptor, g session.Group) (content.ReaderAt, error)
	// Tar returns the tar of a layer, made of what has arrived of it, and unverified; and, of eStargz, the gzip'ed table of contents behind it, as
	// the DiffID is of both. It is ErrNotFound where nothing would be gained by that.
	Tar(ctx context.Context, desc ocispecs.Descriptor, g session.Group) (tar io.ReadCloser, toc []byte, err error)
}

// made is a layer that was converted, and the lease in which it was made.
type made struct {
	desc  ocispecs.Descriptor
	lease *leaseutil.LeaseRef
}

// noteKey is where BuildKit's record of a layer has what that has become: a descriptor for each way to write it.
const noteKey = "buildkitd-lazy.converted.v1"

// of returns a ref whose lazy layers are converted here. Without Conversions they are BuildKit's to convert.
func (c *Conversions) of(ref cache.ImmutableRef) cache.ImmutableRef {
	if c == nil {
		return ref
	}
	return &streamedRef{ref, c}
}

type streamedRef struct {
	cache.ImmutableRef
	conversions *Conversions
}

// GetRemotes implements cache.ImmutableRef.
func (r *streamedRef) GetRemotes(ctx context.Context, createIfNeeded bool, cfg cacheconfig.RefConfig, all bool, g session.Group) (_ []*solver.Remote, err error) {
	if !cfg.Compression.Force {
		return r.ImmutableRef.GetRemotes(ctx, createIfNeeded, cfg, all, g)
	}
	ctx, release, err := leaseutil.WithLease(ctx, r.conversions.Leases, leaseutil.MakeTemporary)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()
	become, err := r.conversions.convert(ctx, r.ImmutableRef, createIfNeeded, cfg, g)
	if err != nil {
		return nil, err
	}
	if len(become) > 0 {
		cfg.Compression.Type = &sparing{cfg.Compression.Type, become}
	}
	remotes, err := r.ImmutableRef.GetRemotes(ctx, createIfNeeded, cfg, all, g)
	if err != nil || len(become) == 0 {
		return remotes, err
	}
	for i, remote := range remotes {
		remotes[i] = r.conversions.replace(remote, become)
	}
	return remotes, nil
}

// convert converts the lazy layers of a ref, and returns what becomes of them by the digests of their blobs. A layer that is what it's to be stays
// that.
func (c *Conversions) convert(ctx context.Context, ref cache.ImmutableRef, createIfNeeded bool, cfg cacheconfig.RefConfig, g session.Group) (_ map[digest.Digest]ocispecs.Descriptor, err error) {
	plain := cfg
	plain.Compression.Force = false
	remotes, err := ref.GetRemotes(ctx, createIfNeeded, plain, false, g)
	if err != nil || len(remotes) == 0 {
		return nil, err
	}
	descs, chain := remotes[0].Descriptors, ref.LayerChain()
	defer func() { err = errors.Join(err, chain.Release(context.WithoutCancel(ctx))) }()
	if len(chain) != len(descs) {
		return nil, nil
	}
	var mu sync.Mutex
	become := map[digest.Digest]ocispecs.Descriptor{}
	eg, ctx := errgroup.WithContext(ctx)
	for i, desc := range descs {
		eg.Go(func() error {
			now, err := c.layer(ctx, chain[i], desc, cfg.Compression, g)
			if cerrdefs.IsNotFound(err) {
				return nil
			} else if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			become[desc.Digest] = now
			return nil
		})
	}
	return become, eg.Wait()
}

// layer returns what becomes of a layer, as its record has noted or it is converted to now. ErrNotFound means that it's BuildKit's to convert.
func (c *Conversions) layer(ctx context.Context, record cache.RefMetadata, desc ocispecs.Descriptor, comp compression.Config, g session.Group) (ocispecs.Descriptor, error) {
	needs, err := comp.Type.NeedsConversion(ctx, c.Content, desc)
	if err != nil {
		return desc, err
	}
	if !needs {
		if _, err := c.Content.Info(ctx, desc.Digest); !cerrdefs.IsNotFound(err) {
			return desc, errors.Join(err, cerrdefs.ErrNotFound)
		}
		// BuildKit asks again for what is below, without the annotations that say so: a build that finds its steps cached has them of its topmost
		// ref only.
		return desc, nil
	}
	key := writtenBy(comp)
	if known, ok := c.noted(ctx, record, key); ok {
		return known, nil
	}
	m, err := c.flights.Do(ctx, desc.Digest.String()+" "+key, func(ctx context.Context) (_ *made, err error) {
		lease, ctx, err := leaseutil.NewLease(ctx, c.Leases, leaseutil.MakeTemporary)
		if err != nil {
			return nil, err
		}
		m := &made{lease: lease}
		// Bytes that are wrong are fetched once more, from elsewhere if possible.
		again := retryhandler.New(func(ctx context.Context, desc ocispecs.Descriptor) ([]ocispecs.Descriptor, error) {
			now, err := c.stream(ctx, desc, comp, g)
			if err == nil {
				m.desc = *now
			}
			return nil, err
		}, logs.LoggerFromContext(ctx))
		if _, err := again(ctx, desc); err != nil {
			return nil, errors.Join(err, lease.Discard(ctx))
		}
		return m, nil
	})
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	if err := m.lease.Adopt(ctx); err != nil {
		return ocispecs.Descriptor{}, fmt.Errorf("hold layer %s, made of %s: %w", m.desc.Digest, desc.Digest, err)
	}
	return m.desc, c.note(ctx, record, key, m.desc)
}

// stream converts a layer, out of what has arrived of it or else while its blob does.
func (c *Conversions) stream(ctx context.Context, desc ocispecs.Descriptor, comp compression.Config, g session.Group) (*ocispecs.Descriptor, error) {
	present, toc, err := c.Layers.Tar(ctx, desc, g)
	if err == nil {
		var now *ocispecs.Descriptor
		now, err = c.write(ctx, presentTar(present, toc, desc), desc, comp)
		if err == nil || ctx.Err() != nil || hopeless(err) {
			return now, err
		}
	}
	if !cerrdefs.IsNotFound(err) {
		bklog.G(ctx).WithError(err).WithField("layer", desc.Digest).Warn("what has arrived of a layer is of no use to convert it; all of it is read")
	}
	blob, err := c.Layers.Convert(ctx, desc, g)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	tar, err := openTar(blob, desc)
	if err != nil {
		return nil, err
	}
	return c.write(ctx, tar, desc, comp)
}

// write makes a layer of the tar of another, and closes that.
func (c *Conversions) write(ctx context.Context, tar *tarReader, desc ocispecs.Descriptor, comp compression.Config) (*ocispecs.Descriptor, error) {
	defer tar.Close()
	convert, err := converter.New(ctx, c.Content, desc, comp)
	if err != nil || convert == nil {
		return nil, fmt.Errorf("layer %s needs no conversion any more: %w", desc.Digest, errors.Join(err, cerrdefs.ErrNotFound))
	}
	store := &tarStore{Store: c.Content, blob: desc.Digest, tar: tar}
	// The media type speaks of the blob: BuildKit looks at the first bytes to find out whether there is anything to decompress.
	now, err := convert(ctx, store, desc)
	if err != nil {
		return nil, errors.Join(tar.explain(ctx, err), store.abort(ctx))
	}
	now.URLs = nil // those of the blob that it was made of
	return now, nil
}

// replace puts what layers become in their place.
func (c *Conversions) replace(remote *solver.Remote, become map[digest.Digest]ocispecs.Descriptor) *solver.Remote {
	from := contentutil.NewMultiProvider(remote.Provider)
	p := &partlyConverted{MultiProvider: from}
	descs := slices.Clone(remote.Descriptors)
	for i, desc := range descs {
		now, ok := become[desc.Digest]
		if !ok || now.Digest == desc.Digest {
			p.others = append(p.others, desc)
			continue
		}
		now.Annotations = maps.Clone(now.Annotations)
		descs[i] = now
		from.Add(now.Digest, c.Content)
	}
	return &solver.Remote{Descriptors: descs, Provider: p}
}

// partlyConverted provides the layers of a remote some of which were converted.
type partlyConverted struct {
	*contentutil.MultiProvider
	others []ocispecs.Descriptor
}

var _ cache.Unlazier = (*partlyConverted)(nil)

// Unlazy implements cache.Unlazier: only the layers that stay what they are must be fetched.
func (p *partlyConverted) Unlazy(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	for _, desc := range p.others {
		eg.Go(func() error {
			r, err := p.ReaderAt(ctx, desc)
			if err != nil {
				return err
			}
			return r.Close()
		})
	}
	return eg.Wait()
}

// noted returns what a record says that its layer has become, if that is still there.
func (c *Conversions) noted(ctx context.Context, record cache.RefMetadata, key string) (ocispecs.Descriptor, bool) {
	c.mu.Lock()
	desc, ok := notesOf(record)[key]
	c.mu.Unlock()
	if !ok {
		return desc, false
	}
	_, err := c.Content.Info(ctx, desc.Digest)
	return desc, err == nil
}

// note notes what the layer of a record has become, and holds that as long as the record.
func (c *Conversions) note(ctx context.Context, record cache.RefMetadata, key string, now ocispecs.Descriptor) error {
	lease := leases.Lease{ID: record.ID() + "-variants"} // as BuildKit calls it, and removes it with the record
	if _, err := c.Leases.Create(ctx, leases.WithID(lease.ID)); err != nil && !cerrdefs.IsAlreadyExists(err) {
		return fmt.Errorf("hold layer %s: %w", now.Digest, err)
	}
	if err := c.Leases.AddResource(ctx, lease, leases.Resource{ID: now.Digest.String(), Type: "content"}); err != nil {
		return fmt.Errorf("hold layer %s: %w", now.Digest, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	notes := notesOf(record)
	if notes == nil {
		notes = map[string]ocispecs.Descriptor{}
	}
	notes[key] = now
	dt, err := json.Marshal(notes)
	if err != nil {
		return err
	}
	if err := record.SetExternal(noteKey, dt); err != nil {
		return fmt.Errorf("keep what layer %s was made of: %w", now.Digest, err)
	}
	return nil
}

// ConvertedOf returns what the lazy layer of a record has become.
func ConvertedOf(record cache.RefMetadata) (layers []digest.Digest) {
	for _, desc := range notesOf(record) {
		if !slices.Contains(layers, desc.Digest) {
			layers = append(layers, desc.Digest)
		}
	}
	return layers
}

// notesOf returns what the layer of a record has become, by what has written it.
func notesOf(record cache.RefMetadata) (notes map[string]ocispecs.Descriptor) {
	if dt, err := record.GetExternal(noteKey); err == nil && json.Unmarshal(dt, &notes) != nil {
		return nil // it's made again
	}
	return notes
}

// sparing is a compression type for which some layers need no conversion.
type sparing struct {
	compression.Type
	spared map[digest.Digest]ocispecs.Descriptor
}

// String implements compression.Type. BuildKit takes two conversions of a layer for one if the types have the same name.
func (s *sparing) String() string {
	all := digest.Canonical.Digester()
	for _, d := range slices.Sorted(maps.Keys(s.spared)) {
		fmt.Fprintln(all.Hash(), d)
	}
	return s.Type.String() + " without " + all.Digest().Encoded()[:16]
}

// NeedsConversion implements compression.Type.
func (s *sparing) NeedsConversion(ctx context.Context, cs content.Store, desc ocispecs.Descriptor) (bool, error) {
	if _, ok := s.spared[desc.Digest]; ok {
		return false, nil
	}
	return s.Type.NeedsConversion(ctx, cs, desc)
}
