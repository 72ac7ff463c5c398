package main

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/buildkit/util/profiler"
	"github.com/urfave/cli/v3"
)

// stockFlag is a flag in the source of stock buildkitd.
type stockFlag struct {
	kind   string // StringFlag, ...
	hidden bool
	env    []string
}

// stockFlags reads the flags of stock buildkitd for Linux out of its source.
func stockFlags(t *testing.T) map[string]stockFlag {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/buildkit").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	dir := filepath.Join(strings.TrimSpace(string(out)), "cmd", "buildkitd")
	flags := map[string]stockFlag{}
	for _, file := range []string{"main.go", "main_oci_worker.go", "main_containerd_worker.go", "service_unix.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(dir, file), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		var variable string // the rootless flags are named by a variable
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				if id, ok := n.Lhs[0].(*ast.Ident); ok && id.Name == "n" {
					variable = stringLit(n.Rhs[0])
				}
			case *ast.CompositeLit:
				sel, ok := n.Type.(*ast.SelectorExpr)
				if !ok || !strings.HasSuffix(sel.Sel.Name, "Flag") {
					return true
				}
				name, flag := readFlag(n)
				if name == "" {
					name = variable
				}
				flag.kind = sel.Sel.Name
				flags[name] = flag
			}
			return true
		})
	}
	if len(flags) < 50 {
		t.Fatalf("found only %d flags in %s", len(flags), dir)
	}
	return flags
}

func readFlag(lit *ast.CompositeLit) (name string, flag stockFlag) {
	for _, e := range lit.Elts {
		kv := e.(*ast.KeyValueExpr)
		switch kv.Key.(*ast.Ident).Name {
		case "Name":
			name = stringLit(kv.Value)
		case "Hidden":
			id, ok := kv.Value.(*ast.Ident)
			flag.hidden = ok && id.Name == "true"
		case "Sources":
			for _, arg := range kv.Value.(*ast.CallExpr).Args {
				flag.env = append(flag.env, stringLit(arg))
			}
		}
	}
	return name, flag
}

func stringLit(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok {
		return ""
	}
	s, _ := strconv.Unquote(lit.Value)
	return s
}

// A flag of stock's that we lack, or whose type or environment variable differs, fails here when BuildKit is updated.
func TestEveryStockFlagIsOurs(t *testing.T) {
	ours := map[string]cli.Flag{}
	for _, f := range newApp(new(bytes.Buffer), new(bytes.Buffer)).Flags {
		for _, name := range f.Names() {
			if ours[name] != nil {
				t.Errorf("--%s is defined twice", name)
			}
			ours[name] = f
		}
	}
	stock := stockFlags(t)
	for name, want := range stock {
		f := ours[name]
		if f == nil {
			t.Errorf("--%s of stock is missing", name)
			continue
		}
		if kind := strings.TrimPrefix(flagKind(f), "*cli."); kind != want.kind {
			t.Errorf("--%s is a %s, stock's a %s", name, kind, want.kind)
		}
		containerd := strings.HasPrefix(name, "containerd-")
		if visible := f.(cli.VisibleFlag).IsVisible(); visible == (want.hidden || containerd) {
			t.Errorf("--%s: visible is %v", name, visible)
		}
		if env := f.(cli.DocGenerationFlag).GetEnvVars(); !slices.Equal(env, want.env) {
			t.Errorf("--%s comes from %q, stock's from %q", name, env, want.env)
		}
	}

	var profile cli.Command
	profiler.Attach(&profile)
	for _, f := range profile.Flags {
		if name := f.Names()[0]; ours[name] == nil {
			t.Errorf("--%s of the profiler is missing", name)
		}
		delete(ours, f.Names()[0])
	}
	for name := range ours {
		if _, ok := stock[name]; !ok && name != "lazy-mount" {
			t.Errorf("--%s is neither stock's nor known to this test", name)
		}
	}
}

func flagKind(f cli.Flag) string {
	switch f.(type) {
	case *cli.StringFlag:
		return "StringFlag"
	case *cli.StringSliceFlag:
		return "StringSliceFlag"
	case *cli.BoolFlag:
		return "BoolFlag"
	case *cli.IntFlag:
		return "IntFlag"
	}
	return ""
}

