package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// A suite is one compiled test package of BuildKit.
type suite struct {
	Name    string // also the name of the compiled test
	Package string
}

var suites = []suite{
	{"client", "github.com/moby/buildkit/client"},
	{"dockerfile", "github.com/moby/buildkit/frontend/dockerfile"},
	{"buildctl", "github.com/moby/buildkit/cmd/buildctl"},
	{"frontend", "github.com/moby/buildkit/frontend"},
	{"solver", "github.com/moby/buildkit/solver"},
}

// A side is one way of running the suites.
type side struct {
	Name        string // names files and report columns
	Daemon      string // host path of the binary that the tests know as buildkitd
	Snapshotter string // value of --oci-worker-snapshotter; "" passes no flag
	EStargz     bool   // the images the tests start from are eStargz
}

// worker is the name that the tests give the side's worker.
func (s side) worker() string {
	if s.Snapshotter == "" {
		return "oci"
	}
	return "oci-snapshotter-" + s.Snapshotter
}

// Outcomes of a test. A test is lost if the test process ended, or was
// stopped, before the test did.
const (
	pass = "pass"
	fail = "fail"
	skip = "skip"
	lost = "lost"
)

// outcome is how one test, or one part of a test, ended.
type outcome struct {
	Result  string  `json:"result"`
	Seconds float64 `json:"seconds"`
	Retried bool    `json:"retried,omitempty"` // the first try ended differently
	Log     string  `json:"log,omitempty"`     // file: of a failure, or with what Digest is of
	Digest  string  `json:"digest,omitempty"`  // of something that both sides should make alike
}

// results maps suite and test name, without the worker's name, to outcomes.
type results struct {
	Outcomes map[string]outcome `json:"outcomes"`
	Leaks    []leftovers        `json:"leaks,omitempty"`
}

// runner runs tests in sandboxes.
type runner struct {
	work     string // directory for everything this command makes
	module   map[string]string
	parallel int
	batch    int
	limit    time.Duration // of one batch
	progress io.Writer
}

// env is the environment of the tests of one side.
func (r *runner) env(s side, daemon bool) []string {
	path := inside + "/bin:" + inside + "/tools:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	if !daemon {
		path = inside + "/tools:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	env := []string{
		"PATH=" + path,
		"HOME=" + inside + "/home",
		"TMPDIR=" + inside + "/tmp",
		"BUILDKIT_REGISTRY_MIRROR_DIR=" + inside + "/mirror",
		"BUILDKIT_TEST_SIGN_FIXTURES=" + inside + "/fixtures",
		"BUILDKIT_RUN_NETWORK_INTEGRATION_TESTS=1",
		"BUILDKIT_CNI_INIT_LOCK_PATH=/run/buildkit_cni_bridge.lock",
		"FRONTEND_BUILTIN_ONLY=1",
		"BUILDKIT_UPDATE_COMPAT_GOLDENS=1",                   // see exports
		"REGISTRY_VALIDATION_MANIFESTS_URLS_ALLOW=['^http']", // of foreign layers; registry 2 needed no leave
		fmt.Sprintf("GOMAXPROCS=%d", r.parallel),             // the tests admit that many at once
	}
	if s.Snapshotter != "" {
		env = append(env, "BUILDKIT_INTEGRATION_SNAPSHOTTER="+s.Snapshotter)
	}
	return env
}

