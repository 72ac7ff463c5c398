package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// report is what report.json holds.
type report struct {
	Started     time.Time    `json:"started"`
	Run         string       `json:"run"` // regular expression
	Comparisons []comparison `json:"comparisons"`
}

// comparison is one pair of sides.
type comparison struct {
	Name          string    `json:"name"`
	Tests         int       `json:"tests"` // functions; the counts below are of their cases and parts
	Stock         tally     `json:"stock"`
	Ours          tally     `json:"ours"`
	Differences   []failure `json:"differences,omitempty"`
	NotComparable []failure `json:"notComparable,omitempty"` // stock does not pass them here
	Retried       []string  `json:"retried,omitempty"`       // passed on ours at the second try
}

type tally struct {
	Pass    int         `json:"pass"`
	Fail    int         `json:"fail"`
	Skip    int         `json:"skip"`
	Lost    int         `json:"lost"`
	Retried int         `json:"retried"`
	Leaks   []leftovers `json:"leaks,omitempty"`
}

// failure is one test with a result on each side.
type failure struct {
	Test    string   `json:"test"`
	Stock   string   `json:"stock"`
	Ours    string   `json:"ours"`
	Log     string   `json:"log,omitempty"`
	Excerpt []string `json:"excerpt,omitempty"`
	Note    string   `json:"note,omitempty"`
}

func count(r results) tally {
	t := tally{Leaks: r.Leaks}
	for _, o := range r.Outcomes {
		switch o.Result {
		case pass:
			t.Pass++
		case fail:
			t.Fail++
		case skip:
			t.Skip++
		default:
			t.Lost++
		}
		if o.Retried {
			t.Retried++
		}
	}
	return t
}

// explain notes where stock, told to use stargz-snapshotter, fails as ours
// does: then the fault is likely upstream's.
func (r *report) explain() {
	upstream := map[string]string{}
	for _, c := range r.Comparisons {
		if c.Name == "flag" {
			for _, n := range c.NotComparable {
				upstream[n.Test] = n.Stock
			}
		}
	}
	for i := range r.Comparisons {
		if r.Comparisons[i].Name == "flag" {
			continue
		}
		for j := range r.Comparisons[i].Differences {
			d := &r.Comparisons[i].Differences[j]
			if res, ok := upstream[d.Test]; ok && res != skip {
				d.Note = "stock with --oci-worker-snapshotter=stargz does not pass it either: " + res
			}
		}
	}
}

func (r *report) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\nBuildKit's integration tests (%s), started %s\n", r.Run, r.Started.Format(time.DateTime))
	for _, c := range r.Comparisons {
		fmt.Fprintf(&b, "\n%s: %d tests\n", c.Name, c.Tests)
		fmt.Fprintf(&b, "         %6s %6s %6s %6s %10s %6s\n", "pass", "fail", "skip", "lost", "2nd try", "leaks")
		for _, row := range []struct {
			name string
			t    tally
		}{{"stock", c.Stock}, {"ours", c.Ours}} {
			leaks := 0
			for _, l := range row.t.Leaks {
				leaks += len(l.Mounts) + len(l.Processes)
			}
			fmt.Fprintf(&b, "  %-6s %6d %6d %6d %6d %10d %6d\n", row.name, row.t.Pass, row.t.Fail, row.t.Skip, row.t.Lost, row.t.Retried, leaks)
		}
		skipped := 0
		for _, n := range c.NotComparable {
			if n.Stock == skip {
				skipped++
			}
		}
		fmt.Fprintf(&b, "  not comparable here: %d (stock skips %d, fails %d)\n", len(c.NotComparable), skipped, len(c.NotComparable)-skipped)
		if len(c.Retried) > 0 {
			fmt.Fprintf(&b, "  passed on ours at the second try only: %s\n", strings.Join(c.Retried, ", "))
		}
		for _, l := range c.Ours.Leaks {
			for _, m := range l.Mounts {
				fmt.Fprintf(&b, "  ours left a mount: %s\n", m)
			}
			for _, p := range l.Processes {
				fmt.Fprintf(&b, "  ours left a process: %s\n", p)
			}
		}
		fmt.Fprintf(&b, "  passes on stock, not on ours: %d\n", len(c.Differences))
		for _, d := range c.Differences {
			fmt.Fprintf(&b, "\n  %s: %s\n", d.Ours, d.Test)
			if d.Note != "" {
				fmt.Fprintf(&b, "    %s\n", d.Note)
			}
			for _, line := range d.Excerpt {
				fmt.Fprintf(&b, "    | %s\n", line)
			}
			if d.Log != "" {
				fmt.Fprintf(&b, "    %s\n", d.Log)
			}
			suite, name, _ := strings.Cut(d.Test, ": ")
			parts := strings.Split(name, "/")
			if len(parts) > 1 {
				fmt.Fprintf(&b, "    again: go -C integration/upstream run . -comparison %s -suite %s -run '^%s$'\n", c.Name, suite, parts[1])
			}
		}
	}
	return b.String()
}

// excerpt picks from a log what most likely says why a test failed.
func excerpt(file string) []string {
	if file == "" {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return []string{err.Error()}
	}
	var asserted, logged []string
	more := 0
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if len(line) > 400 {
			line = line[:400] + "…"
		}
		switch {
		case strings.HasPrefix(line, "Error:"), strings.HasPrefix(line, "panic:"), strings.Contains(line, "test timed out"):
			more = 6
		case strings.HasPrefix(line, "Test:"):
			more = 0
		case strings.Contains(line, "level=error"), strings.Contains(line, "level=fatal"), strings.Contains(line, "level=panic"), strings.Contains(line, "fatal error:"):
			if !slices.Contains(logged, line) {
				logged = append(logged, line)
			}
		}
		if more > 0 && line != "" && len(asserted) < 12 {
			asserted = append(asserted, line)
			more--
		}
	}
	if len(logged) > 4 {
		logged = logged[len(logged)-4:]
	}
	return append(asserted, logged...)
}
