package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/util/bklog"

	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// lazyStats is who says how far lazy layers have come.
type lazyStats interface{ LazyStats() snapshot.Stats }

func (d *debugServer) setLazy(s lazyStats) { d.lazy.Store(&s) }

// serveLazy shows the lazy layers that are mounted: as text, or as JSON by ?format=json or where that's what is accepted.
func (d *debugServer) serveLazy(w http.ResponseWriter, r *http.Request) {
	from := d.lazy.Load()
	if from == nil {
		http.Error(w, "the worker is not ready yet", http.StatusServiceUnavailable)
		return
	}
	st := (*from).LazyStats()
	var err error
	switch format := r.URL.Query().Get("format"); {
	case format == "json", format == "" && strings.Contains(r.Header.Get("Accept"), "application/json"):
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		err = enc.Encode(st)
	case format == "", format == "text":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		err = writeLazy(w, st)
	default:
		http.Error(w, fmt.Sprintf("unknown format %q; want json or text", format), http.StatusBadRequest)
	}
	if err != nil {
		bklog.G(r.Context()).WithError(err).Debug("lazy layers not shown to the end")
	}
}

// writeLazy writes a table of the layers, below the figures of all.
func writeLazy(to io.Writer, st snapshot.Stats) error {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	if st.Door == "" {
		fmt.Fprintln(w, "no figures: base images are pulled eagerly")
		return w.Flush()
	}
	t := st.Totals
	fmt.Fprintf(w, "door\t%s\n", st.Door)
	fmt.Fprintf(w, "layers\t%d mounted\n", t.Mounted)
	fmt.Fprintf(w, "fetched\t%s\n", bytesOf(t.Fetched))
	fmt.Fprintf(w, "copied\t%s not fetched, as other chunks had the same digests\n", bytesOf(t.Copied))
	fmt.Fprintf(w, "served\t%s, but for what the kernel answered by itself\n", bytesOf(t.Served))
	fmt.Fprintf(w, "reads\t%d waited, %d failed\n", t.Misses, t.Errors)
	fmt.Fprintf(w, "retries\t%d\n", t.Retries)
	fmt.Fprintf(w, "corrupt\t%d\n", t.Corrupt)
	guess := ""
	if !st.Link.Measured {
		guess = "not measured yet, taken for "
	}
	fmt.Fprintf(w, "link\t%s%s/s, %s to the first byte\n", guess, bytesOf(st.Link.BytesPerSecond), seconds(st.Link.RTTSeconds))
	q := st.Queue
	fmt.Fprintf(w, "queue\t%s waited for, %s ahead, %s of profiles, %s in the background, %d frames not looked at\n",
		bytesOf(q.Demand), bytesOf(q.Ahead), bytesOf(q.Profiled), bytesOf(q.Background), q.Unswept)
	if err := w.Flush(); err != nil || len(st.Layers) == 0 {
		return err
	}
	fmt.Fprintln(w, "\nLAYER\tDOOR\tFILLED\tOF\tFETCHED\tCOPIED\tHITS\tMISSES\tWAITED\tERRORS\tRETRIES\tCORRUPT\tSOURCE\tREPOSITORY")
	for _, l := range st.Layers {
		filled, total := bytesOf(l.Filled), bytesOf(l.Total)
		switch {
		case !l.Open:
			filled, total = "opening", "-"
		case l.Filled == l.Total:
			filled = "complete"
		}
		source := l.Source
		if source == "" {
			source = "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t%d\t%d\t%d\t%s\t%s\n", l.Digest, st.Door, filled, total, bytesOf(l.Fetched),
			bytesOf(l.Copied), l.Hits, l.Misses, seconds(l.WaitSeconds), l.Errors, l.Retries, l.Corrupt, source, l.Repository)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, l := range st.Layers {
		if l.Trouble != "" {
			fmt.Fprintf(w, "\nlast trouble of %s, %s ago: %s\n", l.Digest, seconds(l.TroubleSeconds), l.Trouble)
		}
	}
	return w.Flush()
}

// bytesOf is n bytes in words, e.g. "1.9 MB".
func bytesOf(n int64) string {
	return units.CustomSize("%.3g %s", float64(n), 1000, []string{"B", "kB", "MB", "GB", "TB", "PB"})
}

// seconds is a time in words, to three digits or so.
func seconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	switch {
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Microsecond).String()
}
