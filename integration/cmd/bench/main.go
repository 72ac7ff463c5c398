// Command bench measures cold builds by buildkitd-lazy and by stock BuildKit against each other.
//
// Everybody gets the same base image over the same link, in the format that suits them: stock overlayfs as gzip and as
// zstd, stock stargz (with its defaults, and tuned: noprefetch, no_background_fetch) and buildkitd-lazy (with its
// defaults) as eStargz. The registry is behind a link of given bandwidth (tbf) and delay (a front that also
// counts), see lab/link. Before each cold build the state directory is new and the page cache dropped, but for the registry's
// blobs, as a registry's disk is another machine's. The daemons link the same versions of every module they have in
// common; bench refuses to compare others.
//
// Contestants take turns within a run, so that what else happens on the machine hits all of them, and begin with another
// one in each run. Every build's result is exported and looked at; contestants must agree on it.
//
// Time to the first RUN is measured by the first line that its command prints: by then the base image is there, as far
// as needed, and the command's shell runs. RUN is from there to the end of the step, total the life of the
// client. Bytes, requests and the most outstanding are those of the link until the client ends; what
// goes on behind a finished build is not counted. The link column is the total divided by what the row's bytes take at link speed.
//
// The limit of a cold workload is what no lazy puller can be much faster than: the same build with everything on the local disk (stock
// overlayfs again, after its pull, with the page cache dropped and nothing cached), and the bytes that stock stargz, tuned, received for
// the workload at the speed of the link, and four round trips. It's there if overlayfs-zstd and stargz-tuned are among the contestants.
//
// Filled is how a workload is built with everything on the local disk, the page cache dropped and nothing cached: ours, of which no byte is
// missing (it is asked), against stock overlayfs, which has unpacked the image on the same disk. Each gets the image once, by a step that reads
// every file, and then they build in turns. Time is the disk's and the CPUs', and differs by a tenth from one build to the next: that takes
// ten runs to tell apart what differs by less.
//
// With -export it measures instead how long an image takes that has been built, to be written as layers into the content store: ours as
// eStargz, stock BuildKit as eStargz, gzip and zstd. Memory is the daemon's peak over what it took before. The image has seven layers, or with
// -one-layer one of 500 MB.
//
// With -push it measures what goes over the network when a one-line change on top of the lazy Debian image is built, exported and pushed.
//
// Base images are kept in the user's cache directory (BUILDKITD_LAZY_BENCH_CACHE replaces it); making the Debian one
// takes some minutes. Everything else goes when the bench ends or is interrupted. With -json the file is rewritten after each
// measurement, so an interrupted bench leaves its figures.
//
// It needs root, and `make build tools`; `make bench` does everything.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/pki"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

func main() {
	p, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	// Interrupted, run unwinds: what it calls heeds ctx, and who has made something removes it. A
	// second signal ends the process at once, whatever it leaves.
	ctx, forget := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, forget)
	err = run(ctx, p)
	cleanup.All()
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "bench: interrupted")
		os.Exit(130)
	}
	forget()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) }

func run(ctx context.Context, p plan) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("daemons, mounts and the shaped link need root: run sudo make bench")
	}
	rep := &report{Started: time.Now(), Machine: thisMachine(), Runs: p.runs, TLS: p.tls}
	if rep.Versions, err = versions(); err != nil {
		return err
	}
	work, remove, err := cleanup.TempDir("bench")
	if err != nil {
		return err
	}
	defer remove()
	if p.push {
		return change(ctx, p, work, os.Stdout)
	}
	if p.export {
		return exports(ctx, p, work, os.Stdout)
	}
	st, err := openStore(ctx, p)
	if err != nil {
		return err
	}
	rep.Bases = st.bases
	for _, s := range p.shapes {
		if err := overLink(ctx, p, s.Shape, st, work, rep); err != nil {
			return err
		}
	}
	return rep.table(os.Stdout)
}

