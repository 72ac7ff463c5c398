package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// A course is where builds are measured: a registry behind a link.
type course struct {
	link    *link.Link
	reg     *registry.Registry
	config  string        // of daemons, for the registry
	work    string        // directory for what lives as long as a measurement
	timeout time.Duration // of one build
	lock    string        // file to lock while measuring, if not empty
}

// measure builds the workload cold, then each phase, and returns the samples by phase, the cold
// build's under "". A build that fails is a sample with an error, and ends the sequence; an error means that
// the bench cannot go on.
func (c *course) measure(ctx context.Context, who contestant, w workload, ref string, blobs []string, phases []string) (_ map[string]sample, err error) {
	unlock, err := exclusive(ctx, c.lock)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()

	dir, err := os.MkdirTemp(c.work, "m")
	if err != nil {
		return nil, err
	}
	defer cleanup.Add(func() {
		if e := os.RemoveAll(dir); e != nil {
			err = errors.Join(err, fmt.Errorf("remove what %s has left: %w", who.name, e))
		}
	})()
	ctxDir := filepath.Join(dir, "context")
	if err := w.write(ctxDir, ref); err != nil {
		return nil, err
	}
	root := filepath.Join(dir, "state")
	if err := os.Mkdir(root, 0o711); err != nil {
		return nil, err
	}
	opt := daemon.Options{Kind: who.kind, Root: root, Link: c.link, Config: c.config}
	d, err := daemon.Start(ctx, opt)
	if err != nil {
		return nil, err
	}
	// Stock may not end in time or may leave mounts: worth a line, and not the end of the bench.
	stop := func() {
		if err := d.Close(); err != nil {
			fmt.Fprintf(os.Stderr, "bench: stop %s: %v\n", who.name, err)
		}
	}
	defer func() { stop() }()
	if err := dropPageCache(); err != nil {
		return nil, err
	}
	// The registry is another machine's: its disk is not what is measured.
	if err := readAll(blobs); err != nil {
		return nil, err
	}

	samples := map[string]sample{}
	c.link.ResetCounts()
	for _, phase := range append([]string{""}, phases...) {
		if phase == local {
			if err := dropPageCache(); err != nil {
				return nil, err
			}
		}
		if phase == restart {
			stop()
			c.link.ResetCounts() // what the daemon asks for while it starts counts too
			if d, err = daemon.Start(ctx, opt); err != nil {
				stop = func() {}
				if ctx.Err() != nil {
					return nil, context.Cause(ctx)
				}
				samples[phase] = sample{Error: err.Error()}
				return samples, nil
			}
		} else {
			c.link.ResetCounts()
		}
		s, err := c.build(ctx, d, w, client.Solve{Context: ctxDir, NoCache: phase == local}, filepath.Join(dir, "out"))
		if err != nil {
			return nil, err
		}
		samples[phase] = s
		if s.Error != "" {
			break
		}
	}
	return samples, nil
}

// build builds once, and puts the result in out.
func (c *course) build(ctx context.Context, d *daemon.Daemon, w workload, what client.Solve, out string) (sample, error) {
	if err := os.RemoveAll(out); err != nil {
		return sample{}, err
	}
	what.Outputs = []string{"type=local,dest=" + out}
	s := sample{Load: load()}
	bctx, cancel := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("not done after %v", c.timeout))
	defer cancel()
	res, err := client.Buildctl{Addr: d.Addr}.Build(bctx, what)
	counts := c.link.Counts()
	switch {
	case ctx.Err() != nil:
		return s, context.Cause(ctx)
	case bctx.Err() != nil:
		s.Error = context.Cause(bctx).Error()
	case err != nil:
		return s, err
	case res.Err != "":
		s.Error = lastLine(res.Err)
	}
	if s.Error != "" {
		if res != nil {
			s.Output = lastLines(res.Output(), 20)
		}
		s.Log = lastLines(d.Logs(), 20)
		return s, nil
	}
	s.Total = res.Total.Seconds()
	s.Bytes, s.Requests, s.Outstanding = counts.Bytes, counts.Requests, counts.Outstanding
	if v := res.Vertex("] RUN"); v != nil && !v.Cached && v.Completed != nil {
		if first, ok := res.Said(started); ok {
			s.FirstRUN = new(first.Seconds())
			s.RUN = new(v.Completed.Sub(res.Start.Add(first)).Seconds())
		}
	}
	for _, v := range res.Vertices {
		for _, id := range v.StatusIDs() {
			if strings.HasPrefix(id, "lazy ") || strings.HasPrefix(id, "pulling layer ") {
				s.Lazy = append(s.Lazy, id)
			}
		}
	}
	if s.Result, err = w.verify(ctx, out); err != nil {
		s.Error = err.Error()
	}
	return s, nil
}

// exclusive locks the file until the returned function is called. An empty path locks nothing.
func exclusive(ctx context.Context, path string) (unlock func() error, err error) {
	if path == "" {
		return func() error { return nil }, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	locked := make(chan error, 1)
	go func() {
		for {
			if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
				locked <- err
				return
			}
		}
	}()
	select {
	case err = <-locked:
	case <-ctx.Done():
		// Nothing interrupts the wait: it ends with the process, and so does the lock.
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f.Close, nil
}

func dropPageCache() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache, so that builds start cold: %w", err)
	}
	return nil
}

// readAll brings files into the page cache.
func readAll(paths []string) error {
	buf := make([]byte, 1<<20)
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			return fmt.Errorf("read the registry's blobs: %w", err)
		}
		// A read, not a copy to nowhere: that could be done without reading.
		for err == nil {
			_, err = f.Read(buf)
		}
		f.Close()
	}
	return nil
}

// load returns the load average of the last minute, 0 where there is none to read.
func load() float64 {
	raw, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	var v float64
	if _, err := fmt.Fscan(bytes.NewReader(raw), &v); err != nil {
		return 0
	}
	return v
}

// lastLine is where buildctl says what went wrong.
func lastLine(s string) string { return lastLines(s, 1) }

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
