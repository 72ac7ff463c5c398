package main

import (
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
)

func TestSpread(t *testing.T) {
	for _, tt := range []struct {
		name   string
		values []float64
		want   spread
	}{
		{"one", []float64{4}, spread{4, 4, 4}},
		{"odd, in disorder", []float64{9, 1, 2}, spread{2, 1, 9}},
		{"even", []float64{9, 1, 4, 2}, spread{3, 1, 9}},
	} {
		before := slices.Clone(tt.values)
		if got := spreadOf(tt.values); got == nil || *got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
		if !slices.Equal(tt.values, before) {
			t.Errorf("%s: the values are now %v", tt.name, tt.values)
		}
	}
	if got := spreadOf(nil); got != nil {
		t.Errorf("no values: %+v, want nil", got)
	}
}

// who returns the contestant of a name.
func who(t *testing.T, name string) contestant {
	t.Helper()
	i := slices.IndexFunc(contestants, func(c contestant) bool { return c.name == name })
	if i < 0 {
		t.Fatalf("no contestant %q", name)
	}
	return contestants[i]
}

// cold returns a sample with a RUN.
func cold(total float64, bytes int64) sample {
	return sample{FirstRUN: new(total / 2), RUN: new(total / 4), Total: total, Bytes: bytes, Requests: 10, Outstanding: 3, Result: "hello"}
}

func TestLimit(t *testing.T) {
	g := &group{Base: "debian", Workload: "c", shape: link.Shape{Mbit: 200, Delay: 20 * time.Millisecond}}
	ours := g.row(who(t, "ours"), 0)
	ours.Samples = []sample{cold(4.16, 99e6)}
	disk := g.row(who(t, "overlayfs-zstd"), 0)
	disk.Samples = []sample{cold(40, 600e6)}
	tuned := g.row(who(t, "stargz-tuned"), 0)
	tuned.Samples = []sample{cold(9, 25e6)}
	if g.summarize(); g.Limit != 0 || ours.ToLimit != 0 {
		t.Errorf("a limit of %v without a local build", g.Limit)
	}
	// 1 s on the disk, 25 MB at 25 MB/s, 80 ms.
	disk.Local = []sample{cold(1, 0), {Error: "no space left on device"}}
	if g.summarize(); math.Abs(g.Limit-2.08) > 1e-9 || math.Abs(ours.ToLimit-2) > 1e-9 {
		t.Errorf("limit %v, %v times of it, want 2.08 and 2", g.Limit, ours.ToLimit)
	}
	g.Phase = again
	if g.summarize(); g.Limit != 0 {
		t.Errorf("a limit of %v for a build that isn't cold", g.Limit)
	}
}

func TestRatioIsToTheBestStockRow(t *testing.T) {
	g := &group{Base: "debian", Workload: "c"}
	add := func(name string, samples ...sample) *row {
		r := g.row(who(t, name), 200)
		r.Samples = append(r.Samples, samples...)
		return r
	}
	// Added in another order than that of the table.
	tuned := add("stargz-tuned", cold(8, 20), cold(9, 30), cold(40, 20))
	zstd := add("overlayfs-zstd", cold(50, 200))
	ours := add("ours", cold(3, 10), cold(2, 10), cold(4, 12))
	// Faster than anybody, but not always: no yardstick.
	flaky := add("stargz", cold(1, 10), sample{Error: "transport endpoint is not connected"})
	broken := add("overlayfs-gzip", sample{Error: "no space left on device"})
	g.summarize()

	for _, tt := range []struct {
		r              *row
		ratio, fetched float64
		failed         int
	}{
		{ours, 3, 5, 0},
		{tuned, 1, 10, 0},
		{zstd, 9. / 50, 100, 0},
		{flaky, 9, 5, 1},
		{broken, 0, 0, 1},
	} {
		if tt.r.Ratio != tt.ratio || tt.r.Fetched != tt.fetched || tt.r.Failed != tt.failed {
			t.Errorf("%s: ratio %v, fetched %v, failed %d; want %v, %v, %d", tt.r.Contestant, tt.r.Ratio, tt.r.Fetched, tt.r.Failed, tt.ratio, tt.fetched, tt.failed)
		}
	}
	if *ours.Total != (spread{3, 2, 4}) || *ours.FirstRUN != (spread{1.5, 1, 2}) || *ours.RUN != (spread{0.75, 0.5, 1}) {
		t.Errorf("ours: total %+v, first RUN %+v, RUN %+v", *ours.Total, *ours.FirstRUN, *ours.RUN)
	}
	if broken.Total != nil {
		t.Errorf("a row without figures has total %+v", *broken.Total)
	}
	var order []string
	for _, r := range g.Rows {
		order = append(order, r.Contestant)
	}
	if want := []string{"ours", "overlayfs-gzip", "overlayfs-zstd", "stargz", "stargz-tuned"}; !slices.Equal(order, want) {
		t.Errorf("rows %v, want %v", order, want)
	}
}

func TestContestantsMustAgree(t *testing.T) {
	g := &group{Base: "debian", Workload: "readall"}
	ours := g.row(who(t, "ours"), 1)
	ours.Samples = []sample{{Error: "broken"}, {Result: "1700"}}
	stock := g.row(who(t, "overlayfs-zstd"), 1)
	stock.Samples = []sample{{Result: "1700"}}
	if err := g.agree(); err != nil {
		t.Errorf("they agree, and yet: %v", err)
	}
	stock.Samples = append(stock.Samples, sample{Result: "1699"})
	err := g.agree()
	if err == nil {
		t.Fatal("a different result went unnoticed")
	}
	for _, part := range []string{"readall", "debian", "ours", "1700", "overlayfs-zstd", "1699"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %s", err, part)
		}
	}
}
