package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	cacheimport "github.com/moby/buildkit/cache/remotecache/v1"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/cachedigest"
	"github.com/moby/buildkit/util/cachestore"
	"github.com/opencontainers/go-digest"
)

// digestOfSlash is the digest of the string "/", the selector of a whole tree. It is never stored.
const digestOfSlash digest.Digest = "sha256:8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1"

// cacheKey is a key of the build cache with what its digests were made of, as far as --save-cache-debug recorded it.
type cacheKey struct {
	*cachestore.Record

	Debug []*cachedigest.Record `json:"debug,omitempty"`
}

func (d *debugServer) handleCache(m *http.ServeMux) {
	m.HandleFunc("/debug/cache/all", func(w http.ResponseWriter, r *http.Request) {
		records, err := allDigests(r.Context())
		reply(w, r, records, err, func(out io.Writer) {
			for _, rec := range records {
				printDigest(out, rec)
				fmt.Fprintln(out)
			}
		})
	})
	m.HandleFunc("/debug/cache/lookup", func(w http.ResponseWriter, r *http.Request) {
		dgst, err := digest.Parse(r.URL.Query().Get("digest"))
		if err != nil {
			http.Error(w, fmt.Sprintf("parameter digest: %v", err), http.StatusBadRequest)
			return
		}
		record, err := lookupDigest(r.Context(), dgst)
		reply(w, r, record, err, func(out io.Writer) { printDigest(out, record) })
	})
	m.HandleFunc("GET /debug/cache/store", func(w http.ResponseWriter, r *http.Request) {
		store := d.cache.Load()
		if store == nil {
			http.Error(w, "the build cache is not open yet", http.StatusServiceUnavailable)
			return
		}
		keys, err := cacheKeys(r.Context(), *store)
		reply(w, r, keys, err, func(out io.Writer) { printKeys(out, keys) })
	})
	m.HandleFunc("POST /debug/cache/load", func(w http.ResponseWriter, r *http.Request) {
		keys, err := importedKeys(r.Context(), r.Body)
		reply(w, r, keys, err, func(out io.Writer) { printKeys(out, keys) })
	})
}

// reply answers with v as JSON where that is asked for, and as text otherwise.
func reply(w http.ResponseWriter, r *http.Request, v any, err error, text func(io.Writer)) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if r.Header.Get("Accept") != "application/json" {
		w.Header().Set("Content-Type", "text/plain")
		text(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		bklog.G(r.Context()).WithError(err).Debug("client went away from the debug endpoint")
	}
}

func allDigests(ctx context.Context) ([]*cachedigest.Record, error) {
	var records []*cachedigest.Record
	byDigest := map[digest.Digest]*cachedigest.Record{}
	err := cachedigest.GetDefaultDB().All(ctx, func(key string, typ cachedigest.Type, frames []cachedigest.Frame) error {
		dgst, err := digest.Parse(key)
		if err != nil {
			return fmt.Errorf("cache debug database: key %q: %w", key, err)
		}
		r := &cachedigest.Record{Digest: dgst, Type: typ, Data: frames}
		records = append(records, r)
		byDigest[dgst] = r
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if err := r.LoadSubRecords(func(d digest.Digest) (cachedigest.Type, []cachedigest.Frame, error) {
			sub, ok := byDigest[d]
			if !ok {
				return "", nil, fmt.Errorf("%s is not recorded", d)
			}
			return sub.Type, sub.Data, nil
		}); err != nil {
			return nil, fmt.Errorf("parts of %s: %w", r.Digest, err)
		}
	}
	return records, nil
}

func lookupDigest(ctx context.Context, dgst digest.Digest) (*cachedigest.Record, error) {
	if dgst == digestOfSlash {
		return &cachedigest.Record{
			Digest: dgst,
			Type:   cachedigest.TypeString,
			Data:   []cachedigest.Frame{{ID: cachedigest.FrameIDData, Data: []byte("/")}},
		}, nil
	}
	get := func(d digest.Digest) (cachedigest.Type, []cachedigest.Frame, error) {
		typ, frames, err := cachedigest.GetDefaultDB().Get(ctx, d.String())
		if err != nil {
			return "", nil, fmt.Errorf("look up %s: %w", d, err)
		}
		return typ, frames, nil
	}
	typ, frames, err := get(dgst)
	if err != nil {
		return nil, err
	}
	r := &cachedigest.Record{Digest: dgst, Type: typ, Data: frames}
	if err := r.LoadSubRecords(get); err != nil {
		return nil, fmt.Errorf("parts of %s: %w", dgst, err)
	}
	return r, nil
}

// importedKeys reads a cache manifest as a client would import it.
func importedKeys(ctx context.Context, r io.Reader) ([]*cacheKey, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read request: %w", err)
	}
	chains := cacheimport.NewCacheChains()
	if err := cacheimport.Parse(data, cacheimport.DescriptorProvider{}, chains); err != nil {
		return nil, fmt.Errorf("parse cache manifest: %w", err)
	}
	keys, _, err := cacheimport.NewCacheKeyStorage(chains, nil)
	if err != nil {
		return nil, err
	}
	return cacheKeys(ctx, keys)
}

