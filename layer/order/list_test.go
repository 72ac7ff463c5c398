package order

import (
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		list string
		want []string // paths, those that may be globs with a star behind them
		err  string
	}{
		"lines":          {"/usr/bin/python3\n\n # a comment\n  ./etc//passwd \r\n../lib/x", []string{"usr/bin/python3", "etc/passwd", "lib/x"}, ""},
		"a mark, lines":  {"\ufeff/a\r\n/b\r\n", []string{"a", "b"}, ""},
		"a mark, JSON":   {"\ufeff[\"/a\"]", []string{"a"}, ""},
		"UTF-16":         {"\xff\xfe/\x00a\x00\n\x00", nil, "is in UTF-16; write it in UTF-8"},
		"globs":          {"/usr/lib/**/*.so\n/a?\n{b,c}/d\n[ab]", []string{"usr/lib/**/*.so*", "a?*", "{b,c}/d*", "[ab]*"}, ""},
		"no glob":        {"/usr/bin/[\n{a", []string{"usr/bin/[", "{a"}, ""},
		"root":           {"/", []string{""}, ""},
		"strings":        {` ["/a b", "c/*"]`, []string{"a b", "c/**"}, ""},
		"records":        {`{"path":"usr/bin/[x]","manifestDigest":"sha256:12","layerIndex":0}` + "\n" + `{"path":"b"}` + "\n", []string{"usr/bin/[x]", "b"}, ""},
		"array of them":  {`[{"path":"a"}, "b"]`, []string{"a", "b"}, ""},
		"nothing":        {"", nil, "is empty"},
		"comments only":  {"# a\n", nil, "is empty"},
		"no strings":     {"[]", nil, "is empty"},
		"not a path":     {`["a", 5]`, nil, `has "5"`},
		"no path":        {`{"name":"a"}`, nil, `{\"name\":\"a\"}`},
		"an empty path":  {`[""]`, nil, "a path in quotes"},
		"damaged":        {`{"path":"a"}` + "\n" + `{"path":`, nil, "value 2 of its JSON: unexpected EOF"},
		"damaged, array": {`["a", "b"`, nil, "value 1 of its JSON"},
		"too large":      {strings.Repeat("x", MaxSize+1), nil, "may have 16777216 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := Parse([]byte(c.list))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, it := range l.items {
				if it.glob != "" {
					it.path += "*"
				}
				got = append(got, it.path)
			}
			if !slices.Equal(got, c.want) || l.Len() != len(c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// Lists have the same digest when they do the same.
func TestDigest(t *testing.T) {
	digests := map[string]string{}
	for _, list := range []string{"a\nb", "b\na", "a\nb*", "ab", `[{"path":"b*"}]`} {
		l, err := Parse([]byte(list))
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := digests[l.Digest().String()]; ok {
			t.Errorf("%q and %q have the same digest", list, other)
		}
		digests[l.Digest().String()] = list
	}
	one, err := Parse([]byte("/a\n# comment\nb/"))
	if err != nil {
		t.Fatal(err)
	}
	if digests[one.Digest().String()] != "a\nb" {
		t.Errorf("digest %s, those of the others %v", one.Digest(), digests)
	}
}

func TestGlobs(t *testing.T) {
	for glob, names := range map[string]struct{ yes, no string }{
		"/usr/bin/*":       {"usr/bin/a", "usr/bin usr/bin/a/b usr/bina"},
		"usr/lib/**/*.so":  {"usr/lib/a.so usr/lib/b/c/d.so", "usr/lib usr/a.so usr/lib/a.so.1"},
		"**/python3.1?":    {"python3.11 usr/bin/python3.12", "usr/bin/python3.1"},
		"opt/img_[ab].png": {"opt/img_a.png", "opt/img_c.png opt/img_[ab].png"},
		"{usr,opt}/**":     {"usr/a opt/b/c", "etc/a"},
	} {
		l, err := Parse([]byte(glob))
		if err != nil {
			t.Fatal(err)
		}
		for name := range strings.FieldsSeq(names.yes) {
			if !l.items[0].matches(name) {
				t.Errorf("%s isn't %s", glob, name)
			}
		}
		for name := range strings.FieldsSeq(names.no) {
			if l.items[0].matches(name) {
				t.Errorf("%s is %s", glob, name)
			}
		}
	}
}
