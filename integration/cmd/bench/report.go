package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
)

// A report is everything that was measured, and where.
type report struct {
	Started  time.Time         `json:"started"`
	Machine  machine           `json:"machine"`
	Versions map[string]string `json:"versions"` // of the modules that both sides link and that matter here
	Runs     int               `json:"runs"`
	TLS      string            `json:"tls,omitempty"` // what the registry speaks over TLS, if it does
	Bases    []base            `json:"bases"`
	Groups   []*group          `json:"groups"`
}

type machine struct {
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
}

// A base is a base image as it was measured.
type base struct {
	Name string `json:"name"`
	baseimage.Facts
	Bytes map[baseimage.Format]int64 `json:"bytes"` // compressed
}

func thisMachine() machine {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return machine{CPUs: runtime.NumCPU()}
	}
	return machine{Kernel: unix.ByteSliceToString(u.Release[:]), CPUs: runtime.NumCPU()}
}

// group returns the group, which it makes if need be.
func (rep *report) group(link, base, workload, phase string) *group {
	for _, g := range rep.Groups {
		if g.Link == link && g.Base == base && g.Workload == workload && g.Phase == phase {
			return g
		}
	}
	g := &group{Link: link, Base: base, Workload: workload, Phase: phase}
	rep.Groups = append(rep.Groups, g)
	return g
}

// save replaces the file.
func (rep *report) save(path string) error {
	raw, err := json.MarshalIndent(rep, "", "  ")
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".bench-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(append(raw, '\n'))
	if e := tmp.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Chmod(tmp.Name(), 0o644)
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// table writes the report for people.
func (rep *report) table(w io.Writer) error {
	var low, high float64
	n := 0
	for _, g := range rep.Groups {
		for _, r := range g.Rows {
			for _, s := range r.Samples {
				if n == 0 || s.Load < low {
					low = s.Load
				}
				high = max(high, s.Load)
				n++
			}
		}
	}
	fmt.Fprintf(w, "%s, Linux %s, %d CPUs, load average before the builds %.1f to %.1f. Median (min-max) of %s.\n",
		rep.Started.Format("2006-01-02 15:04"), rep.Machine.Kernel, rep.Machine.CPUs, low, high, plural(rep.Runs, "run"))
	if rep.TLS != "" {
		fmt.Fprintf(w, "The registry speaks TLS, %s.\n", rep.TLS)
	}
	fmt.Fprintln(w, "Same image, same link. Cold: empty state directory, page cache dropped. First RUN: until its command runs. RUN: the command.")
	fmt.Fprintln(w, "Fetched: of the image in that row's format. Out: most requests outstanding. Speed: total of the best stock row, divided by the row's.")
	fmt.Fprintln(w, "Link: the total divided by what the row's bytes take at link speed, which is 1 for a link that is full all the time.")
	fmt.Fprintln(w, "Limit: the build on the local disk, the bytes of stargz-tuned at link speed and 4 round trips; the column is the total divided by it.")
	for _, b := range rep.Bases {
		fmt.Fprintf(w, "Base image %s: %d layers, %d files, %.0f MB unpacked", b.Name, b.Layers, b.Files, float64(b.Unpacked)/1e6)
		for _, f := range baseimage.Formats {
			if n, ok := b.Bytes[f]; ok {
				fmt.Fprintf(w, ", %s %.0f MB", f, float64(n)/1e6)
			}
		}
		fmt.Fprintln(w, ".")
	}
	for _, g := range rep.Groups {
		fmt.Fprintf(w, "\n%s, on %s over %s", g.title(), g.Base, g.Link)
		if g.Limit > 0 {
			fmt.Fprintf(w, "; limit %.1f s", g.Limit)
		}
		fmt.Fprintln(w)
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(tw, "\tfirst RUN\tRUN\ttotal\t\tMB\tfetched\trequests\tout\tspeed\tlink\tlimit\t")
		for _, r := range g.Rows {
			r.line(tw)
		}
		if err := tw.Flush(); err != nil {
			return err
		}
		for _, r := range g.Rows {
			for i, s := range r.Samples {
				if s.Error != "" {
					fmt.Fprintf(w, "  %s, run %d failed: %s\n", r.Contestant, i+1, firstLine(s.Error))
				}
			}
		}
	}
	return nil
}

func (g *group) title() string {
	title := g.Workload
	for _, w := range workloads {
		if w.name == g.Workload {
			title = w.title
		}
	}
	if g.Phase != "" {
		return title + ": " + phaseTitles[g.Phase]
	}
	return title + ": cold"
}

func (r *row) line(w io.Writer) {
	if r.Total == nil {
		fmt.Fprintf(w, "%s\t\t\tfailed\t\t\t\t\t\t\t\t\t\n", r.Contestant)
		return
	}
	speed, fetched, link, limit := "", "", "", ""
	if r.ToLink > 0 {
		link = fmt.Sprintf("%.2f", r.ToLink)
	}
	if r.ToLimit > 0 {
		limit = fmt.Sprintf("%.2f", r.ToLimit)
	}
	if r.Ratio > 0 {
		speed = fmt.Sprintf("%.2fx", r.Ratio)
	}
	if r.ImageBytes > 0 {
		fetched = fmt.Sprintf("%.1f %%", r.Fetched)
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%.1f\t%s\t%.0f\t%.0f\t%s\t%s\t%s\t\n", r.Contestant, seconds(r.FirstRUN), seconds(r.RUN),
		seconds(r.Total), between(r.Total), r.Bytes.Median/1e6, fetched, r.Requests.Median, r.Outstanding.Median, speed, link, limit)
}

func seconds(s *spread) string {
	if s == nil {
		return "-"
	}
	return fmt.Sprintf("%.*f s", digits(s), s.Median)
}

func between(s *spread) string { return fmt.Sprintf("(%.*f-%.*f)", digits(s), s.Min, digits(s), s.Max) }

// digits returns how many decimals of a time are worth showing.
func digits(s *spread) int {
	if s.Median < 1 {
		return 2
	}
	return 1
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
