package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync"

	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/util/bklog"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// originKey is where BuildKit's record of a layer keeps its origin: it goes with the record.
const originKey = "buildkitd-lazy.origin.v1"

// origin is where a layer's blob comes from: all that is needed to load its record when nothing in the present build
// says so, as after a restart.
type origin struct {
	Ref         string              `json:"ref"`
	Desc        ocispecs.Descriptor `json:"desc"`
	Annotations map[string]string   `json:"annotations,omitempty"` // of the handler
	Labels      map[string]string   `json:"labels,omitempty"`      // of the snapshot
	Pushed      []string            `json:"pushed,omitempty"`      // repositories that have it as well, oldest first
}

// origins are the origins of the blobs that BuildKit has records of.
type origins struct {
	mu     sync.Mutex
	byBlob map[digest.Digest]origin
}

func (o *origins) add(from origin) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byBlob == nil {
		o.byBlob = map[digest.Digest]origin{}
	}
	o.byBlob[from.Desc.Digest] = from
}

func (o *origins) get(blob digest.Digest) (origin, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	from, ok := o.byBlob[blob]
	return from, ok
}

// load reads the origins of all records.
func (o *origins) load(records *metadata.Store) error {
	items, err := records.All()
	if err != nil {
		return fmt.Errorf("read where lazy layers come from: %w", err)
	}
	for _, item := range items {
		// Records of other things have none.
		if dt, err := item.GetExternal(originKey); err == nil {
			var from origin
			if err := json.Unmarshal(dt, &from); err != nil || from.Desc.Digest.Validate() != nil {
				bklog.L.WithField("record", item.ID()).WithError(err).Warn("origin of a lazy layer is unreadable")
				continue
			}
			o.add(from)
		}
	}
	return nil
}

// rememberImage keeps the origins of an image's layers with their records.
func (s *Snapshotter) rememberImage(ctx context.Context, p *plan, ref cache.ImmutableRef) (err error) {
	chain := ref.LayerChain()
	defer func() { err = errors.Join(err, chain.Release(context.WithoutCancel(ctx))) }()
	if len(chain) != len(p.layers) {
		return nil // not one record per layer
	}
	return s.remember(p.layers, chain)
}

// remember keeps the origins of layers with their records.
func (s *Snapshotter) remember(layers []layer, records cache.RefList) error {
	for i, record := range records {
		l := &layers[i]
		if l.handler == nil {
			continue
		}
		from := origin{Ref: l.handler.Ref, Desc: l.desc, Annotations: l.handler.Annotations, Labels: maps.Clone(l.handler.SnapshotLabels)}
		delete(from.Labels, labelPlan)
		from.Pushed = s.Repositories(l.desc.Digest)
		dt, err := json.Marshal(from)
		if err != nil {
			return err
		}
		if had, err := record.GetExternal(originKey); err != nil || !bytes.Equal(had, dt) {
			if err := record.SetExternal(originKey, dt); err != nil {
				return fmt.Errorf("keep where layer %s comes from: %w", l.desc.Digest, err)
			}
		}
		s.origins.add(from)
	}
	return nil
}

// handler makes the handler of a blob whose image nothing in this daemon's life has resolved.
func (from origin) handler(opt SnapshotterOptions) *cache.DescHandler {
	l := &layer{desc: from.Desc}
	h := &cache.DescHandler{Ref: from.Ref, Annotations: from.Annotations, SnapshotLabels: from.Labels}
	h.Provider = l.provider(opt.Registry(from.Ref), opt.Reporter)
	return h
}

// Restore reads where the layers come from that an earlier daemon has left records of. Until the returned function is
// called, which tells the reporter of those that are mounted, BuildKit's cache manager is told that these layers are
// local: it would otherwise take the want of handlers for a loss when it opens its records, and drop those and all
// that was built on them.
func (s *Snapshotter) Restore(ctx context.Context, records *metadata.Store) (done func() error, err error) {
	if err := s.origins.load(records); err != nil {
		return nil, err
	}
	s.restoring.Store(true)
	return func() error {
		s.restoring.Store(false)
		items, err := records.All()
		if err != nil {
			return err
		}
		for _, item := range items {
			if dgst := digest.Digest(stringOf(item, "cache.blob")); dgst != "" {
				info, err := s.Snapshotter.Stat(ctx, stringOf(item, "cache.snapshot"))
				if _, lazy := info.Labels[labelRemote]; err == nil && lazy {
					s.opt.Reporter.Opened(dgst, snapshot.Format(info.Labels))
				}
			}
		}
		return nil
	}, nil
}

// stringOf returns a value of a record, "" if there is none.
func stringOf(item *metadata.StorageItem, key string) string {
	var s string
	if v := item.Get(key); v != nil && v.Unmarshal(&s) != nil {
		return ""
	}
	return s
}

// Handlers returns how to fetch the blobs, false if that's not known of one. A client is asked for what no registry is known to have: it may be gone.
func (s *Snapshotter) Handlers(blobs []digest.Digest) (cache.DescHandlers, bool) {
	found, clients := s.plans.handlers(blobs)
	for _, blob := range blobs {
		if found[blob] != nil {
			continue
		}
		from, ok := s.origins.get(blob)
		switch {
		case ok && s.opt.Registry != nil:
			found[blob] = from.handler(s.opt)
		case clients[blob] != nil:
			found[blob] = clients[blob]
		default:
			return nil, false
		}
	}
	return found, true
}
