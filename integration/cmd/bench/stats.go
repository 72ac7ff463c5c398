package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
)

// A spread is what several runs gave.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// spreadOf returns nil for no values. The median of an even number is between the two in the middle.
func spreadOf(values []float64) *spread {
	if len(values) == 0 {
		return nil
	}
	v := slices.Sorted(slices.Values(values))
	mid := len(v) / 2
	median := v[mid]
	if len(v)%2 == 0 {
		median = (v[mid-1] + v[mid]) / 2
	}
	return &spread{Median: median, Min: v[0], Max: v[len(v)-1]}
}

// A sample is one measured build. Pointers are nil where there was nothing to measure.
type sample struct {
	// FirstRUN is from the start of the client until the command of the first RUN speaks, RUN
	// from then until the step has ended, Total until the client has ended; in seconds.
	FirstRUN *float64 `json:"first_run_seconds,omitempty"`
	RUN      *float64 `json:"run_seconds,omitempty"`
	Total    float64  `json:"total_seconds"`
	// What went over the link until the client ended.
	Bytes       int64 `json:"bytes"`
	Requests    int   `json:"requests"`
	Outstanding int   `json:"outstanding"` // the most at a time
	// Result is what was built, as far as it is looked at.
	Result string `json:"result,omitempty"`
	// Lazy is what our daemon said about the base image: the summary, and each layer that it pulled whole and why.
	Lazy []string `json:"lazy,omitempty"`
	// Load is the machine's load average before the build: others who use it slow both sides.
	Load float64 `json:"load"`
	// Error is why there are no figures; then Output is the end of what steps printed, Log of what the daemon did.
	Error  string `json:"error,omitempty"`
	Output string `json:"output,omitempty"`
	Log    string `json:"log,omitempty"`
}

// A row is one contestant at one workload, or at a phase after it.
type row struct {
	Contestant string   `json:"contestant"`
	Stock      bool     `json:"stock"`
	Format     string   `json:"format"`
	ImageBytes int64    `json:"image_bytes"` // compressed, in this format
	Samples    []sample `json:"samples"`
	// Local is the same build with everything on the local disk: of one contestant, after its cold build.
	Local []sample `json:"local,omitempty"`

	// What follows is computed from the samples that have no error.

	FirstRUN    *spread `json:"first_run_seconds,omitempty"`
	RUN         *spread `json:"run_seconds,omitempty"`
	Total       *spread `json:"total_seconds,omitempty"`
	Bytes       *spread `json:"bytes,omitempty"`
	Requests    *spread `json:"requests,omitempty"`
	Outstanding *spread `json:"outstanding,omitempty"`
	Fetched     float64 `json:"fetched_percent"` // median bytes of ImageBytes
	Failed      int     `json:"failed,omitempty"`
	// Ratio is the best stock row's total, divided by this total: 2 is twice as fast. 0 where there is none.
	Ratio float64 `json:"ratio_to_best_stock,omitempty"`
	// ToLink is this total, divided by what the median of its bytes takes on the link: 1 is a link that was full all the time. 0
	// where the link isn't shaped, and for builds that aren't cold.
	ToLink float64 `json:"ratio_to_link,omitempty"`
	// ToLimit is this total, divided by the group's limit. 0 where there is none.
	ToLimit float64 `json:"ratio_to_limit,omitempty"`
}

// summarize computes what follows from the samples.
func (r *row) summarize() {
	var first, run, total, bytes, requests, outstanding []float64
	r.Failed = 0
	for _, s := range r.Samples {
		if s.Error != "" {
			r.Failed++
			continue
		}
		if s.FirstRUN != nil && s.RUN != nil {
			first, run = append(first, *s.FirstRUN), append(run, *s.RUN)
		}
		total = append(total, s.Total)
		bytes = append(bytes, float64(s.Bytes))
		requests = append(requests, float64(s.Requests))
		outstanding = append(outstanding, float64(s.Outstanding))
	}
	r.FirstRUN, r.RUN, r.Total = spreadOf(first), spreadOf(run), spreadOf(total)
	r.Bytes, r.Requests, r.Outstanding = spreadOf(bytes), spreadOf(requests), spreadOf(outstanding)
	r.Fetched = 0
	if r.Bytes != nil && r.ImageBytes > 0 {
		r.Fetched = 100 * r.Bytes.Median / float64(r.ImageBytes)
	}
}

