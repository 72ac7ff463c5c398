package fill

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// compiled is a module of Python 3.11, at the path of its source without the suffix.
func compiled(name string, list ...imported) entry {
	dir, base := path.Split(name)
	return entry{name: dir + pycache + "/" + base + ".cpython-311.pyc", content: pycOf(list...)}
}

const lib, packages = "usr/lib/python3.11/", "usr/lib/python3/dist-packages/"

// python3 is an interpreter and what it reads when it starts.
func python3() []entry {
	return apart(
		entry{name: "usr/bin/python3", target: "python3.11"},
		entry{name: "usr/bin/python3.11", content: elfOf(100_000, "/lib/none", "")},
		compiled(lib+"encodings/__init__", imported{module: "codecs"}, imported{level: 1, names: []string{"aliases"}}),
		compiled(lib+"encodings/aliases"), compiled(lib+"encodings/utf_8"), compiled(lib+"encodings/latin_1"),
		compiled(lib+"codecs"), compiled(lib+"warnings"), compiled(lib+"sitecustomize", imported{module: "warnings"}),
		said(packages+"a.pth", "import os; __import__('_hack').go()\n./none\n"), compiled(packages+"_hack/__init__"),
		said(packages+"b.txt", "import warnings"),
	)
}

func TestPythonStarts(t *testing.T) {
	files := python3()
	im := treeOf(t, files...)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		l[0].Expect([]Expected{{Paths: []string{"usr/bin/python3"}}})
		time.Sleep(time.Second)
		for _, e := range files {
			if e.target != "" || strings.HasPrefix(e.name, "var/far") {
				continue
			}
			// Codecs are in the interpreter itself.
			no := strings.Contains(e.name, "/codecs.") || strings.Contains(e.name, "latin") || strings.HasSuffix(e.name, ".txt")
			if l[0].has(t, e.name) == no {
				t.Errorf("%s was fetched: %t", e.name, !no)
			}
		}
	})
}

func TestImportsAreFetched(t *testing.T) {
	files := apart(
		compiled(packages+"num/__init__", imported{level: 1, names: []string{"core", "version"}}, imported{module: "json.decoder"}),
		compiled(packages+"num/version"), said(packages+"num/version.py", "."), compiled(packages+"num/unused"),
		compiled(packages+"num/core/__init__", imported{level: 1, module: "fast", names: []string{"f"}}, imported{level: 2, module: "lib.x"}, imported{module: "none"}),
		entry{name: packages + "num/core/fast.cpython-311-x86_64-linux-gnu.so", content: elfOf(50_000, "", "", "libdeep.so.1")},
		entry{name: "usr/lib/libdeep.so.1", content: elfOf(50_000, "", "")},
		compiled(packages+"num/lib/x", imported{module: "num.ns.y"}), // a package without a file
		compiled(packages+"num/ns/y", imported{module: "num"}, imported{level: 9, names: []string{"z"}}),
		compiled(lib+"json/__init__"), compiled(lib+"json/decoder"), said(lib+"json/scanner.py", "import enum"), said(lib+"enum.py", "."),
		compiled(lib+"z"),
	)
	unwanted := []string{"unused", "version.py", "scanner", "enum", "/z."}
	check := func(t *testing.T, l *lab) {
		t.Helper()
		time.Sleep(2 * time.Second)
		for _, e := range files {
			if strings.HasPrefix(e.name, "var/far") {
				continue
			}
			want := !slices.ContainsFunc(unwanted, func(part string) bool { return strings.Contains(e.name, part) })
			if l.has(t, e.name) != want {
				t.Errorf("%s was fetched: %t, want %t", e.name, !want, want)
			}
		}
	}
	im := treeOf(t, append(files, python3()...)...)
	t.Run("of a module that is read", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, l := labs(t, im)
			defer s.Close()
			l[0].readHead(t, files[0].name)
			check(t, l[0])
		})
	})
	t.Run("of a script", func(t *testing.T) {
		files = append(files, said("opt/bin/run.py", "#!/usr/bin/env python3\nimport num\n"))
		im := treeOf(t, append(files, python3()...)...)
		synctest.Test(t, func(t *testing.T) {
			s, l := labs(t, im)
			defer s.Close()
			l[0].readHead(t, "opt/bin/run.py")
			check(t, l[0])
		})
	})
}

// What is fetched for being imported and not read is bounded.
func TestImportsAreBounded(t *testing.T) {
	var files []entry
	var source strings.Builder
	for i := range 100 {
		files = append(files, text(fmt.Sprintf("opt/m%d.py", i), 300_000))
		fmt.Fprintf(&source, "import m%d\n", i)
	}
	im := treeOf(t, append(files, far("opt/far"), said("opt/all.py", source.String()))...)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		l[0].readHead(t, "opt/all.py")
		time.Sleep(5 * time.Second)
		if n := l[0].Stats().Guessed; n < 1<<20 || n > 6<<20 {
			t.Errorf("%d bytes were fetched for being imported", n)
		}
	})
}

// Which modules of a directory are read, those say that import them: it isn't guessed by where they are.
func TestModulesAreNotReadForBeingNear(t *testing.T) {
	im := treeOf(t, said("opt/a.py", "import c"), said("opt/b.py", "."), said("opt/c.py", "."), said("opt/d.py", "."))
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		l[0].readHead(t, "opt/a.py")
		l[0].readHead(t, "opt/c.py")
		time.Sleep(time.Second)
		if l[0].has(t, "opt/d.py") {
			t.Error("what nothing imports was fetched")
		}
	})
}
