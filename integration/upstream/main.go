// Command upstream runs BuildKit's own integration tests (packages client,
// frontend/dockerfile, cmd/buildctl, frontend and solver) against stock buildkitd and against buildkitd-lazy, on
// this machine and offline, and lists what stock passes and ours does not.
//
//	go -C integration/upstream run .                     # everything
//	go -C integration/upstream run . -run '^TestCopy'    # some tests
//	go -C integration/upstream run . -comparison flag    # one comparison
//
// There are three comparisons, differing in what the tests start from and in
// a flag of the daemons:
//
//   - plain: the base images have gzip layers, as the tests' authors know them;
//   - estargz: the same base images as eStargz, so that ours mounts them lazily
//     while stock, with its overlayfs snapshotter, pulls them;
//   - flag: the same, both daemons with --oci-worker-snapshotter=stargz.
//
// Each batch of tests runs in its own namespaces with nothing but a loopback
// interface: see sandbox. The images are made here of the static busybox: see
// mirror. Tests that fail on stock too, for want of a network or of an image
// with apk in it, say, are counted as not comparable. What stock's outcomes
// depend on is hashed, and they are kept under that key, so that further runs
// only run ours.
//
// A test that fails is run again alone; the second outcome counts, and the
// report says so. Mounts and processes that outlive a batch are reported.
//
// The exit status is 0 if there is no difference, 1 if there is, 2 if the
// tests could not be run.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == sandboxArg {
		status, err := sandboxMain(os.Args[2])
		if err != nil {
			fmt.Fprintln(os.Stderr, "upstream:", err)
			os.Exit(125)
		}
		os.Exit(status)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	different, err := compare(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "upstream:", err)
		os.Exit(2)
	case different:
		os.Exit(1)
	}
}

// stockTool is where make tools puts the stock daemon.
const stockTool = "../../bin/tools/buildkitd"

// options are the command's flags.
type options struct {
	ours, stock string
	work        string
	comparisons []string
	suites      []string
	match       *regexp.Regexp
	parallel    int
	fresh       bool
	only        string
}

func parse(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("upstream", flag.ContinueOnError)
	fs.StringVar(&o.ours, "ours", "../../bin/buildkitd-lazy", "our daemon")
	fs.StringVar(&o.stock, "stock", stockTool, "stock daemon; this one is built from go.mod's versions if it's missing")
	fs.StringVar(&o.work, "work", "../../bin/upstream", "directory for tools, images, kept results, logs and the report")
	comparisons := fs.String("comparison", "plain,estargz,flag", "comma-separated: plain, estargz, flag")
	names := fs.String("suite", "client,dockerfile,buildctl,frontend,solver", "comma-separated: client, dockerfile, buildctl, frontend, solver")
	match := fs.String("run", ".", "regular expression for the names of tests, such as ^TestCopy")
	fs.IntVar(&o.parallel, "parallel", 3, "tests at a time")
	fs.BoolVar(&o.fresh, "fresh", false, "run stock again although its results are kept")
	fs.StringVar(&o.only, "only", "", "run only this side: stock or ours")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if o.only != "" && o.only != "stock" && o.only != "ours" {
		return o, fmt.Errorf("-only=%s: want stock or ours", o.only)
	}
	var err error
	if o.match, err = regexp.Compile(*match); err != nil {
		return o, fmt.Errorf("-run: %w", err)
	}
	o.comparisons, o.suites = strings.Split(*comparisons, ","), strings.Split(*names, ",")
	for _, p := range []*string{&o.ours, &o.stock, &o.work} {
		if *p, err = filepath.Abs(*p); err != nil {
			return o, err
		}
	}
	return o, nil
}

