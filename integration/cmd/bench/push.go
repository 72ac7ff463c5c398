package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// change measures what goes over the network when a new daemon builds a one-line change on top of the lazy Debian image, exports it as eStargz and
// pushes it: to the registry of the image, where nothing of it is new, and to another one, which has to get it.
func change(ctx context.Context, p plan, work string, to io.Writer) (err error) {
	_, built, err := debianAs(ctx, baseimage.EStargz)
	if err != nil {
		return err
	}
	size, err := baseimage.CompressedSize(built)
	if err != nil {
		return err
	}
	unlock, err := exclusive(ctx, p.lock)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	dir, err := os.MkdirTemp(work, "c")
	if err != nil {
		return err
	}
	defer cleanup.Add(func() { err = errors.Join(err, os.RemoveAll(dir)) })()
	var regs [2]*registry.Registry
	var config strings.Builder
	config.WriteString("[lazy]\nbackground-fetch = false\n") // what a later build may want isn't part of this one
	for i := range regs {
		if regs[i], err = registry.Start(registry.Options{Dir: filepath.Join(dir, fmt.Sprint("registry", i))}); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, regs[i].Close()) }()
		fmt.Fprintf(&config, "[registry.%q]\nhttp = true\n", regs[i].Host)
	}
	if _, err := baseimage.Push(ctx, regs[0], "debian:estargz", built); err != nil {
		return err
	}
	for _, c := range []struct {
		name, step string
		to         *registry.Registry
	}{
		{"copied, pushed to the image's registry", "COPY <<x /etc/motd\nchanged\nx", regs[0]},
		{"made by a step, pushed to the image's registry", "RUN echo changed > /etc/motd", regs[0]},
		{"copied, pushed to another registry", "COPY <<x /etc/motd\nchanged\nx", regs[1]},
	} {
		if err := changeOnce(ctx, p, c.name, c.step, regs, c.to, size, config.String(), filepath.Join(dir, "root"), to); err != nil {
			return err
		}
	}
	return nil
}

func changeOnce(ctx context.Context, p plan, name, step string, regs [2]*registry.Registry, target *registry.Registry, size int64, config, root string, to io.Writer) (err error) {
	d, err := daemon.Start(ctx, daemon.Options{Kind: daemon.Ours, Root: root, Config: config})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close(), os.RemoveAll(root)) }()
	idle, err := resident(d.Pid(), "VmRSS")
	if err != nil {
		return err
	}
	for _, r := range regs {
		r.Log.Reset()
	}
	res, err := solve(ctx, p, d, client.Solve{
		Dockerfile: "FROM " + regs[0].Ref("debian:estargz") + "\n" + step + "\n",
		Outputs:    []string{"type=image,name=" + target.Ref("app:1") + ",push=true,compression=estargz"},
	})
	if err != nil {
		return err
	}
	var received, sent int64
	for _, r := range regs {
		for _, e := range r.Log.Entries() {
			received += e.Bytes
			sent += e.Received
		}
	}
	peak, err := resident(d.Pid(), "VmHWM")
	if err != nil {
		return err
	}
	stored, err := contentSize(root)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(to, "one-line change on a lazy base of %.0f MB, %s: %.1f s, %.2f MB received, %.2f MB sent, %.2f MB in the content store, %.0f MB of memory at the peak, %.0f before\n",
		float64(size)/1e6, name, res.Total.Seconds(), float64(received)/1e6, float64(sent)/1e6, float64(stored)/1e6, float64(peak)/1e6, float64(idle)/1e6)
	return err
}
