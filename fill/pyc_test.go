package fill

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// wantImports are those of testdata/python/module.py. Each version of Python has compiled it with
//
//	py_compile.compile(..., invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
var wantImports = []imported{
	{module: "__future__", names: []string{"annotations"}},
	{module: "os"}, {module: "a.b.c"}, {module: "enum"},
	{level: 1, names: []string{"one", "two"}},
	{level: 2, names: []string{"three"}},
	{level: 1, module: "sub.mod", names: []string{"*"}},
	{module: "fast", names: []string{"loads", "dumps"}},
	{level: 1, module: "slow", names: []string{"loads"}},
}

func TestParsePyc(t *testing.T) {
	files, err := filepath.Glob("testdata/python/module.*.pyc")
	if err != nil || len(files) != 5 {
		t.Fatalf("%q, %v", files, err)
	}
	for _, name := range files {
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parsePyc(p); err != nil || !reflect.DeepEqual(got, wantImports) {
			t.Errorf("%s imports %+v, %v", name, got, err)
		}
		for n := range p {
			if _, err := parsePyc(p[:n]); n < len(p)-1 && err == nil && n < pycHeader {
				t.Errorf("%s: a header of %d bytes is taken for a module", name, n)
			}
		}
	}
	for _, p := range [][]byte{nil, []byte("import os\n"), append([]byte{0x60, 0x0e, '\r', '\n'}, make([]byte, 100)...)} {
		if _, err := parsePyc(p); !errors.Is(err, errNotPyc) {
			t.Errorf("%q: %v", p, err)
		}
	}
}

func TestParsePython(t *testing.T) {
	p, err := os.ReadFile("testdata/python/module.py")
	if err != nil {
		t.Fatal(err)
	}
	if got := parsePython(p); !reflect.DeepEqual(got, wantImports) {
		t.Errorf("imports %+v", got)
	}
	for source, want := range map[string][]imported{
		"from .a import (  # why\n    b as c,  # that\n    d,\n)\nimport e": {{level: 1, module: "a", names: []string{"b", "d"}}, {module: "e"}},
		"import a; import b\nimportant = 1\nfrom x\nfrom":                   {{module: "a"}},
		"async def f():\n  import a\nclass B: pass\n\timport b\nimport c\n": {{module: "c"}},
		"import":           nil,
		"from (":           nil,
		"from . import (a": {{level: 1, names: []string{"a"}}},
	} {
		if got := parsePython([]byte(source)); !reflect.DeepEqual(got, want) {
			t.Errorf("%q imports %+v, want %+v", source, got, want)
		}
	}
}

// A module that is written to be looked into for long is looked into as quickly as others of its size.
func TestHostilePython(t *testing.T) {
	for name, source := range map[string]string{
		"lines in parentheses": "from a import (" + strings.Repeat("\n", maxModule),
		"names":                "from a import " + strings.Repeat("b,", maxModule/2),
		"modules":              "import " + strings.Repeat("b,", maxModule/2),
		"imports":              strings.Repeat("from a import (b)\n", maxModule/18),
	} {
		start := time.Now()
		list := parsePython([]byte(source))
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s: took %s", name, took)
		}
		if len(list) > maxImports {
			t.Errorf("%s: %d imports", name, len(list))
		}
		for _, im := range list {
			if len(im.names) > maxImports {
				t.Errorf("%s: %d names of one import", name, len(im.names))
			}
		}
	}
	if list := parsePth([]byte("import " + strings.Repeat("ab ", maxModule/3))); len(list) > maxImports {
		t.Errorf("%d imports of a .pth file", len(list))
	}
}

func FuzzParsePyc(f *testing.F) {
	files, _ := filepath.Glob("testdata/python/module.*.pyc")
	for _, name := range files {
		p, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		list, _ := parsePyc(p)
		if len(list) > maxImports || len(parsePython(p)) > maxImports || len(parsePth(p)) > maxImports {
			t.Error("too many imports")
		}
	})
}

// pycOf compiles a module of imports, as Python 3.11 does.
func pycOf(list ...imported) []byte {
	long := func(n int) []byte { return binary.LittleEndian.AppendUint32(nil, uint32(n)) }
	str := func(kind byte, s string) []byte { return append(append([]byte{kind}, long(len(s))...), s...) }
	tuple := func(objects ...[]byte) []byte {
		p := append([]byte{'('}, long(len(objects))...)
		for _, o := range objects {
			p = append(p, o...)
		}
		return p
	}
	var code string
	var consts, names [][]byte
	for _, im := range list {
		var from [][]byte
		for _, n := range im.names {
			from = append(from, str('a', n))
		}
		code += string([]byte{100, byte(len(consts)), 100, byte(len(consts) + 1), 108, byte(len(names))})
		consts = append(consts, append([]byte{'i'}, long(im.level)...), tuple(from...))
		names = append(names, str('a', im.module))
	}
	p := append([]byte{0xa7, 0x0d, '\r', '\n'}, make([]byte, 12)...)
	p = append(append(p, 'c'), make([]byte, 5*4)...)
	for _, o := range [][]byte{str('s', code), tuple(consts...), tuple(names...), tuple(), str('s', ""), str('a', "f"), str('a', "n"), str('a', "q")} {
		p = append(p, o...)
	}
	p = append(p, long(1)...)
	return append(append(p, str('s', "")...), str('s', "")...)
}