func TestHelp(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if status := run([]string{"buildkitd", "--help"}, &stdout, &stderr); status != 0 || stderr.Len() > 0 {
		t.Fatalf("status %d, stderr %q", status, stderr.String())
	}
	help := stdout.String()

	var groups []string
	for _, m := range regexp.MustCompile(`(?m)^(\S.*):$`).FindAllStringSubmatch(help, -1) {
		groups = append(groups, m[1])
	}
	want := []string{"Usage", "Commands", "General", "Daemon", "Devices", "Garbage collection", "Lazy loading", "Listening", "Logs and debugging", "Network of build steps", "Security", "Worker (OCI)"}
	if !slices.Equal(groups, want) {
		t.Errorf("groups are %q\nwant       %q", groups, want)
	}
	for _, f := range daemonFlags(new(builtinDefaults())) {
		if n := strings.Count(help, "   --"+f.Names()[0]+" "); n != 1 && f.(cli.VisibleFlag).IsVisible() {
			t.Errorf("--%s is listed %d times", f.Names()[0], n)
		}
	}
	for _, hidden := range []string{"containerd", "--trace", "--profile-"} {
		if strings.Contains(help, hidden) {
			t.Errorf("%s is shown", hidden)
		}
	}
	for line := range strings.Lines(help) {
		if len(line) > 180 {
			t.Errorf("%d characters: %s", len(line), line)
		}
	}
}

// buildx splits the answer at white space and refuses anything but four fields.
func TestVersionHasFourFields(t *testing.T) {
	o := runDaemon(t, daemonCommand(t, nil, "--version"))
	fields := strings.Fields(o.stdout)
	if o.status != 0 || len(fields) != 4 || o.stderr != "" {
		t.Fatalf("status %d, stdout %q, stderr %q", o.status, o.stdout, o.stderr)
	}
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Version}}", "github.com/moby/buildkit").Output()
	if err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`^` + regexp.QuoteMeta(strings.TrimSpace(string(out))) + `\+lazy\.\d+\.\d+\.\d+`)
	if fields[0] != "buildkitd-lazy" || fields[1] != productPackage || !want.MatchString(fields[2]) {
		t.Errorf("got %q, want the version to match %s", fields, want)
	}
}

