package worker

import (
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	bkexecutor "github.com/moby/buildkit/executor"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

func TestCommandsOf(t *testing.T) {
	for _, c := range []struct {
		script string
		want   []string
	}{
		{"gcc -O2 -o hello hello.c", []string{"gcc -O2 -o hello hello.c"}},
		{"echo 'the command runs' && CGO_ENABLED=0 go build -o hello .", []string{"go build -o hello ."}},
		{"javac Hello.java && java Hello > result", []string{"javac Hello.java", "java Hello > result"}},
		{"apt-get update \\\n && apt-get install -y curl", []string{"apt-get update", "apt-get install -y curl"}},
		{"set -e; cd /src\nif ! ./configure; then make -j4 | tee log; fi", []string{"./configure", "make -j4", "tee log"}},
		{"x=$(pkg-config --libs z) ld -o x", []string{"pkg-config --libs z", "ld -o x"}},
		{"sudo -E env A=b time ld -o x", []string{"ld -o x"}},
		{"$CC -c a.c; \"/usr/bin/python3\" 'x'; *.sh; for f in a b; do cat $f; done", []string{"/usr/bin/python3 x", "cat $f"}},
		{"", nil},
		{"&& || ;;; ( ) '", nil},
	} {
		var got []string
		for _, words := range commandsOf(c.script) {
			got = append(got, strings.Join(words, " "))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%q runs %q, want %q", c.script, got, c.want)
		}
	}
}

// A script is anything: what is expected of it are some paths in the root.
func FuzzProgramsOf(f *testing.F) {
	f.Add("set -e; cd /src\nif ! ./configure; then make -j4 | tee log; fi", "/usr/bin:/bin", "/src")
	f.Add("x=$(pkg-config --libs z) ../ld -o x \\\n && \"$CC\" `a`", ":..:/", "../..")
	f.Add("..", "", "")
	f.Fuzz(func(t *testing.T, script, dirs, cwd string) {
		files := programsOf(bkexecutor.Meta{Args: []string{"/bin/sh", "-ec", script}, Env: []string{"PATH=" + dirs, "LANG=" + script}, Cwd: cwd})
		if len(files) > maxPrograms+5 {
			t.Errorf("%d files", len(files))
		}
		for _, e := range files {
			for _, name := range e.Paths {
				if !fs.ValidPath(name) && name != "" && utf8.ValidString(name) {
					t.Errorf("%q is no path in the root", name)
				}
			}
		}
	})
}

// program is one that is called with the words of args.
func program(args string, paths ...string) fill.Expected {
	return fill.Expected{Paths: paths, Args: strings.Fields(args)}
}

func TestProgramsOf(t *testing.T) {
	user, zone := []fill.Expected{at("etc/passwd"), at("etc/group")}, []fill.Expected{at("etc/localtime")}
	for name, c := range map[string]struct {
		meta bkexecutor.Meta
		want []fill.Expected
	}{
		"a shell": {
			bkexecutor.Meta{Args: []string{"/bin/sh", "-c", "go build; ./x; ../y"}, Env: []string{"HOME=/", "PATH=/usr/local/go/bin:/usr/bin"}, Cwd: "/src"},
			[]fill.Expected{program("", "bin/sh"), program("build", "usr/local/go/bin/go", "usr/bin/go"), program("", "src/x"), program("", "y")},
		},
		"a shell with options": {
			bkexecutor.Meta{Args: []string{"/bin/bash", "-o", "pipefail", "-ec", "make"}, Env: []string{"PATH=/bin"}},
			[]fill.Expected{program("", "bin/bash"), program("", "bin/make")},
		},
		"a program that's called twice": {
			bkexecutor.Meta{Args: []string{"/bin/sh", "-c", "cc -c a.c && cc -o a a.o"}, Env: []string{"PATH=/bin"}},
			[]fill.Expected{program("", "bin/sh"), program("-c a.c -o a a.o", "bin/cc")},
		},
		"no shell": {
			bkexecutor.Meta{Args: []string{"gcc", "-c", "x.c"}, Env: []string{"PATH=/opt/bin:/bin"}},
			[]fill.Expected{program("-c x.c", "opt/bin/gcc", "bin/gcc")},
		},
		"the usual PATH": {
			bkexecutor.Meta{Args: []string{"true"}},
			[]fill.Expected{program("", "usr/local/sbin/true", "usr/local/bin/true", "usr/sbin/true", "usr/bin/true", "sbin/true", "bin/true")},
		},
		"nothing": {bkexecutor.Meta{}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got, want := programsOf(c.meta), slices.Concat(user, c.want, zone); !slices.EqualFunc(got, want, func(a, b fill.Expected) bool {
				return slices.Equal(a.Paths, b.Paths) && slices.Equal(a.Args, b.Args)
			}) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestLocalesOf(t *testing.T) {
	zone := at("etc/localtime")
	for name, c := range map[string]struct {
		env  []string
		want []fill.Expected
	}{
		"none":    {[]string{"HOME=/"}, []fill.Expected{zone}},
		"C":       {[]string{"LANG=de_DE.UTF-8", "LC_ALL=C"}, []fill.Expected{zone}},
		"C.UTF-8": {[]string{"LANG=C.UTF-8"}, []fill.Expected{zone, {Paths: []string{"usr/lib/locale/C.UTF-8/LC_CTYPE", "usr/lib/locale/C.utf8/LC_CTYPE"}}, {Paths: charsets}}},
		"LC_ALL before LC_CTYPE before LANG": {
			[]string{"LANG=a", "LC_ALL=b", "LC_CTYPE=c"}, []fill.Expected{zone, {Paths: []string{"usr/lib/locale/b/LC_CTYPE"}}, {Paths: charsets}},
		},
		"a path": {[]string{"LANG=../../../etc"}, []fill.Expected{zone}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := localesOf(c.env); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