func cacheKeys(ctx context.Context, store solver.CacheKeyStorage) ([]*cacheKey, error) {
	records, err := cachestore.Records(ctx, store)
	if err != nil {
		return nil, fmt.Errorf("read build cache: %w", err)
	}
	keys := make([]*cacheKey, 0, len(records))
	for _, rec := range records {
		digests := map[digest.Digest]bool{rec.Digest: true}
		for _, link := range rec.Parents {
			digests[link.Digest] = true
			digests[link.Selector] = true
		}
		delete(digests, "")
		key := &cacheKey{Record: rec}
		for _, dgst := range slices.Sorted(maps.Keys(digests)) {
			made, err := lookupDigest(ctx, dgst)
			if errors.Is(err, cachedigest.ErrNotFound) {
				continue // not recorded, as most are without --save-cache-debug
			}
			if err != nil {
				bklog.G(ctx).WithError(err).WithField("digest", dgst).Error("cache debug database cannot be read")
				continue
			}
			key.Debug = append(key.Debug, made)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

func printDigest(w io.Writer, r *cachedigest.Record) {
	fmt.Fprintf(w, "%s (%s):\n", r.Digest, r.Type)
	for _, sub := range r.SubRecords {
		fmt.Fprintf(w, "  %s (%s):\n", sub.Digest, sub.Type)
	}
	for _, frame := range r.Data {
		switch frame.ID {
		case cachedigest.FrameIDData:
			fmt.Fprintf(w, "  %s: %s\n", frame.ID, frame.Data)
		case cachedigest.FrameIDSkip:
			fmt.Fprintf(w, "  skipping %d bytes\n", binary.LittleEndian.Uint32(frame.Data))
		}
	}
	for _, sub := range r.SubRecords {
		fmt.Fprintln(w)
		printDigest(w, sub)
	}
}

func printKeys(w io.Writer, keys []*cacheKey) {
	for _, key := range keys {
		random := ""
		if key.Random {
			random = " (random)"
		}
		fmt.Fprintf(w, "ID: %d%s\n", key.ID, random)
		if key.Digest != "" {
			fmt.Fprintf(w, "Digest: %s\n", key.Digest)
		}
		if len(key.Parents) > 0 {
			fmt.Fprintln(w, "Parents:")
			for _, p := range slices.SortedStableFunc(slices.Values(key.Parents), func(a, b cachestore.Link) int {
				return cmp.Or(cmp.Compare(a.Input, b.Input), cmp.Compare(a.Digest, b.Digest))
			}) {
				fmt.Fprintf(w, "  Input %d:\t%d\t%s\n", p.Input, p.Record.ID, p.Digest)
				if p.Selector != "" {
					fmt.Fprintf(w, "    Selector: %s\n", p.Selector)
				}
			}
		}
		if len(key.Children) > 0 {
			fmt.Fprintln(w, "Children:")
			for input := range key.Children {
				var ids []string
				for id := range key.ChildIDs[input] {
					ids = append(ids, fmt.Sprint(id))
				}
				slices.Sort(ids)
				fmt.Fprintf(w, "  Input %d:\t %s\n", input, strings.Join(ids, ", "))
			}
		}
		if len(key.Debug) > 0 {
			fmt.Fprintln(w, "Plaintexts:")
			for _, made := range key.Debug {
				printDigest(w, made)
				fmt.Fprintln(w)
			}
		}
		fmt.Fprintln(w)
	}
}