// sides returns the two sides of a comparison.
func (o options) sides(comparison string) (stock, ours side, err error) {
	stock = side{Name: "stock-" + comparison, Daemon: o.stock}
	ours = side{Name: "ours-" + comparison, Daemon: o.ours}
	switch comparison {
	case "plain":
	case "estargz":
		stock.EStargz, ours.EStargz = true, true
	case "flag":
		stock.EStargz, ours.EStargz = true, true
		stock.Snapshotter, ours.Snapshotter = "stargz", "stargz"
	default:
		err = fmt.Errorf("unknown comparison %q: want plain, estargz or flag", comparison)
	}
	return stock, ours, err
}

func compare(ctx context.Context, args []string) (different bool, err error) {
	o, err := parse(args)
	if err != nil {
		return false, err
	}
	if os.Getuid() != 0 {
		return false, errors.New("BuildKit's integration tests need root")
	}
	if _, err := os.Stat(o.ours); err != nil && o.only != "stock" {
		return false, fmt.Errorf("%w; make build", err)
	}
	r := &runner{work: o.work, module: map[string]string{}, parallel: o.parallel, batch: 40, limit: 20 * time.Minute, progress: os.Stderr}
	if err := os.MkdirAll(o.work, 0o755); err != nil {
		return false, err
	}
	unlock, err := lock(o.work)
	if err != nil {
		return false, err
	}
	defer unlock()
	stale, _ := filepath.Glob(filepath.Join(o.work, "run-*"))
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			return false, err
		}
	}

	if err := r.buildTools(ctx); err != nil {
		return false, err
	}
	if _, err := os.Stat(o.stock); err != nil && o.only != "ours" {
		if tool, _ := filepath.Abs(stockTool); o.stock != tool {
			return false, err
		}
		if o.stock, err = r.buildStock(ctx); err != nil {
			return false, err
		}
	}
	if err := r.fixtures(ctx); err != nil {
		return false, err
	}

	rep := report{Started: time.Now().UTC(), Run: o.match.String()}
	for _, comparison := range o.comparisons {
		c, err := r.compareSides(ctx, o, comparison)
		if err != nil {
			return false, err
		}
		rep.Comparisons = append(rep.Comparisons, c)
		different = different || len(c.Differences) > 0
	}
	rep.explain()
	if err := writeJSON(filepath.Join(o.work, "report.json"), rep); err != nil {
		return false, err
	}
	text := rep.text()
	fmt.Print(text)
	return different, os.WriteFile(filepath.Join(o.work, "report.txt"), []byte(text), 0o644) //nolint:gosec // a report
}

func (r *runner) compareSides(ctx context.Context, o options, name string) (comparison, error) {
	stock, ours, err := o.sides(name)
	if err != nil {
		return comparison{}, err
	}
	if err := r.mirror(stock.EStargz).build(ctx, filepath.Join(r.work, "tools", "registry")); err != nil {
		return comparison{}, fmt.Errorf("make images: %w", err)
	}
	stockRes := results{Outcomes: map[string]outcome{}}
	oursRes := results{Outcomes: map[string]outcome{}}
	var selected []string
	for _, su := range suites {
		if !slices.Contains(o.suites, su.Name) {
			continue
		}
		names, err := r.list(ctx, su, stock, o.match)
		if err != nil {
			if o.match.String() != "." {
				continue // the other suite may have the test
			}
			return comparison{}, err
		}
		for _, tn := range names {
			selected = append(selected, su.Name+": "+tn.top+"/"+tn.name)
		}
		if o.only != "ours" {
			if err := r.kept(ctx, su, stock, names, o.fresh, &stockRes); err != nil {
				return comparison{}, err
			}
		}
		if o.only != "stock" {
			if err := r.run(ctx, su, ours, names, &oursRes, func() error {
				return writeJSON(filepath.Join(r.work, "results", ours.Name+"-"+su.Name+".json"), oursRes)
			}); err != nil {
				return comparison{}, err
			}
		}
	}
	if len(selected) == 0 {
		return comparison{}, fmt.Errorf("no test matches %s", o.match)
	}
	c := diff(name, stockRes, oursRes, o.only == "")
	c.Tests = len(selected)
	return c, nil
}

