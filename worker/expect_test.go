package worker

import (
	"io/fs"
	"reflect"
	"slices"
	"testing"
	"unicode/utf8"

	bkexecutor "github.com/moby/buildkit/executor"
)

func TestCommandsOf(t *testing.T) {
	for _, c := range []struct {
		script string
		want   []string
	}{
		{"gcc -O2 -o hello hello.c", []string{"gcc"}},
		{"echo 'the command runs' && CGO_ENABLED=0 go build -o hello .", []string{"go"}},
		{"javac Hello.java && java Hello > result", []string{"javac", "java"}},
		{"apt-get update \\\n && apt-get install -y curl", []string{"apt-get", "apt-get"}},
		{"set -e; cd /src\nif ! ./configure; then make -j4 | tee log; fi", []string{"./configure", "make", "tee"}},
		{"x=$(pkg-config --libs z) ld -o x", []string{"pkg-config", "ld"}},
		{"sudo -E env A=b time ld -o x", []string{"ld"}},
		{"$CC -c a.c; \"/usr/bin/python3\" x; *.sh; for f in a b; do cat $f; done", []string{"/usr/bin/python3", "cat"}},
		{"", nil},
		{"&& || ;;; ( ) '", nil},
	} {
		if got := commandsOf(c.script); !slices.Equal(got, c.want) {
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
		for _, paths := range files {
			for _, name := range paths {
				if !fs.ValidPath(name) && name != "" && utf8.ValidString(name) {
					t.Errorf("%q is no path in the root", name)
				}
			}
		}
	})
}

func TestProgramsOf(t *testing.T) {
	user, zone := [][]string{{"etc/passwd"}, {"etc/group"}}, [][]string{{"etc/localtime"}}
	for name, c := range map[string]struct {
		meta bkexecutor.Meta
		want [][]string
	}{
		"a shell": {
			bkexecutor.Meta{Args: []string{"/bin/sh", "-c", "go build; ./x; ../y"}, Env: []string{"HOME=/", "PATH=/usr/local/go/bin:/usr/bin"}, Cwd: "/src"},
			[][]string{{"bin/sh"}, {"usr/local/go/bin/go", "usr/bin/go"}, {"src/x"}, {"y"}},
		},
		"a shell with options": {
			bkexecutor.Meta{Args: []string{"/bin/bash", "-o", "pipefail", "-ec", "make"}, Env: []string{"PATH=/bin"}},
			[][]string{{"bin/bash"}, {"bin/make"}},
		},
		"no shell": {
			bkexecutor.Meta{Args: []string{"python3", "x.py"}, Env: []string{"PATH=/opt/bin:/bin"}},
			[][]string{{"opt/bin/python3", "bin/python3"}},
		},
		"the usual PATH": {
			bkexecutor.Meta{Args: []string{"true"}},
			[][]string{{"usr/local/sbin/true", "usr/local/bin/true", "usr/sbin/true", "usr/bin/true", "sbin/true", "bin/true"}},
		},
		"nothing": {bkexecutor.Meta{}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got, want := programsOf(c.meta), slices.Concat(user, c.want, zone); !reflect.DeepEqual(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestLocalesOf(t *testing.T) {
	zone := []string{"etc/localtime"}
	for name, c := range map[string]struct {
		env  []string
		want [][]string
	}{
		"none":    {[]string{"HOME=/"}, [][]string{zone}},
		"C":       {[]string{"LANG=de_DE.UTF-8", "LC_ALL=C"}, [][]string{zone}},
		"C.UTF-8": {[]string{"LANG=C.UTF-8"}, [][]string{zone, {"usr/lib/locale/C.UTF-8/LC_CTYPE", "usr/lib/locale/C.utf8/LC_CTYPE"}, charsets}},
		"LC_ALL before LC_CTYPE before LANG": {
			[]string{"LANG=a", "LC_ALL=b", "LC_CTYPE=c"}, [][]string{zone, {"usr/lib/locale/b/LC_CTYPE"}, charsets},
		},
		"a path": {[]string{"LANG=../../../etc"}, [][]string{zone}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := localesOf(c.env); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
