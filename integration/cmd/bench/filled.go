package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
)

// fillable are the workloads that are measured filled: many small reads, all reads, and no reads but of metadata.
var fillable = []string{"go", "readall", "find"}

// fillAll reads every file of an image.
const fillAll = "cd / && tar c $(ls | grep -vxE 'proc|sys|dev') | wc -c"

// A fullCache is a daemon that has all of a base image on the local disk.
type fullCache struct {
	who   contestant
	d     *daemon.Daemon
	image image
	dir   string // of its builds
	debug string // socket of its debug endpoint, of ours
}

// filled measures the fillable workloads on a base image by the contestants that can have all of it on the local disk. Each of these gets
// the image once. Then they build in turns, every build with the page cache dropped and nothing cached.
func (c *course) filled(ctx context.Context, p plan, shape link.Shape, base string, st *store, rep *report) (err error) {
	dir, err := os.MkdirTemp(c.work, "f")
	if err != nil {
		return err
	}
	defer cleanup.Add(func() { err = errors.Join(err, os.RemoveAll(dir)) })()
	var caches []*fullCache
	defer func() {
		for _, f := range caches {
			if e := f.d.Close(); e != nil {
				fmt.Fprintf(os.Stderr, "bench: stop %s: %v\n", f.who.name, e)
			}
		}
	}()
	for _, who := range p.contestants {
		if !who.fills() {
			continue
		}
		img := st.images[base][who.format]
		say("filled, on %s over %s: all of the image for %s", base, shape, who.name)
		f := &fullCache{who: who, image: img, dir: filepath.Join(dir, who.name), debug: filepath.Join(dir, who.name+".debug")}
		if f.d, err = c.openFull(ctx, f); err != nil {
			return fmt.Errorf("%s: %w", who.name, err)
		}
		caches = append(caches, f)
		if err := c.fill(ctx, f); err != nil {
			return fmt.Errorf("fill the cache of %s: %w", who.name, err)
		}
	}
	list := p.fillable(base)
	for n := range p.runs {
		for i, w := range list {
			for _, f := range rotate(caches, i+n) {
				s, err := c.again(ctx, f, w)
				if err != nil {
					return fmt.Errorf("%s: %w", f.who.name, err)
				}
				g := rep.group(shape.String(), base, w.name, filled)
				g.shape = shape
				r := g.row(f.who, f.image.size)
				r.Samples = append(r.Samples, s)
				g.summarize()
				announce(i+1, len(list), n+1, p.runs, g, f.who, s)
				if p.json != "" {
					if err := rep.save(p.json); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// openFull starts the daemon whose cache is to be filled.
func (c *course) openFull(ctx context.Context, f *fullCache) (*daemon.Daemon, error) {
	root := filepath.Join(f.dir, "state")
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, err
	}
	opt := daemon.Options{Kind: f.who.kind, Root: root, Link: c.link, Config: c.config}
	if f.who.kind == daemon.Ours {
		opt.Args = []string{"--debugaddr", "unix://" + f.debug}
	}
	return daemon.Start(ctx, opt)
}

// fill has a step read all of the image. Ours fetches the rest of it behind that build; fill waits until nothing is missing.
func (c *course) fill(ctx context.Context, f *fullCache) (err error) {
	unlock, err := exclusive(ctx, c.lock)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("not done after %v", c.timeout))
	defer cancel()
	res, err := client.Buildctl{Addr: f.d.Addr}.Build(ctx, client.Solve{Dockerfile: "FROM " + c.reg.Ref(f.image.tag) + "\nRUN " + fillAll + "\n"})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	if res.Err != "" {
		return errors.New(lastLine(res.Err))
	}
	if f.who.kind != daemon.Ours {
		return nil
	}
	for {
		missing, err := f.missing(ctx)
		if missing == 0 || err != nil {
			return err
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return fmt.Errorf("%d bytes are missing: %w", missing, context.Cause(ctx))
		}
	}
}

// missing returns how many bytes of the layers of our daemon are not there.
func (f *fullCache) missing(ctx context.Context) (int64, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", f.debug)
	}
	one := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://debug/debug/lazy?format=json", nil)
	if err != nil {
		return 0, err
	}
	resp, err := one.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	return missingOf(json.NewDecoder(resp.Body))
}

// missingOf sums up what a page /debug/lazy says to be missing.
func missingOf(page *json.Decoder) (int64, error) {
	var lazy struct {
		Layers []struct {
			Open          bool
			Filled, Total int64
		}
	}
	if err := page.Decode(&lazy); err != nil {
		return 0, fmt.Errorf("/debug/lazy: %w", err)
	}
	if len(lazy.Layers) == 0 {
		return 0, errors.New("/debug/lazy: no layer is lazy")
	}
	var missing int64
	for _, l := range lazy.Layers {
		if !l.Open {
			return 0, errors.New("/debug/lazy: a layer is not open")
		}
		missing += l.Total - l.Filled
	}
	return missing, nil
}

// again builds a workload with everything on the local disk, and nothing in memory.
func (c *course) again(ctx context.Context, f *fullCache, w workload) (_ sample, err error) {
	unlock, err := exclusive(ctx, c.lock)
	if err != nil {
		return sample{}, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	dir := filepath.Join(f.dir, w.name)
	if err := w.write(dir, c.reg.Ref(f.image.tag)); err != nil {
		return sample{}, err
	}
	if err := dropPageCache(); err != nil {
		return sample{}, err
	}
	c.link.ResetCounts()
	return c.build(ctx, f.d, w, client.Solve{Context: dir, NoCache: true}, filepath.Join(f.dir, "out"))
}
