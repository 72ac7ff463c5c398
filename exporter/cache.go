package exporter

import (
	"context"
	"maps"

	"github.com/moby/buildkit/cache/remotecache"
	"github.com/moby/buildkit/session"
)

// Cache makes an exporter of caches write lazy layers, as New does with one of images. The name is that of its type. The worker that has
// the layers must get them by [GetRemotes].
func Cache(name string, resolve remotecache.ResolveCacheExporterFunc, lists *Lists) remotecache.ResolveCacheExporterFunc {
	resolve = reading(aCache, resolve)
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Exporter, error) {
		attrs = maps.Clone(attrs)
		if err := checkCache(name, attrs); err != nil {
			return nil, err
		}
		e, err := resolve(ctx, g, attrs)
		if err != nil || !isEStargz(attrs) {
			return e, err
		}
		opt, err := writeOptions(attrs)
		if err != nil {
			return nil, err
		}
		c := &cacheExporter{e, newEStargz(opt)}
		if list, given := attrs[keyPrioritize]; given {
			if c.estargz.order, err = lists.read(ctx, g, list); err != nil {
				return nil, err
			}
		}
		return c, nil
	}
}

type cacheExporter struct {
	remotecache.Exporter
	estargz *eStargz
}

// Config implements remotecache.Exporter.
func (c *cacheExporter) Config() remotecache.Config {
	cfg := c.Exporter.Config()
	cfg.Compression = c.estargz.replace(cfg.Compression)
	return cfg
}
