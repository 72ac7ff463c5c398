package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
)

func TestPlan(t *testing.T) {
	for _, tt := range []struct {
		args  string
		links string
		who   string
		steps string // base workload [phases]
	}{
		{
			"", "200", "ours overlayfs-gzip overlayfs-zstd stargz stargz-tuned",
			"debian c [again restart], debian go [], debian python [], debian java [], debian readall [], debian find [], " +
				"debian copyfrom [], go go [again restart], go readall [], go find [], go copyfrom [], " +
				"filled debian go, filled debian readall, filled debian find, filled go go, filled go readall, filled go find",
		},
		{"-quick", "200", "ours overlayfs-zstd stargz-tuned", "go go [again restart]"},
		{"-quick -contestant ours,stargz -link 50", "50", "ours stargz", "go go [again restart]"},
		{"-base debian -workload c,go -link all", "200 1000 50", "ours overlayfs-gzip overlayfs-zstd stargz stargz-tuned", "debian c [], debian go []"},
		// A phase needs the build that it repeats.
		{"-workload restart -contestant ours", "200", "ours", "debian c [restart], go go [restart]"},
		{"-base debian -workload c,filled -contestant ours", "200", "ours", "debian c [], filled debian go, filled debian readall, filled debian find"},
		{"-base go -workload filled -contestant ours", "200", "ours", "filled go go, filled go readall, filled go find"},
		{"-base go -workload c,readall -contestant ours", "200", "ours", "go readall []"},
	} {
		p, err := parse(strings.Fields(tt.args))
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		var links, names, steps []string
		for _, s := range p.shapes {
			links = append(links, s.name)
		}
		for _, c := range p.contestants {
			names = append(names, c.name)
		}
		for _, s := range p.steps() {
			steps = append(steps, s.base+" "+s.w.name+" ["+strings.Join(s.phases, " ")+"]")
		}
		for _, b := range p.bases {
			for _, w := range p.fillable(b) {
				steps = append(steps, filled+" "+b+" "+w.name)
			}
		}
		if got := strings.Join(links, " "); got != tt.links {
			t.Errorf("%q: links %s, want %s", tt.args, got, tt.links)
		}
		if got := strings.Join(names, " "); got != tt.who {
			t.Errorf("%q: contestants %s, want %s", tt.args, got, tt.who)
		}
		if got := strings.Join(steps, ", "); got != tt.steps {
			t.Errorf("%q: steps %s, want %s", tt.args, got, tt.steps)
		}
	}
}

func TestBadFlags(t *testing.T) {
	for args, want := range map[string][]string{
		"-link 100":            {"-link", `"100"`, "200, 1000, 50"},
		"-base alpine":         {"-base", `"alpine"`, "debian, go"},
		"-workload rust":       {"-workload", `"rust"`, "c, go, python", "restart"},
		"-contestant theirs":   {"-contestant", `"theirs"`, "overlayfs-zstd"},
		"-export -writer bzip": {"-writer", `"bzip"`, "ours-estargz, stock-estargz"},
		"-runs 0":              {"-runs 0"},
		"-one-layer":           {"-one-layer is for -export"},
		"-tls http3":           {"-tls http3", "http1", "http2"},
		"-base go -workload c": {"c", "go", "none"},
		"quick":                {`"quick"`},
	} {
		_, err := parse(strings.Fields(args))
		if err == nil {
			t.Errorf("%s is taken", args)
			continue
		}
		for _, part := range want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %q does not hold %s", args, err, part)
			}
		}
	}
}

// TestWriters are those that are asked for, in that order: the others are compared with the first.
func TestWriters(t *testing.T) {
	for args, want := range map[string]string{
		"-export": "ours-estargz stock-estargz stock-gzip stock-zstd ours-zstdchunked",
		"-export -writer stock-zstd,ours-estargz": "stock-zstd ours-estargz",
	} {
		p, err := parse(strings.Fields(args))
		if err != nil {
			t.Errorf("%s: %v", args, err)
		}
		var names []string
		for _, w := range p.writers {
			names = append(names, w.name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s: %s, want %s", args, got, want)
		}
	}
}

// TestTakingTurns lets everybody be first as often as everybody else.
func TestTakingTurns(t *testing.T) {
	list := []string{"a", "b", "c"}
	firsts := map[string]int{}
	for n := range 6 {
		turn := rotate(list, n)
		firsts[turn[0]]++
		if s := slices.Sorted(slices.Values(turn)); !slices.Equal(s, list) {
			t.Errorf("rotate by %d gives %v", n, turn)
		}
	}
	for _, name := range list {
		if firsts[name] != 2 {
			t.Errorf("%s is first %d times of 6", name, firsts[name])
		}
	}
	if !slices.Equal(list, []string{"a", "b", "c"}) {
		t.Errorf("the list is now %v", list)
	}
}

// TestWhoIsMeasuredFilled leaves stock stargz out.
func TestWhoIsMeasuredFilled(t *testing.T) {
	for _, c := range contestants {
		if want := !strings.HasPrefix(c.name, "stargz"); c.fills() != want {
			t.Errorf("%s: %v, want %v", c.name, c.fills(), want)
		}
	}
}

// TestContestantsAreTheIssues looks at who is measured: ours, and stock in four ways.
func TestContestantsAreTheIssues(t *testing.T) {
	kinds := map[daemon.Kind]int{}
	for _, c := range contestants {
		kinds[c.kind]++
	}
	if kinds[daemon.Ours] != 1 || kinds[daemon.StockOverlay] != 2 || kinds[daemon.StockStargz] != 1 || kinds[daemon.StockStargzTuned] != 1 {
		t.Errorf("contestants %v", kinds)
	}
}

// TestDockerfilesAreFilledIn writes every build context.
func TestDockerfilesAreFilledIn(t *testing.T) {
	for _, w := range workloads {
		dir := t.TempDir()
		if err := w.write(dir, "registry:5000/base:tag"); err != nil {
			t.Fatal(err)
		}
		said, err := content("Dockerfile")(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(said, "FROM registry:5000/base:tag ") || strings.Contains(said, "BASE") || strings.Contains(said, "START") {
			t.Errorf("%s: %s", w.name, said)
		}
		if strings.Contains(said, "RUN") != strings.Contains(said, "RUN echo '"+started+"' && ") {
			t.Errorf("%s: no RUN says that it runs:\n%s", w.name, said)
		}
	}
}