// versions refuses to compare daemons that differ in what they share.
func versions() (map[string]string, error) {
	ours, err := daemon.Bin(daemon.OursBinary)
	if err != nil {
		return nil, err
	}
	stock, err := daemon.Bin(daemon.StockBinary)
	if err != nil {
		return nil, err
	}
	shared, differ, err := daemon.SharedVersions(ours, stock)
	if err != nil {
		return nil, err
	}
	if len(differ) > 0 {
		return nil, fmt.Errorf("%s and %s are not comparable, make build tools: %s", ours, stock, strings.Join(differ, "; "))
	}
	said, err := exec.Command(ours, "--version").Output() //nolint:noctx // it prints a line
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w", ours, err)
	}
	out := map[string]string{"buildkitd-lazy": strings.TrimSpace(string(said))}
	for _, m := range []string{
		"go", "github.com/moby/buildkit", "github.com/containerd/containerd/v2",
		"github.com/containerd/stargz-snapshotter", "github.com/containerd/stargz-snapshotter/estargz", "github.com/hanwen/go-fuse/v2",
	} {
		if v := shared[m]; v != "" {
			out[m] = v
		}
	}
	return out, nil
}

// overLink measures everything over one link.
func overLink(ctx context.Context, p plan, shape link.Shape, st *store, work string, rep *report) (err error) {
	l, err := link.New(ctx, shape)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	ln, err := l.Listen()
	if err != nil {
		return err
	}
	opt := registry.Options{Dir: st.dir, Listener: ln, Front: l.Front, HTTP2: p.tls == http2}
	config := "http = true"
	if p.tls != "" {
		if opt.CA, err = pki.NewCA(filepath.Join(work, "pki")); err != nil {
			return errors.Join(err, ln.Close())
		}
		config = fmt.Sprintf("ca = [%q]", opt.CA.File)
	}
	reg, err := registry.Start(opt)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	c := &course{link: l, reg: reg, config: fmt.Sprintf("[registry.%q]\n%s\n", reg.Host, config), work: work, timeout: p.timeout, lock: p.lock}
	steps := p.steps()
	for i, s := range steps {
		for n := range p.runs {
			for _, who := range rotate(p.contestants, i+n) {
				img := st.images[s.base][who.format]
				phases := s.phases
				if who.name == localBy {
					phases = slices.Concat([]string{local}, phases)
				}
				samples, err := c.measure(ctx, who, s.w, reg.Ref(img.tag), img.blobs, phases)
				if err != nil {
					return fmt.Errorf("%s on %s with %s: %w", s.w.name, s.base, who.name, err)
				}
				if sm, ok := samples[local]; ok {
					g := rep.group(shape.String(), s.base, s.w.name, "")
					r := g.row(who, img.size)
					r.Local = append(r.Local, sm)
				}
				for _, phase := range append([]string{""}, s.phases...) {
					sm, ok := samples[phase]
					if !ok {
						continue
					}
					g := rep.group(shape.String(), s.base, s.w.name, phase)
					g.shape = shape
					r := g.row(who, img.size)
					r.Samples = append(r.Samples, sm)
					g.summarize()
					announce(i+1, len(steps), n+1, p.runs, g, who, sm)
				}
				if p.json != "" {
					if err := rep.save(p.json); err != nil {
						return err
					}
				}
			}
		}
		if err := rep.agree(); err != nil {
			return err
		}
	}
	for _, b := range p.bases {
		if len(p.fillable(b)) == 0 {
			continue
		}
		if err := c.filled(ctx, p, shape, b, st, rep); err != nil {
			return fmt.Errorf("filled, on %s: %w", b, err)
		}
		if err := rep.agree(); err != nil {
			return err
		}
	}
	return nil
}

func announce(i, steps, n, runs int, g *group, who contestant, s sample) {
	what := fmt.Sprintf("%.1f s, %.1f MB", s.Total, float64(s.Bytes)/1e6)
	if s.Error != "" {
		what = "failed: " + firstLine(s.Error)
	}
	say("%d/%d, run %d/%d, %s on %s over %s: %s %s", i, steps, n, runs, g.title(), g.Base, g.Link, who.name, what)
}