// sandbox prepares the directories for one process and describes its sandbox.
// The caller removes the directory that is returned.
func (r *runner) sandbox(s side, daemon bool) (sandbox, string, error) {
	dir, err := os.MkdirTemp(r.work, "run-")
	if err != nil {
		return sandbox{}, "", err
	}
	for _, sub := range []string{"tmp", "home", "bin", "exports"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return sandbox{}, dir, err
		}
	}
	sb := sandbox{
		Work: dir,
		Binds: map[string]string{
			"tools":    filepath.Join(r.work, "tools"),
			"fixtures": filepath.Join(r.work, "fixtures"),
			"mirror":   r.mirror(s.EStargz).dir,
		},
		Files: map[string]string{
			"/etc/buildkit/cni.json":         cniConfig,
			"/etc/buildkit/dns-cni.conflist": cniDNSConfig,
			"/etc/resolv.conf":               "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
		},
		Links:   map[string]string{},
		Env:     r.env(s, daemon),
		Leaks:   inside + "/leaks.json",
		Foreign: inside + "/mirror/" + filepath.Base(r.mirror(s.EStargz).foreignFile()),
	}
	for _, plugin := range cniPlugins {
		sb.Links["/opt/cni/bin/"+filepath.Base(plugin)] = inside + "/tools/cni-" + filepath.Base(plugin)
	}
	if daemon {
		sb.Binds["bin/buildkitd"] = s.Daemon
		sb.Binds[filepath.Join(r.module["client"], "testdata", "compatibility")] = filepath.Join(dir, "exports")
	}
	return sb, dir, nil
}

func (r *runner) mirror(estargz bool) mirror {
	if estargz {
		return mirror{dir: filepath.Join(r.work, "mirror-estargz"), estargz: true}
	}
	return mirror{dir: filepath.Join(r.work, "mirror")}
}

// testName is a test as the test package numbers it: the function that go
// test knows and the case within, without the worker and what varies.
type testName struct{ top, name string }

var reWorker = regexp.MustCompile(`/worker=(oci(?:-snapshotter-[a-z0-9]+)?)(/|$)`)

// split takes a full name apart. key is the name without the worker's, and
// leaf says whether it is a whole case rather than a part that the case calls.
func split(full, worker string) (tn testName, key string, ok bool) {
	loc := reWorker.FindStringSubmatchIndex(full)
	if loc == nil || full[loc[2]:loc[3]] != worker {
		return testName{}, "", false
	}
	top, name, found := strings.Cut(full[:loc[0]], "/")
	if !found {
		return testName{}, "", false
	}
	key = full[:loc[0]]
	if loc[4] < len(full) && full[loc[4]] == '/' {
		key += full[loc[4]:]
	}
	return testName{top, name}, key, true
}

// list asks a suite for its tests: without a buildkitd on PATH each fails at
// once, having told its name.
func (r *runner) list(ctx context.Context, su suite, s side, match *regexp.Regexp) ([]testName, error) {
	sb, dir, err := r.sandbox(s, false)
	defer os.RemoveAll(dir)
	if err != nil {
		return nil, err
	}
	sb.Args = []string{inside + "/tools/" + su.Name + ".test", "-test.v", "-test.run=Integration$/./^worker=" + s.worker() + "$"}
	sb.Dir = r.module[su.Name]
	pr, pw := io.Pipe()
	var names []testName
	var wg sync.WaitGroup
	wg.Go(func() {
		sc := bufio.NewScanner(pr)
		sc.Buffer(nil, 16<<20)
		for sc.Scan() {
			_, full, ok := strings.Cut(sc.Text(), "=== RUN   ") // output without a line end may precede it
			if !ok {
				continue
			}
			tn, _, ok := split(full, s.worker())
			if ok && match.MatchString(tn.name) && !slices.Contains(names, tn) {
				names = append(names, tn)
			}
		}
		_, _ = io.Copy(io.Discard, pr)
	})
	err = sb.run(ctx, pw, pw)
	pw.Close()
	wg.Wait()
	if len(names) == 0 {
		return nil, fmt.Errorf("the tests of %s told no names (%w)", su.Package, errors.Join(err, errors.New("run with -v to see more")))
	}
	return names, nil
}

