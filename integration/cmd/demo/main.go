// Command demo builds examples/dockerfiles/go-service cold on a lazy base image, and
// the same again with stock buildkitd, and prints what each of them fetched and how long it took.
//
// It makes a Go development image of the local toolchain, pushes it as eStargz to a registry of its own, and puts
// a link of 200 Mbit/s and 20 ms between that registry and the daemons: over a loopback fetching costs nothing, which
// is not how registries are. Both daemons are new, their page cache is dropped, and they get the same image. The
// base image and the registry's blobs are kept in the user's cache directory; everything else goes when the demo ends or is
// interrupted.
//
// It needs root. `make demo` builds and installs what it uses.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

const tag = "dev/go:estargz"

func main() {
	mbit := flag.Int("mbit", 200, "bandwidth of the link in Mbit/s, 0 for as fast as it goes")
	delay := flag.Duration("delay", 20*time.Millisecond, "round trip time of the link")
	service := flag.String("context", "", "directory to build (default examples/dockerfiles/go-service of this repository)")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	// Interrupted, everything that has been registered is undone before the process ends.
	stop := cleanup.Trap()
	ctx, forget := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer forget()
	err := run(ctx, link.Shape{Mbit: *mbit, Delay: *delay}, *service)
	if ctx.Err() != nil {
		select {} // the trap is undoing, and ends the process when it has
	}
	cleanup.All()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func say(format string, args ...any) { fmt.Printf("demo: "+format+"\n", args...) }

// outcome is what came of one build.
type outcome struct {
	name            string
	fetched         int64
	requests        int
	firstRUN, total time.Duration
}

func run(ctx context.Context, shape link.Shape, service string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("daemons, mounts and the shaped link need root: run sudo make demo")
	}
	work, remove, err := cleanup.TempDir("demo")
	if err != nil {
		return err
	}
	defer remove()
	if service == "" {
		bin, err := daemon.Bin(daemon.OursBinary)
		if err != nil {
			return err
		}
		service = filepath.Join(filepath.Dir(filepath.Dir(bin)), "examples", "dockerfiles", "go-service")
	}

	cache, err := baseimage.CacheDir()
	if err != nil {
		return err
	}
	say("making a Go development image of the local toolchain (kept in %s)", cache)
	im, err := baseimage.Go(ctx, cache)
	if err != nil {
		return err
	}
	facts, err := im.Measure()
	if err != nil {
		return err
	}
	img, err := im.Build(ctx, baseimage.EStargz)
	if err != nil {
		return err
	}
	size, err := baseimage.CompressedSize(img)
	if err != nil {
		return err
	}

	say("starting a registry behind a link of %v", shape)
	l, err := link.New(ctx, shape)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	ln, err := l.Listen()
	if err != nil {
		return err
	}
	store := filepath.Join(cache, "demo-registry")
	// Pushed from this side of the link, by a registry that serves the same directory.
	local, err := registry.Start(registry.Options{Dir: store})
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	_, err = baseimage.Push(ctx, local, tag, img)
	if err := errors.Join(err, local.Close()); err != nil {
		return errors.Join(err, ln.Close())
	}
	reg, err := registry.Start(registry.Options{Dir: store, Listener: ln, Front: l.Front})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()

	var outcomes []outcome
	for _, kind := range []daemon.Kind{daemon.Ours, daemon.StockOverlay} {
		say("building %s with %s", filepath.Base(service), kind)
		o, said, err := build(ctx, kind, l, reg, service, work)
		if err != nil {
			return err
		}
		say("  the service it built says: %s", said)
		outcomes = append(outcomes, o)
	}
	return table(shape, facts, size, outcomes)
}

// build builds the service cold and returns what it took and what the result prints.
func build(ctx context.Context, kind daemon.Kind, l *link.Link, reg *registry.Registry, service, work string) (o outcome, said string, err error) {
	d, err := daemon.Start(ctx, daemon.Options{Kind: kind, Link: l, Config: fmt.Sprintf("[registry.%q]\nhttp = true\n", reg.Host)})
	if err != nil {
		return o, "", err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := dropPageCache(); err != nil {
		return o, "", err
	}
	out := filepath.Join(work, "out")
	if err := os.RemoveAll(out); err != nil {
		return o, "", err
	}
	l.ResetCounts()
	res, err := client.Buildctl{Addr: d.Addr}.Build(ctx, client.Solve{
		Context: service, Target: "binary", BuildArgs: []string{"BASE=" + reg.Ref(tag)},
		Outputs: []string{"type=local,dest=" + out},
	})
	if err != nil {
		return o, "", err
	}
	if res.Err != "" {
		return o, "", fmt.Errorf("build with %s: %s\n%s", kind, res.Err, res.Output())
	}
	counts := l.Counts()
	// COPY comes before RUN in this Dockerfile, so the base is there when RUN's vertex starts.
	v := res.Vertex("] RUN")
	if v == nil || v.Started == nil {
		return o, "", fmt.Errorf("build with %s: no RUN step has run", kind)
	}
	prints, err := exec.CommandContext(ctx, filepath.Join(out, "quotes"), "-once").Output()
	if err != nil {
		return o, "", fmt.Errorf("run the service that %s built: %w", kind, err)
	}
	return outcome{
		name: string(kind), fetched: counts.Bytes, requests: counts.Requests,
		firstRUN: v.Started.Sub(res.Start), total: res.Total,
	}, string(bytes.TrimSpace(prints)), nil
}

func dropPageCache() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache, so that both builds start cold: %w", err)
	}
	return nil
}

func table(shape link.Shape, facts baseimage.Facts, size int64, outcomes []outcome) error {
	var b strings.Builder
	fmt.Fprintf(&b, "\nGo service (net/http), first build on a new machine. Base image: %s in %d layers, %d files, %s unpacked.\n",
		megabytes(size), facts.Layers, facts.Files, megabytes(facts.Unpacked))
	fmt.Fprintf(&b, "Link to the registry: %v. Same image, same link, empty state directories, page cache dropped.\n\n", shape)
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\timage\tfetched\t\trequests\tfirst RUN after\ttotal\t")
	for _, o := range outcomes {
		fmt.Fprintf(w, "%s\t%s\t%s\t%.0f %%\t%d\t%.1f s\t%.1f s\t\n", o.name, megabytes(size), megabytes(o.fetched),
			100*float64(o.fetched)/float64(size), o.requests, o.firstRUN.Seconds(), o.total.Seconds())
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(&b, "\nWhat the total is made of, on larger images and other links too: make bench.\n")
	fmt.Print(b.String())
	return nil
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
