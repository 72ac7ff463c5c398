package fill

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

func said(name, content string) entry { return entry{name: name, content: []byte(content)} }

// apart puts so much between files that none is fetched for being near to another.
func apart(files ...entry) (entries []entry) {
	for i, e := range files {
		entries = append(entries, e, far(fmt.Sprintf("var/far/%d", i)))
	}
	return entries
}

// programOf makes an ELF file with a word among its strings.
func programOf(name, word string) entry {
	p := elfOf(100_000, "/lib/none", "")
	copy(p[4096:], "\x00"+word+"%s;\x00")
	return entry{name: name, content: p}
}

func TestWhatAFileMentionsIsFetchedAfterIt(t *testing.T) {
	for _, c := range []struct {
		name  string
		files []entry
		read  string
		want  []string // of files; the others must not be there
	}{
		{
			"a header includes others", apart(
				said("usr/include/a.h", "#include <sys/b.h>\n#include \"c.h\"\n/* see other.txt, d, and sys/none.h */"),
				said("usr/include/x86/sys/b.h", "."), said("usr/include/c.h", "."), said("usr/include/other.txt", "."),
				said("usr/include/d.h", "."), said("usr/include/x86/b.h", "."),
			), "usr/include/a.h", []string{"usr/include/x86/sys/b.h", "usr/include/c.h"},
		},
		{
			"a compiled module imports others", apart(
				said("lib/p/__pycache__/a.c-3.pyc", "\x00\x01\xda\x03subr\x02\x00\xda\x06nativeN\xda\x06sister\x00"),
				said("lib/p/sub/__pycache__/__init__.c-3.pyc", "."), said("lib/p/sub/__init__.py", "."),
				said("lib/p/native.c-3-x86.so", "."), said("lib/p/__pycache__/sister.c-3.pyc", "."), said("lib/p/sister.py", "."),
			), "lib/p/__pycache__/a.c-3.pyc",
			[]string{"lib/p/sub/__pycache__/__init__.c-3.pyc", "lib/p/native.c-3-x86.so", "lib/p/__pycache__/sister.c-3.pyc"},
		},
		{
			"a native module brings its libraries", apart(
				said("lib/p/a.py", "import native\n"),
				entry{name: "lib/p/native.c-3.so", content: elfOf(50_000, "", "", "libdeep.so.1")},
				entry{name: "usr/lib/libdeep.so.1", content: elfOf(50_000, "", "")},
			), "lib/p/a.py", []string{"lib/p/native.c-3.so", "usr/lib/libdeep.so.1"},
		},
		{
			"a program has names among its strings", apart(
				programOf("usr/bin/cc", "start.o"), said("usr/lib/cc/target/12/start.o", "."), said("usr/lib/cc/target/12/start", "."),
			), "usr/bin/cc", []string{"usr/lib/cc/target/12/start.o"},
		},
		{
			"an absolute path, and a symlink", apart(
				said("usr/lib/m.rb", "open('/etc/ssl/m.cnf'); require './n.rb'"), said("etc/ssl/m.cnf", "."),
				entry{name: "usr/lib/n.rb", target: "o.rb"}, said("usr/lib/o.rb", "."),
			), "usr/lib/m.rb", []string{"etc/ssl/m.cnf", "usr/lib/o.rb"},
		},
		{
			"the closest is meant", apart(
				said("opt/a/b/mx.py", "import my"), said("opt/a/c/my.py", "."), said("opt/a/b/my.py", "."), said("opt/my.py", "."),
			), "opt/a/b/mx.py", []string{"opt/a/b/my.py"},
		},
		{
			"what is far away isn't meant", apart(
				said("opt/a/b/c/mx.py", "import my"), said("srv/d/my.py", "."),
			), "opt/a/b/c/mx.py", nil,
		},
		{
			"what's mentioned is followed when it is read", apart(
				said("opt/mx.rb", "require 'my'"), said("opt/my.rb", "require 'mz'"), said("opt/mz.rb", "."),
			), "opt/mx.rb", []string{"opt/my.rb"},
		},
		{
			"other files are not looked through", apart(
				said("opt/x.txt", "y.txt opt/y.txt"), said("opt/y.txt", "."), said("opt/lib.so", "y.txt"),
			), "opt/x.txt", nil,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := treeOf(t, c.files...)
			synctest.Test(t, func(t *testing.T) {
				s, l := labs(t, im)
				defer s.Close()
				l[0].readHead(t, c.read)
				time.Sleep(time.Second)
				for _, e := range c.files {
					want := e.name == c.read || slices.Contains(c.want, e.name)
					if e.target == "" && l[0].has(t, e.name) != want {
						t.Errorf("%s was fetched: %t, want %t", e.name, !want, want)
					}
				}
			})
		})
	}
}

// A list of files, and a name that many files have, say nothing of what is read next.
func TestListsMentionNothing(t *testing.T) {
	var many []entry
	var list strings.Builder
	for i := range maxMentioned + 1 {
		name := fmt.Sprintf("opt/m%d.rb", i)
		many = append(many, said(name, "."), far(name+".far"))
		fmt.Fprintf(&list, "require m%d\n", i)
	}
	for i := range sameName + 1 {
		name := fmt.Sprintf("opt/p/%d/same.rb", i)
		many = append(many, said(name, "."), far(name+".far"))
	}
	im := treeOf(t, append(many, said("opt/all.rb", list.String()), far("opt/far"), said("opt/p/x/one.rb", "require same\n"))...)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		for _, name := range []string{"opt/all.rb", "opt/p/x/one.rb"} {
			l[0].readHead(t, name)
		}
		time.Sleep(time.Second)
		for _, e := range many {
			if l[0].has(t, e.name) {
				t.Errorf("%s was fetched", e.name)
			}
		}
	})
}

