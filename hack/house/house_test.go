// Package house tests the repository itself: what reviewers would otherwise have to look for.
package house

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const top = "../.."

// Every package of every module has one package doc, in one file, that begins as godoc wants it.
func TestPackageDocs(t *testing.T) {
	packages := map[string][]string{}
	walk(t, func(path string) {
		// What examples build is read by people as it is, in a Dockerfile's context.
		if strings.HasSuffix(path, ".go") && !strings.HasPrefix(path, "examples/") {
			packages[filepath.Dir(path)] = append(packages[filepath.Dir(path)], path)
		}
	})
	if len(packages) < 5 {
		t.Fatalf("only %d packages found below %s", len(packages), top)
	}
	for dir, files := range packages {
		tested := slices.ContainsFunc(files, func(f string) bool { return !strings.HasSuffix(f, "_test.go") })
		var documented []string
		for _, file := range files {
			// A package of tests alone has its doc in one of them.
			if tested && strings.HasSuffix(file, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(top, file), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Error(err)
				continue
			}
			if f.Doc == nil {
				continue
			}
			documented = append(documented, file)
			want := "Package " + f.Name.Name + " "
			if f.Name.Name == "main" {
				want = "Command " + filepath.Base(dir) + " "
			}
			if !strings.HasPrefix(f.Doc.Text(), want) {
				t.Errorf("%s: the package doc begins %.40q, want %q", file, f.Doc.Text(), want)
			}
		}
		if len(documented) != 1 {
			t.Errorf("%s: %d package docs, want 1: %v", dir, len(documented), documented)
		}
	}
}

// A link in a page leads to a file of this repository, or out of it.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.*)$`)
	walk(t, func(path string) {
		if !strings.HasSuffix(path, ".md") {
			return
		}
		page, err := os.ReadFile(filepath.Join(top, path))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(page), -1) {
			target, fragment, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			to := filepath.Join(top, filepath.Dir(path), target)
			if target == "" {
				to = filepath.Join(top, path)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: link to %s: %v", path, m[1], err)
				continue
			}
			if fragment == "" || !strings.HasSuffix(to, ".md") {
				continue
			}
			linked, err := os.ReadFile(to)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(heading.FindAllStringSubmatch(string(linked), -1), func(h []string) bool { return anchor(h[1]) == fragment }) {
				t.Errorf("%s: link to %s: no such heading", path, m[1])
			}
		}
	})
}

// anchor is what GitHub makes of a heading.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z':
			return r
		}
		return -1
	}, strings.ToLower(heading))
}

// The tests that the architecture page names are there.
func TestNamedTests(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(top, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	walk(t, func(path string) {
		if !strings.HasSuffix(path, "_test.go") {
			return
		}
		src, err := os.ReadFile(filepath.Join(top, path))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)`).FindAllStringSubmatch(string(src), -1) {
			have[m[1]] = true
		}
	})
	named := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(string(page), -1)
	if len(named) < 5 {
		t.Errorf("docs/architecture.md names only %d tests", len(named))
	}
	for _, m := range named {
		if !have[m[1]] {
			t.Errorf("docs/architecture.md names %s, which does not exist", m[1])
		}
	}
}

// `make help` is complete, and CI calls make and nothing else.
func TestMakefile(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(top, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, m := range regexp.MustCompile(`(?m)^\.PHONY: (\S+)\n(\S+):(.*)$`).FindAllStringSubmatch(string(makefile), -1) {
		targets = append(targets, m[2])
		if m[1] != m[2] {
			t.Errorf("Makefile: .PHONY %s stands above %s", m[1], m[2])
		}
		if !strings.Contains(m[3], " ## ") {
			t.Errorf("Makefile: %s has no ## help", m[2])
		}
	}
	for _, want := range []string{"help", "build", "test", "integration", "bench", "lint", "fuzz", "image", "demo", "install", "clean", "ci"} {
		if !slices.Contains(targets, want) {
			t.Errorf("Makefile: no target %s, or no .PHONY above it", want)
		}
	}
	run, err := os.ReadFile(filepath.Join(top, ".ci/run"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^\s*(go|golangci-lint|apt-get|hack/\S+) `).FindAllString(string(run), -1) {
		t.Errorf(".ci/run calls %s: it is make's to do so", strings.TrimSpace(m))
	}
	for _, m := range regexp.MustCompile(`\bmake (\S+)`).FindAllStringSubmatch(string(run), -1) {
		if !slices.Contains(targets, m[1]) {
			t.Errorf(".ci/run: make %s: no such target", m[1])
		}
	}
}

// step is a line of the architecture page's picture of the engine: a package if it's another one than before, a file if it is, and functions.
var step = regexp.MustCompile(`^   ([a-z/]+)?\s+([a-z]+\.go)?\s+([A-Za-z]+(?:, [A-Za-z]+)*)   *\S`)

// The functions by which the architecture page leads from a read to its request are where it says.
func TestWayThroughTheEngine(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(top, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, picture, _ := strings.Cut(string(page), "## The engine\n")
	_, picture, _ = strings.Cut(picture, "```\n")
	picture, _, _ = strings.Cut(picture, "```\n")
	pkg, file, found := "", "", 0
	for line := range strings.Lines(picture) {
		m := step.FindStringSubmatch(line)
		if m == nil || m[1] == "" && pkg == "" || m[1] != "" && m[2] == "" {
			continue
		}
		if m[1] != "" {
			pkg = m[1]
		}
		if m[2] != "" {
			file = m[2]
		}
		source, err := os.ReadFile(filepath.Join(top, pkg, file))
		if err != nil {
			t.Error(err)
			continue
		}
		for name := range strings.SplitSeq(m[3], ", ") {
			found++
			if !regexp.MustCompile(`(?m)^func (\([^)]*\) )?` + name + `\(`).Match(source) {
				t.Errorf("%s/%s has no function %s", pkg, file, name)
			}
		}
	}
	if found < 20 {
		t.Errorf("the picture names %d functions: is it another one?", found)
	}
}

// walk calls f with the path, below the top, of every file that could be committed.
func walk(t *testing.T, f func(path string)) {
	t.Helper()
	err := fs.WalkDir(os.DirFS(top), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path == ".git" || path == "bin" || d.Name() == "testdata" || d.Name() == ".cache" {
				return fs.SkipDir
			}
			return nil
		}
		f(path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
