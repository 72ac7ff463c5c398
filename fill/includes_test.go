package fill

import (
	"bytes"
	"io/fs"
	"testing"
	"testing/synctest"
	"time"
)

func TestWhatHeadersIncludeIsFollowed(t *testing.T) {
	files := apart(
		said("usr/include/a.h", "#include <bits/b.h>\n # include_next\t\"c.h\"\n#include <std.h>\n#include MACRO\n#include <../e.h>\n#define x /* c.h */"),
		said("usr/include/x86-linux-gnu/bits/b.h", "#include <sys/d.h>\n/* other.h */\n"),
		said("usr/include/x86-linux-gnu/sys/d.h", "#ifdef X\n#  include <deep.h>\n#endif"),
		said("usr/include/deep.h", "#include <a.h>\n#include <deep.h>\n"),
		said("usr/include/c.h", "."), said("usr/include/other.h", "#include <unread.h>"), said("usr/include/unread.h", "."),
		said("usr/lib/cc/x86-linux-gnu/12/include/std.h", "."), said("usr/include/linux/std.h", "."), said("opt/p/include/std.h", "."),
	)
	want := map[string]bool{
		"usr/include/x86-linux-gnu/bits/b.h": true, "usr/include/x86-linux-gnu/sys/d.h": true, "usr/include/deep.h": true, "usr/include/c.h": true,
		"usr/include/unread.h": false,
	}
	im := treeOf(t, files...)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		l[0].readHead(t, "usr/include/a.h")
		time.Sleep(2 * time.Second)
		for name, want := range want {
			if l[0].has(t, name) != want {
				t.Errorf("%s was fetched: %t, want %t", name, !want, want)
			}
		}
	})
}

func TestHeader(t *testing.T) {
	im := treeOf(t,
		said("usr/lib/cc/x86-linux-gnu/12/include/std.h", "."), said("usr/include/linux/std.h", "."), said("opt/a/b/c/d/e/f/include/std.h", "."),
		said("usr/include/x86-linux-gnu/bits/b.h", "."), said("usr/include/x86/bits/b.h", "."),
	)
	s, l := labs(t, im)
	defer s.Close()
	for name, want := range map[string]string{
		"std.h": "usr/lib/cc/x86-linux-gnu/12/include/std.h", "linux/std.h": "usr/include/linux/std.h", "bits/b.h": "usr/include/x86-linux-gnu/bits/b.h", "b.h": "",
	} {
		got := ""
		for _, file := range l[0].view().header("usr/include", name) {
			path, _ := im.Path(file.inode)
			got += path
		}
		if got != want {
			t.Errorf("<%s> is %q, want %q", name, got, want)
		}
	}
}

func TestParseInclude(t *testing.T) {
	for line, want := range map[string]string{
		"#include <a/b.h>\n": "a/b.h", "\t#  include\t\"a.h\" // <b.h>": "a.h", "#include_next <a.h>": "a.h", "#include <a.h": "", "include <a.h>": "",
		"#include X": "", "#include \"\"": "", "#include <../a.h>": "", "#include </a.h>": "", "#include <": "", "#define include <a.h>": "",
	} {
		name, _, ok := parseInclude([]byte(line))
		if ok != (want != "") || ok && name != want {
			t.Errorf("%q includes %q, %t, want %q", line, name, ok, want)
		}
	}
}

// A line is anything: it includes nothing, or what is in it and can be a name.
func FuzzParseInclude(f *testing.F) {
	f.Add([]byte("#include <a/b.h>\n"))
	f.Add([]byte("\t# include_next \"../a.h\" // <b.h>"))
	f.Fuzz(func(t *testing.T, line []byte) {
		name, _, ok := parseInclude(line)
		if ok && (!fs.ValidPath(name) || len(name) > longWord || !bytes.Contains(line, []byte(name))) {
			t.Errorf("%q includes %q", line, name)
		}
	})
}