// A group is what can be compared: the rows of one workload on one base image over one link.
type group struct {
	Link     string `json:"link"`
	Base     string `json:"base"`
	Workload string `json:"workload"`
	Phase    string `json:"phase,omitempty"` // empty for the cold build
	Rows     []*row `json:"rows"`
	// Limit is what the workload takes with everything on the local disk, with the bytes that it needs at the speed of the
	// link, and four round trips; in seconds. 0 where it isn't known.
	Limit float64 `json:"limit_seconds,omitempty"`

	shape link.Shape
}

// row returns the contestant's row, which it makes if need be.
func (g *group) row(c contestant, imageBytes int64) *row {
	for _, r := range g.Rows {
		if r.Contestant == c.name {
			return r
		}
	}
	r := &row{Contestant: c.name, Stock: c.stock(), Format: string(c.format), ImageBytes: imageBytes}
	g.Rows = append(g.Rows, r)
	// Rows stand in the order of the list, whoever came first.
	place := func(r *row) int {
		return slices.IndexFunc(contestants, func(c contestant) bool { return c.name == r.Contestant })
	}
	slices.SortStableFunc(g.Rows, func(a, b *row) int { return place(a) - place(b) })
	return r
}

// summarize summarizes the rows and compares them.
func (g *group) summarize() {
	var best *row
	for _, r := range g.Rows {
		r.summarize()
		if r.Stock && r.Failed == 0 && r.Total != nil && (best == nil || r.Total.Median < best.Total.Median) {
			best = r
		}
	}
	g.Limit = g.limit()
	for _, r := range g.Rows {
		r.ToLink = 0
		if g.Phase == "" && r.Total != nil && r.Bytes.Median > 0 && g.shape.Mbit > 0 {
			r.ToLink = r.Total.Median / g.onLink(r.Bytes.Median)
		}
		r.ToLimit = 0
		if g.Limit > 0 && r.Total != nil {
			r.ToLimit = r.Total.Median / g.Limit
		}
		r.Ratio = 0
		if best != nil && r.Total != nil && r.Total.Median > 0 {
			r.Ratio = best.Total.Median / r.Total.Median
		}
	}
}

// roundTrips is how many of them the limit grants.
const roundTrips = 4

// limit computes the limit of a cold workload.
func (g *group) limit() float64 {
	var totals []float64
	var bytes *spread
	for _, r := range g.Rows {
		switch r.Contestant {
		case localBy:
			for _, s := range r.Local {
				if s.Error == "" {
					totals = append(totals, s.Total)
				}
			}
		case bytesBy:
			bytes = r.Bytes
		}
	}
	onDisk := spreadOf(totals)
	if onDisk == nil || bytes == nil || g.Phase != "" {
		return 0
	}
	limit := onDisk.Median + roundTrips*g.shape.Delay.Seconds()
	if g.shape.Mbit > 0 {
		limit += g.onLink(bytes.Median)
	}
	return limit
}

// onLink returns how many seconds bytes take at the speed of the link.
func (g *group) onLink(bytes float64) float64 { return bytes * 8 / 1e6 / float64(g.shape.Mbit) }

// agree returns an error if contestants built different things.
func (g *group) agree() error {
	var first *row
	var want string
	for _, r := range g.Rows {
		for _, s := range slices.Concat(r.Samples, r.Local) {
			switch {
			case s.Error != "":
			case first == nil:
				first, want = r, s.Result
			case s.Result != want:
				return errors.New(g.Base + " " + g.Workload + ": " + first.Contestant + " built " + want + ", " + r.Contestant + " " + s.Result)
			}
		}
	}
	return nil
}

// agree returns an error if contestants built different things.
func (rep *report) agree() error {
	for _, g := range rep.Groups {
		if err := g.agree(); err != nil {
			return fmt.Errorf("contestants disagree: %w", err)
		}
	}
	return nil
}