// kept adds stock's outcomes, running those tests whose outcome is not known.
func (r *runner) kept(ctx context.Context, su suite, s side, names []testName, fresh bool, res *results) error {
	key, err := fileKey(s.Daemon, filepath.Join(r.work, "tools", su.Name+".test"))
	if err != nil {
		return err
	}
	file := filepath.Join(r.work, "results", fmt.Sprintf("%s-%s-%s.json", s.Name, su.Name, key))
	known := results{Outcomes: map[string]outcome{}}
	if b, err := os.ReadFile(file); err == nil {
		if err := json.Unmarshal(b, &known); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var missing []testName
	wanted := map[string]bool{}
	for _, tn := range names {
		k := su.Name + ": " + tn.top + "/" + tn.name
		wanted[k] = true
		found := false
		for have := range known.Outcomes {
			if have == k || strings.HasPrefix(have, k+"/") {
				found = true
				if fresh {
					delete(known.Outcomes, have)
				}
			}
		}
		if !found || fresh {
			missing = append(missing, tn)
		}
	}
	if len(missing) > 0 {
		if err := r.run(ctx, su, s, missing, &known, func() error { return writeJSON(file, known) }); err != nil {
			return err
		}
	}
	for k, v := range known.Outcomes {
		if wanted[caseName(k)] || strings.HasPrefix(k, su.Name+": "+compatibility+"/exports/") && slices.ContainsFunc(names, func(tn testName) bool { return tn.top == compatibility }) {
			res.Outcomes[k] = v
		}
	}
	res.Leaks = append(res.Leaks, known.Leaks...)
	return nil
}

// caseName cuts a result's name down to suite, function and case.
func caseName(key string) string {
	parts := strings.SplitN(key, "/", 3)
	return strings.Join(parts[:min(2, len(parts))], "/")
}

// lock keeps two runs from using one working directory.
func lock(dir string) (func(), error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is in use by another run", dir)
	}
	return func() { f.Close() }, nil
}

// diff lists the tests that stock passes and ours does not.
func diff(name string, stock, ours results, both bool) comparison {
	c := comparison{Name: name, Stock: count(stock), Ours: count(ours)}
	if !both {
		return c
	}
	for key, st := range stock.Outcomes {
		if st.Result != pass {
			c.NotComparable = append(c.NotComparable, failure{Test: key, Stock: st.Result, Ours: cmp.Or(ours.Outcomes[key].Result, "absent"), Log: st.Log})
			continue
		}
		ou, ok := ours.Outcomes[key]
		if ok && ou.Result == pass && ou.Digest != st.Digest {
			c.Differences = append(c.Differences, failure{Test: key, Stock: st.Log, Ours: "other bytes", Log: ou.Log})
			continue
		}
		if ok && ou.Result == pass {
			if ou.Retried {
				c.Retried = append(c.Retried, key)
			}
			continue
		}
		d := failure{Test: key, Stock: st.Result, Ours: cmp.Or(ou.Result, "absent"), Log: ou.Log, Excerpt: excerpt(ou.Log)}
		c.Differences = append(c.Differences, d)
	}
	// A parent fails if a part does: list the part only.
	c.Differences = slices.DeleteFunc(c.Differences, func(d failure) bool {
		return slices.ContainsFunc(c.Differences, func(e failure) bool {
			return e.Ours != "absent" && strings.HasPrefix(e.Test, d.Test+"/")
		}) || d.Ours == "absent" && slices.ContainsFunc(c.Differences, func(e failure) bool {
			return strings.HasPrefix(d.Test, e.Test+"/")
		})
	})
	byName := func(a, b failure) int { return cmp.Compare(a.Test, b.Test) }
	slices.SortFunc(c.Differences, byName)
	slices.SortFunc(c.NotComparable, byName)
	slices.Sort(c.Retried)
	return c
}
