package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// A writer is a daemon, and what it writes layers as.
type writer struct {
	name        string
	kind        daemon.Kind
	compression string
}

var writers = []writer{
	{"ours-estargz", daemon.Ours, "estargz"},
	{"stock-estargz", daemon.StockOverlay, "estargz"},
	{"stock-gzip", daemon.StockOverlay, "gzip"},
	{"stock-zstd", daemon.StockOverlay, "zstd"},
	{"ours-zstdchunked", daemon.Ours, "zstdchunked"},
}

// exportDockerfile makes layers of its own of what is in a base image.
const exportDockerfile = `FROM %s AS base
FROM scratch
COPY --from=base /usr/lib /usr/lib
COPY --from=base /usr/bin /usr/bin
COPY --from=base /usr/share /usr/share
COPY --from=base /usr/include /usr/include
COPY --from=base /usr/local /usr/local
COPY --from=base /var /var
COPY --from=base /etc /etc
`

// oneLayerDockerfile makes one of 500 MB.
const oneLayerDockerfile = `FROM %s AS base
FROM scratch AS some
COPY --from=base /usr/local /usr/local
COPY --from=base /usr/share /usr/share
COPY --from=base /usr/bin /usr/bin
COPY --from=base /usr/include /usr/include
FROM scratch
COPY --from=some / /
`

// An exported is one measured export of an image that has been built.
type exported struct {
	seconds float64
	cpu     float64 // seconds that the daemon took, which what else the machine does changes less
	bytes   int64   // of what the content store has got
	memory  int64   // of the daemon, at its peak over what it took before
}

// debianAs makes the Debian image with its layers in a format, and says where base images are kept.
func debianAs(ctx context.Context, format baseimage.Format) (cache string, built v1.Image, err error) {
	if cache, err = baseimage.CacheDir(); err != nil {
		return "", nil, err
	}
	im, err := baseimage.Debian(ctx, cache, func(step string) { say("  %s", step) })
	if err != nil {
		return "", nil, err
	}
	built, err = im.Build(ctx, format)
	return cache, built, err
}

