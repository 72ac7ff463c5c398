package main

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
)

// shapes are the links, by the name that -link knows them by.
var shapes = []namedShape{
	{"200", link.Shape{Mbit: 200, Delay: 20 * time.Millisecond}},
	{"1000", link.Shape{Mbit: 1000, Delay: 2 * time.Millisecond}},
	{"50", link.Shape{Mbit: 50, Delay: 80 * time.Millisecond}},
}

type namedShape struct {
	name string
	link.Shape
}

// Values of -tls.
const (
	http1 = "http1"
	http2 = "http2"
)

// plan is what to measure.
type plan struct {
	shapes      []namedShape
	bases       []string
	workloads   []workload
	phases      []string // after the principal workload of a base image
	filled      bool     // measure fillable workloads with everything on the local disk
	contestants []contestant
	runs        int
	timeout     time.Duration
	tls         string // what the registry speaks over TLS; "" for plain HTTP
	json        string
	lock        string
	export      bool     // measure exports, and nothing else
	writers     []writer // of exports
	oneLayer    bool     // exports have
	push        bool     // measure a push, and nothing else
}

// parse makes a plan of the command line.
func parse(args []string) (plan, error) {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	links := fs.String("link", "200", "links, by their Mbit/s: 200 (20 ms), 1000 (2 ms), 50 (80 ms), or all")
	bases := fs.String("base", "all", "base images: go, debian, or all")
	names := fs.String("workload", "all", "workloads: c, go, python, java, readall, find, copyfrom; again and restart, which repeat the first of the base; filled, which is go, readall and find with everything on the local disk; or all")
	who := fs.String("contestant", "all", "contestants: ours, overlayfs-gzip, overlayfs-zstd, stargz, stargz-tuned, or all")
	runs := fs.Int("runs", 3, "measure everything so many times and take medians")
	secure := fs.String("tls", "", "have the registry speak TLS, by http1 or http2; plain HTTP if not given")
	quick := fs.Bool("quick", false, "the Go image, a Go program cold, again and after a restart, three contestants; flags given replace these")
	timeout := fs.Duration("timeout", 10*time.Minute, "a build that takes longer has failed")
	json := fs.String("json", "", "write every figure to this `file`, anew after each measurement")
	lock := fs.String("lock", "", "lock this `file` (flock) during each measurement, where others who use the machine do too")
	export := fs.Bool("export", false, "measure what it takes to write the Debian image's layers, and what they are, instead of builds; of the flags, -writer, -one-layer, -runs, -timeout and -lock count")
	layers := fs.String("writer", "all", "with -export: ours-estargz, stock-estargz, stock-gzip, stock-zstd, ours-zstdchunked, or all; the first is compared with each")
	oneLayer := fs.Bool("one-layer", false, "with -export: one layer of 500 MB instead of seven, for its memory")
	push := fs.Bool("push", false, "measure what goes over the network when a one-line change on top of the lazy Debian image is exported and pushed, instead of builds; of the flags, -timeout and -lock count")
	if err := fs.Parse(args); err != nil {
		return plan{}, err
	}
	if fs.NArg() > 0 {
		return plan{}, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if *runs < 1 {
		return plan{}, fmt.Errorf("-runs %d: nothing to measure", *runs)
	}
	if *oneLayer && !*export {
		return plan{}, errors.New("-one-layer is for -export")
	}
	if !slices.Contains([]string{"", http1, http2}, *secure) {
		return plan{}, fmt.Errorf("-tls %s: there are %s and %s", *secure, http1, http2)
	}
	if *quick {
		given := map[string]bool{}
		fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
		for name, value := range map[string]string{
			"base": "go", "workload": "go,again,restart", "contestant": "ours,overlayfs-zstd,stargz-tuned",
		} {
			if !given[name] {
				if err := fs.Set(name, value); err != nil {
					return plan{}, err
				}
			}
		}
	}
	p := plan{runs: *runs, timeout: *timeout, tls: *secure, json: *json, lock: *lock, export: *export, oneLayer: *oneLayer, push: *push}
	self := func(s string) string { return s }
	var errs [6]error
	p.shapes, errs[0] = choose("link", *links, shapes, func(s namedShape) string { return s.name })
	p.bases, errs[1] = choose("base", *bases, []string{"debian", "go"}, self)
	p.contestants, errs[2] = choose("contestant", *who, contestants, func(c contestant) string { return c.name })
	p.writers, errs[5] = choose("writer", *layers, writers, func(w writer) string { return w.name })
	var chosen []string
	for _, w := range workloads {
		chosen = append(chosen, w.name)
	}
	chosen, errs[3] = choose("workload", *names, append(chosen, again, restart, filled), self)
	for _, w := range workloads {
		if slices.Contains(chosen, w.name) {
			p.workloads = append(p.workloads, w)
		}
	}
	for _, phase := range []string{again, restart} {
		if slices.Contains(chosen, phase) {
			p.phases = append(p.phases, phase)
		}
	}
	p.filled = slices.Contains(chosen, filled)
	if err := errors.Join(errs[:]...); err != nil {
		return plan{}, err
	}
	if !slices.ContainsFunc(p.bases, p.uses) {
		return plan{}, fmt.Errorf("none of the workloads %s can be built on %s", *names, *bases)
	}
	return p, nil
}

// A step is a workload on a base image with the phases that follow.
type step struct {
	base   string
	w      workload
	phases []string
}

// steps are what is measured cold over each link. Phases ask for the workload that they repeat.
func (p plan) steps() []step {
	var out []step
	for _, b := range p.bases {
		for _, w := range workloads {
			s := step{base: b, w: w}
			if w.name == principal[b] {
				s.phases = p.phases
			}
			chosen := slices.ContainsFunc(p.workloads, func(c workload) bool { return c.name == w.name })
			if w.on(b) && (chosen || len(s.phases) > 0) {
				out = append(out, s)
			}
		}
	}
	return out
}

// fillable returns what is measured filled on a base image.
func (p plan) fillable(base string) []workload {
	if !p.filled {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(workloads), func(w workload) bool { return !slices.Contains(fillable, w.name) || !w.on(base) })
}

// uses reports whether anything is measured on a base image.
func (p plan) uses(base string) bool {
	return len(p.fillable(base)) > 0 || slices.ContainsFunc(p.steps(), func(s step) bool { return s.base == base })
}