func TestWrongCommandLine(t *testing.T) {
	for _, tt := range []struct {
		args string
		want string // on stderr, once, and nothing else
	}{
		{"--rooot /x", "unknown flag --rooot; did you mean --root? (buildkitd-lazy --help lists the flags)"},
		{"--oci-worker-snapshoter=x", "unknown flag --oci-worker-snapshoter; did you mean --oci-worker-snapshotter? (buildkitd-lazy --help lists the flags)"},
		{"--lazy_mount off", "unknown flag --lazy_mount; did you mean --lazy-mount? (buildkitd-lazy --help lists the flags)"},
		{"--root", "flag needs an argument: --root; buildkitd-lazy --help lists the flags"},
		{"check --formt x", "unknown flag --formt; did you mean --format? (buildkitd-lazy check --help lists the flags)"},
		{"check --format {{", "--format: template: --format:1: unclosed action"},
		{"check --format {{.Nothing}}", `--format: template: --format:1:2: executing "--format" at <.Nothing>: can't evaluate field Nothing in type main.checkResult`},
		{"check this", `check takes no arguments, got "this"`},
		{"convert a", "convert takes a source and a destination, got 1 arguments; buildkitd-lazy convert --help shows how"},
		{"convert --compression=snappy a b", "--compression=snappy: there is no such format of lazy layers; want estargz or zstdchunked"},
		{"convert --compression-level=10 a b", "--compression-level=10: estargz has levels -2 to 9"},
		{"convert --compression=zstdchunked --compression-level=best a b", "--compression-level=best: zstdchunked has levels 0 to 22"},
		{"convert --estargz-chunk-size=1k a b", "--estargz-chunk-size=1k: want 4096 to 67108864 bytes, or a number with a unit as in 64k or 4MiB"},
		{"convert --zstdchunked-chunk-size=1m a b", "--zstdchunked-chunk-size=1m is for --compression=zstdchunked only"},
		{"convert --compression=zstdchunked --zstdchunked-chunk-size=1g a b", "--zstdchunked-chunk-size=1g: want 4096 to 67108864 bytes, or a number with a unit as in 64k or 4MiB"},
		{"convert --jobs=-1 a b", "--jobs=-1: want a number from 1"},
		{"convert --progress=fancy a b", `--progress=fancy: want one of ["auto" "plain" "tty" "quiet" "rawjson"]`},
		{"convert --platform=a/b/c/d a b", `--platform=a/b/c/d: "a/b/c/d": cannot parse platform specifier: invalid argument; want one such as linux/amd64`},
		{"convert a oci-layout://", "reference oci-layout://: no directory; want oci-layout://DIR[:TAG|@DIGEST]"},
		{"inspect --config /nowhere/buildkitd.toml a", "--config: stat /nowhere/buildkitd.toml: no such file or directory"},
		{"--config /nowhere/buildkitd.toml convert a b", "--config: stat /nowhere/buildkitd.toml: no such file or directory"},
		{"convert --bogus a b", "unknown flag --bogus; buildkitd-lazy convert --help lists the flags"},
		{"convert --format {{.Lazy}} a b", `--format: template: --format:1:2: executing "--format" at <.Lazy>: can't evaluate field Lazy in type convert.Result`},
		{"convert --format {{range.Layers}}{{.TOC}}{{end}} a b", `--format: template: --format:1:18: executing "--format" at <.TOC>: can't evaluate field TOC in type convert.LayerResult`},
		{"inspect --format {{range.Images}}{{range.Layers}}{{.TOC}}{{end}}{{end}} a", `--format: template: --format:1:34: executing "--format" at <.TOC>: can't evaluate field TOC in type inspect.Layer`},
		{"inspect a b", "inspect takes one image, got 2 arguments; buildkitd-lazy inspect --help shows how"},
		{"chekc", `unknown command "chekc"; the commands are check, convert, inspect, and the daemon takes flags alone`},
	} {
		t.Run(tt.args, func(t *testing.T) {
			o := runDaemon(t, daemonCommand(t, nil, strings.Fields(tt.args)...))
			if o.status != 1 || o.stdout != "" || o.stderr != "buildkitd-lazy: "+tt.want+"\n" {
				t.Errorf("status %d, stdout %q, stderr %q", o.status, o.stdout, o.stderr)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	o := runDaemon(t, daemonCommand(t, nil, "--root", dir, "check", "--lazy-mount=off", "--format", "json"))
	var got struct {
		StateDir string
		Checks   []struct{ Name string }
		Builds   bool
		Lazy     string
		Reason   string
	}
	if err := json.Unmarshal([]byte(o.stdout), &got); err != nil {
		t.Fatalf("%v in %q (stderr %q)", err, o.stdout, o.stderr)
	}
	if got.StateDir != dir || len(got.Checks) < 5 || got.Lazy != "off" || got.Reason == "" {
		t.Errorf("got %+v", got)
	}
	if (o.status == 0) != got.Builds {
		t.Errorf("status %d, builds %v", o.status, got.Builds)
	}

	file := filepath.Join(dir, "buildkitd.toml")
	if err := os.WriteFile(file, []byte("[worker.oci]\nsnapshotter = \"native\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	eager := runDaemon(t, daemonCommand(t, nil, "check", "--root", dir, "--config", file, "--format", "{{.Lazy}} {{.Reason}}"))
	if eager.stdout != "off the snapshotter \"native\" is configured\n" {
		t.Errorf("with a snapshotter configured: %+v", eager)
	}

	none := runDaemon(t, daemonCommand(t, nil, "check", "--root", dir, "--oci-worker-binary=/no/such/runtime"))
	if none.status != 1 || !strings.Contains(none.stdout, "MISSING") || !strings.Contains(none.stdout, "builds cannot run here") ||
		!strings.Contains(none.lastLine(), "no build can run on this host: ") || !strings.Contains(none.lastLine(), "runc") {
		t.Errorf("without a runtime: %+v", none)
	}
}