// What is fetched for being mentioned and not read is bounded.
func TestMentionsAreBounded(t *testing.T) {
	var files []entry
	var list strings.Builder
	for i := range maxMentioned {
		files = append(files, text(fmt.Sprintf("opt/m%d.rb", i), 300_000))
		fmt.Fprintf(&list, "require m%d\n", i)
	}
	im := treeOf(t, append(files, far("opt/far"), said("opt/all.rb", list.String()))...)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		l[0].readHead(t, "opt/all.rb")
		time.Sleep(5 * time.Second)
		if n := l[0].Stats().Guessed; n == 0 || n > 2<<20 {
			t.Errorf("%d bytes were fetched for being mentioned", n)
		}
	})
}

// What a command runs is fetched with what it needs before anybody has read a byte.
func TestWhatIsExpectedIsFetched(t *testing.T) {
	base := treeOf(t, apart(
		entry{name: "lib/ld.so", content: elfOf(90_000, "", "")}, entry{name: "usr/lib/libc.so", content: elfOf(90_000, "", "")},
		entry{name: "usr/bin/other", content: elfOf(90_000, "/lib/ld.so", "", "libc.so")},
	)...)
	tools := treeOf(t, apart(
		entry{name: "usr/local/bin/run", target: "../../../opt/run-1"},
		entry{name: "opt/run-1", content: elfOf(500_000, "/lib/ld.so", "", "libc.so")},
		entry{name: "usr/bin/run", content: elfOf(500_000, "/lib/ld.so", "", "libc.so")},
	)...)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, base, tools)
		defer s.Close()
		l[0].Expect([]Expected{{Paths: []string{"usr/sbin/run", "usr/local/bin/run", "usr/bin/run"}}, {Paths: []string{"bin/nothing"}}})
		time.Sleep(time.Second)
		for name, want := range map[string]bool{"lib/ld.so": true, "usr/lib/libc.so": true, "usr/bin/other": false} {
			if l[0].has(t, name) != want {
				t.Errorf("%s was fetched: %t, want %t", name, !want, want)
			}
		}
		for name, want := range map[string]bool{"opt/run-1": true, "usr/bin/run": false} {
			if l[1].has(t, name) != want {
				t.Errorf("%s was fetched: %t, want %t", name, !want, want)
			}
		}
	})
}

func TestSteps(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     int
	}{
		{"", "", 0},
		{"usr", "usr", 0},
		{"", "usr/lib", 2},
		{"usr/bin", "usr/lib/cc/12", 4},
		{"usr/lib", "usr/lib64", 2},
		{"a/b/c", "a", 2},
	} {
		if got := steps(c.from, c.to); got != c.want {
			t.Errorf("from %q to %q it's %d steps, want %d", c.from, c.to, got, c.want)
		}
	}
}

// A document each of whose words may mean all files of its layer is looked through for a while, and not for a minute.
func TestHostileDocument(t *testing.T) {
	const files, words = 20_000, 100_000
	var content strings.Builder
	for i := range words {
		fmt.Fprintf(&content, "x.%d\n", i)
	}
	entries := []entry{said("d/mx.h", content.String())}
	for i := range files {
		entries = append(entries, said(fmt.Sprintf("d/x.x%d", i), ""))
	}
	im := treeOf(t, entries...)
	s, l := labs(t, im)
	defer s.Close()
	i, err := im.Lookup("d/mx.h")
	if err != nil {
		t.Fatal(err)
	}
	l[0].read(t, im.Inodes[i].Data, im.Inodes[i].Size)
	k := slices.IndexFunc(l[0].files, func(e extent) bool { return e.inode == i })
	start := time.Now()
	d, ok := l[0].documentOf(l[0].files[k])
	if !ok {
		t.Fatal("it mentions nothing")
	}
	d.follow()
	if took := time.Since(start); took > 10*longLook {
		t.Errorf("took %s", took)
	}
}

// Whatever a file says, names are found in it or not.
func FuzzMentions(f *testing.F) {
	im := treeOf(f, said("a/b.py", "."), said("a/c/__init__.py", "."), entry{name: "a/l", target: "../a/l"})
	s := NewScheduler(SchedulerOptions{})
	f.Cleanup(func() { s.Close() })
	filler := s.Open(im.Layer, dsl().serve(im), newMemory(im), LayerOptions{})
	t := document{f: filler, dir: "a", name: "mx.py", suffix: ".py", kind: importing}
	f.Add([]byte("import b, c; open('/a/b.py'), ./a/../l"))
	f.Add([]byte("/ // . .. ./. a/ /a"))
	f.Fuzz(func(test *testing.T, p []byte) {
		for k := includes; k <= programs; k++ {
			t.kind = k
			words(p, func(w []byte) {
				files, _ := view{filler}.mentioned(t, string(w))
				for _, file := range files {
					if in := im.Inodes[file.inode]; !in.IsRegular() || file.inode == layer.Root {
						test.Errorf("%q means inode %d", w, file.inode)
					}
				}
			})
		}
	})
}