// exports measures what it takes to write an image's layers.
func exports(ctx context.Context, p plan, work string, to io.Writer) (err error) {
	cache, built, err := debianAs(ctx, baseimage.Zstd)
	if err != nil {
		return err
	}
	reg, err := registry.Start(registry.Options{Dir: filepath.Join(cache, "registry")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	if _, err := baseimage.Push(ctx, reg, "debian:zstd", built); err != nil {
		return err
	}
	results := map[string][]exported{}
	for n := range p.runs {
		for _, w := range rotate(p.writers, n) {
			e, err := exportOnce(ctx, p, w, reg, work)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			say("run %d/%d, %s: %.1f s, %.1f s of CPU, %.1f MB, %.0f MB of memory", n+1, p.runs, w.name, e.seconds, e.cpu, float64(e.bytes)/1e6, float64(e.memory)/1e6)
			results[w.name] = append(results[w.name], e)
		}
	}
	return exportTable(p.writers, results, to)
}

// exportTable writes the medians, and how the first compares with each.
func exportTable(writers []writer, results map[string][]exported, to io.Writer) error {
	median := func(w string, of func(exported) float64) float64 {
		var values []float64
		for _, e := range results[w] {
			values = append(values, of(e))
		}
		if s := spreadOf(values); s != nil {
			return s.Median
		}
		return 0
	}
	seconds := func(e exported) float64 { return e.seconds }
	cpu := func(e exported) float64 { return e.cpu }
	size := func(e exported) float64 { return float64(e.bytes) / 1e6 }
	memory := func(e exported) float64 { return float64(e.memory) / 1e6 }
	tw := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "export\tseconds\tfirst : it\tCPU seconds\tfirst : it\tMB\tfirst : it\tpeak MB")
	first := writers[0].name
	for _, w := range writers {
		s, c, b := median(w.name, seconds), median(w.name, cpu), median(w.name, size)
		fmt.Fprintf(tw, "%s\t%.1f\t%.2f\t%.1f\t%.2f\t%.1f\t%.3f\t%.0f\n", w.name,
			s, median(first, seconds)/s, c, median(first, cpu)/c, b, median(first, size)/b, median(w.name, memory))
	}
	return tw.Flush()
}

// exportOnce builds the image with a new daemon, and then measures its export.
func exportOnce(ctx context.Context, p plan, w writer, reg *registry.Registry, work string) (_ exported, err error) {
	unlock, err := exclusive(ctx, p.lock)
	if err != nil {
		return exported{}, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	root, err := os.MkdirTemp(work, "x")
	if err != nil {
		return exported{}, err
	}
	defer cleanup.Add(func() { err = errors.Join(err, os.RemoveAll(root)) })()
	d, err := daemon.Start(ctx, daemon.Options{Kind: w.kind, Root: root, Config: fmt.Sprintf("[registry.%q]\nhttp = true\n", reg.Host)})
	if err != nil {
		return exported{}, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	dockerfile := exportDockerfile
	if p.oneLayer {
		dockerfile = oneLayerDockerfile
	}
	what := client.Solve{Dockerfile: fmt.Sprintf(dockerfile, reg.Ref("debian:zstd"))}
	if _, err := solve(ctx, p, d, what); err != nil {
		return exported{}, err
	}
	before, err := contentSize(root)
	if err != nil {
		return exported{}, err
	}
	idle, err := resident(d.Pid(), "VmRSS")
	if err != nil {
		return exported{}, err
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", d.Pid()), []byte("5"), 0); err != nil {
		return exported{}, fmt.Errorf("begin anew with the daemon's peak of memory: %w", err)
	}
	cpuBefore, err := cpuSeconds(d.Pid())
	if err != nil {
		return exported{}, err
	}
	what.Outputs = []string{"type=image,name=exported,compression=" + w.compression + ",oci-mediatypes=true"}
	res, err := solve(ctx, p, d, what)
	if err != nil {
		return exported{}, err
	}
	cpuAfter, err := cpuSeconds(d.Pid())
	if err != nil {
		return exported{}, err
	}
	peak, err := resident(d.Pid(), "VmHWM")
	if err != nil {
		return exported{}, err
	}
	after, err := contentSize(root)
	return exported{seconds: res.Total.Seconds(), cpu: cpuAfter - cpuBefore, bytes: after - before, memory: peak - idle}, err
}

func solve(ctx context.Context, p plan, d *daemon.Daemon, what client.Solve) (*client.Result, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, p.timeout, fmt.Errorf("not done after %v", p.timeout))
	defer cancel()
	res, err := client.Buildctl{Addr: d.Addr}.Build(ctx, what)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, err
	case res.Err != "":
		return nil, errors.New(cmp.Or(lastLine(res.Err), "failed"))
	}
	return res, nil
}

// contentSize is the size of all blobs in a daemon's content store.
func contentSize(root string) (sum int64, err error) {
	blobs, err := filepath.Glob(filepath.Join(root, "*", "content", "blobs", "*", "*"))
	if err != nil {
		return 0, err
	}
	for _, b := range blobs {
		st, err := os.Stat(b)
		if err != nil {
			return 0, err
		}
		sum += st.Size()
	}
	return sum, nil
}

// resident is a figure of /proc/PID/status in bytes.
func resident(pid int, name string) (int64, error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		var kib int64
		if _, err := fmt.Sscanf(line, name+": %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}

// cpuSeconds is the time on CPUs that a process has taken, of the user and the kernel.
func cpuSeconds(pid int) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// Behind the name, which may have spaces: the 12th and 13th field, in hundredths of a second.
	var user, system float64
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, raw)
	}
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return (user + system) / 100, nil
}
