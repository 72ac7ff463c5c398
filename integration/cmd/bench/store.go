package main

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// A store is the registry's directory with the base images in it.
type store struct {
	dir    string
	bases  []base
	images map[string]map[baseimage.Format]image
}

type image struct {
	tag   string
	size  int64    // of its blobs, compressed
	blobs []string // the files that hold them in the registry
}

// openStore makes the base images, each in the formats that contestants take, and pushes them.
func openStore(ctx context.Context, p plan) (_ *store, err error) {
	cache, err := baseimage.CacheDir()
	if err != nil {
		return nil, err
	}
	st := &store{dir: filepath.Join(cache, "registry"), images: map[string]map[baseimage.Format]image{}}
	// Pushed from this side of the link, by a registry that serves the same directory.
	local, err := registry.Start(registry.Options{Dir: st.dir})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, local.Close()) }()
	for _, name := range p.bases {
		if !p.uses(name) {
			continue
		}
		say("base image %s (kept in %s)", name, cache)
		var im baseimage.Image
		if name == "go" {
			im, err = baseimage.Go(ctx, cache)
		} else {
			im, err = baseimage.Debian(ctx, cache, func(step string) { say("  %s", step) })
		}
		if err != nil {
			return nil, err
		}
		facts, err := im.Measure()
		if err != nil {
			return nil, err
		}
		b := base{Name: name, Facts: facts, Bytes: map[baseimage.Format]int64{}}
		st.images[name] = map[baseimage.Format]image{}
		for _, who := range p.contestants {
			f := who.format
			if _, done := b.Bytes[f]; done {
				continue
			}
			built, err := im.Build(ctx, f)
			if err != nil {
				return nil, err
			}
			i := image{tag: name + ":" + string(f)}
			if i.size, err = baseimage.CompressedSize(built); err != nil {
				return nil, err
			}
			if _, err := baseimage.Push(ctx, local, i.tag, built); err != nil {
				return nil, err
			}
			m, err := built.Manifest()
			if err != nil {
				return nil, err
			}
			for _, l := range m.Layers {
				// distribution's layout of its storage directory.
				i.blobs = append(i.blobs, filepath.Join(st.dir, "docker/registry/v2/blobs", l.Digest.Algorithm, l.Digest.Hex[:2], l.Digest.Hex, "data"))
			}
			b.Bytes[f], st.images[name][f] = i.size, i
		}
		st.bases = append(st.bases, b)
	}
	return st, nil
}