// run runs the tests of a suite and calls save after each batch, so that an
// interrupted run can go on. A test that fails is run a second time alone.
func (r *runner) run(ctx context.Context, su suite, s side, names []testName, res *results, save func() error) error {
	byTop := map[string][]testName{}
	var tops []string
	for _, tn := range names {
		if _, ok := byTop[tn.top]; !ok {
			tops = append(tops, tn.top)
		}
		byTop[tn.top] = append(byTop[tn.top], tn)
	}
	done := 0
	for _, top := range tops {
		for batch := range slices.Chunk(byTop[top], r.batch) {
			start := time.Now()
			if batch[0].top == compatibility {
				if err := os.RemoveAll(r.exports(s)); err != nil {
					return err
				}
			}
			got, leaks, err := r.once(ctx, su, s, batch, r.parallel, r.limit)
			if err != nil {
				return err
			}
			var again []testName
			for _, tn := range batch {
				if !got.ended(tn) {
					again = append(again, tn)
				}
			}
			for _, tn := range again {
				second, more, err := r.once(ctx, su, s, []testName{tn}, 1, 7*time.Minute)
				if err != nil {
					return err
				}
				leaks = more
				got.replace(tn, second)
			}
			n := map[string]int{}
			for _, tn := range batch {
				n[got.whole(tn)]++
			}
			for full, o := range got {
				if _, key, ok := split(full, s.worker()); ok {
					if o.Result == fail || o.Result == lost {
						o.Log, err = r.writeLog(su, s, key, o.output)
						if err != nil {
							return err
						}
					}
					res.Outcomes[su.Name+": "+key] = o.outcome
				}
			}
			if top == compatibility {
				if err := r.addExports(su, s, res); err != nil {
					return err
				}
			}
			if len(leaks.Mounts)+len(leaks.Processes) > 0 {
				res.Leaks = append(res.Leaks, leaks)
			}
			if err := save(); err != nil {
				return err
			}
			done += len(batch)
			fmt.Fprintf(r.progress, "%s  %-14s %-10s %4d of %d tests  %d passed %d failed %d skipped %d lost, %d run again (%.0f s)\n",
				time.Now().Format(time.TimeOnly), s.Name, su.Name, done, len(names), n[pass], n[fail], n[skip], n[lost], len(again), time.Since(start).Seconds())
		}
	}
	return nil
}

// compatibility is the test that exports images in every way and compares
// their manifests and configurations with files. These know the real busybox
// by its digest, so here the test is told to write the files instead, and
// what the sides wrote is compared.
const compatibility = "TestCompatibilityIntegration"

func (r *runner) exports(s side) string { return filepath.Join(r.work, "exports", s.Name) }

// addExports adds an outcome for each file that the tests wrote.
func (r *runner) addExports(su suite, s side, res *results) error {
	root := r.exports(s)
	return filepath.WalkDir(root, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		key, err := fileKey(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		res.Outcomes[su.Name+": "+compatibility+"/exports/"+rel] = outcome{Result: pass, Digest: key, Log: name}
		return nil
	})
}

// event is a line of test2json.
type event struct {
	Action  string
	Test    string
	Output  string
	Elapsed float64
}

type run struct {
	outcome
	output []string
}

// runs maps full test names to what happened.
type runs map[string]*run

func belongs(full string, tn testName) bool {
	return strings.HasPrefix(full, tn.top+"/"+tn.name+"/worker=")
}

// ended says whether every case of a test ended well.
func (rs runs) ended(tn testName) bool { w := rs.whole(tn); return w == pass || w == skip }

// whole is the worst outcome of the cases of a test.
func (rs runs) whole(tn testName) string {
	worst := ""
	for full, o := range rs {
		if belongs(full, tn) {
			worst = worse(worst, o.Result)
		}
	}
	if worst == "" {
		return lost
	}
	return worst
}

func worse(a, b string) string {
	order := []string{"", skip, pass, fail, lost}
	return order[max(slices.Index(order, a), slices.Index(order, b))]
}

// replace puts the second try of a test in the place of the first.
func (rs runs) replace(tn testName, second runs) {
	for full := range rs {
		if o, ok := second[full]; belongs(full, tn) && (!ok || o.Result == lost) && rs[full].Result == fail {
			continue // a failure says more than a second try that ended early
		} else if belongs(full, tn) {
			delete(rs, full)
		}
	}
	for full, o := range second {
		if _, kept := rs[full]; belongs(full, tn) && !kept {
			o.Retried = true
			rs[full] = o
		}
	}
}

// once runs a batch in one process.
func (r *runner) once(ctx context.Context, su suite, s side, batch []testName, parallel int, limit time.Duration) (runs, leftovers, error) {
	sb, dir, err := r.sandbox(s, true)
	defer os.RemoveAll(dir)
	if err != nil {
		return nil, leftovers{}, err
	}
	var alt []string
	for _, tn := range batch {
		alt = append(alt, regexp.QuoteMeta(tn.name))
	}
	sb.Args = []string{
		inside + "/tools/" + su.Name + ".test", "-test.v=test2json", "-test.paniconexit0",
		fmt.Sprintf("-test.parallel=%d", parallel),
		fmt.Sprintf("-test.timeout=%s", limit),
		"-test.run=^" + batch[0].top + "$/^(" + strings.Join(alt, "|") + ")$/^worker=" + s.worker() + "$",
	}
	sb.Dir = r.module[su.Name]

	// The test process stops itself at the limit; this is for when it can't.
	ctx, cancel := context.WithTimeoutCause(ctx, limit+time.Minute, fmt.Errorf("batch of %d tests ran longer than %s", len(batch), limit))
	defer cancel()
	got := runs{}
	conv := exec.CommandContext(ctx, "go", "tool", "test2json", "-t")
	in, err := conv.StdinPipe()
	if err != nil {
		return nil, leftovers{}, err
	}
	out, err := conv.StdoutPipe()
	if err != nil {
		return nil, leftovers{}, err
	}
	conv.Stderr = os.Stderr
	if err := conv.Start(); err != nil {
		return nil, leftovers{}, fmt.Errorf("start go tool test2json: %w", err)
	}
	var wg sync.WaitGroup
	var parseErr error
	wg.Go(func() { parseErr = got.read(out) })
	runErr := sb.run(ctx, in, in)
	in.Close()
	wg.Wait()
	if err := errors.Join(conv.Wait(), parseErr); err != nil {
		return nil, leftovers{}, fmt.Errorf("read the test's output: %w", err)
	}
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) && len(got) == 0 {
		return nil, leftovers{}, err
	}
	if len(got) == 0 {
		return nil, leftovers{}, fmt.Errorf("no test of %s ran on %s: %w", su.Package, s.Name, runErr)
	}
	if batch[0].top == compatibility {
		if err := os.CopyFS(r.exports(s), os.DirFS(filepath.Join(dir, "exports"))); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, leftovers{}, fmt.Errorf("keep exported images: %w", err)
		}
	}
	var leaks leftovers
	if b, err := os.ReadFile(filepath.Join(dir, "leaks.json")); err == nil {
		if err := json.Unmarshal(b, &leaks); err != nil {
			return nil, leftovers{}, err
		}
	}
	return got, leaks, nil
}

func (rs runs) read(out io.Reader) error {
	dec := json.NewDecoder(out)
	for {
		var e event
		err := dec.Decode(&e)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Test == "" {
			continue
		}
		o := rs[e.Test]
		if o == nil {
			o = &run{outcome: outcome{Result: lost}}
			rs[e.Test] = o
		}
		switch e.Action {
		case "output":
			o.output = append(o.output, e.Output)
		case pass, fail, skip:
			o.Result, o.Seconds = e.Action, e.Elapsed
			if e.Action != fail {
				o.output = nil
			}
		}
	}
}

var reOdd = regexp.MustCompile(`[^A-Za-z0-9.=_-]+`)

func (r *runner) writeLog(su suite, s side, key string, lines []string) (string, error) {
	file := filepath.Join(r.work, "logs", s.Name, su.Name, reOdd.ReplaceAllString(key, "_")+".log")
	if len(filepath.Base(file)) > 200 {
		file = file[:len(filepath.Dir(file))+150] + ".log"
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return "", err
	}
	return file, os.WriteFile(file, []byte(strings.Join(lines, "")), 0o644) //nolint:gosec // a log
}
