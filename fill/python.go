package fill

import (
	"bytes"
	"cmp"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
)

// What a Python module imports needn't be guessed either: compiled or not, it says so. So the modules that an import leads to, and
// those that they import, are asked for when the first has arrived, while the interpreter is still looking for the second. They have an
// account of their own (imports, in afford), since an import may be one that isn't reached.

const (
	pycSuffix, pySuffix = ".pyc", ".py"
	// pthSuffix is what files in a directory of packages end with that are read when Python starts, of which lines may be code.
	pthSuffix = ".pth"
	// initModule is what is read of a package.
	initModule = "__init__"
	// maxModule is how large a module may be to be looked into, in bytes.
	maxModule = 4 << 20
	// maxStart is how many files are fetched for Python to start.
	maxStart = 64
)

// isModule reports whether a file may import Python modules, by its name.
func isModule(name string) bool {
	return strings.HasSuffix(name, pycSuffix) || strings.HasSuffix(name, pySuffix) || strings.HasSuffix(name, pthSuffix)
}

// frozen are modules that are in the interpreter, which reads no file for them, since 3.11: Python/frozen.c.
var frozen = func() map[string]bool {
	in := map[string]bool{}
	for name := range strings.FieldsSeq("_collections_abc _sitebuiltins abc codecs genericpath importlib._bootstrap importlib._bootstrap_external" +
		" importlib.machinery importlib.util io ntpath os os.path posixpath runpy site stat zipimport") {
		in[name] = true
	}
	return in
}()

// isFrozen reports whether a version of Python has a module in itself.
func isFrozen(module, version string) bool {
	n, err := strconv.Atoi(strings.TrimPrefix(version, "3"))
	return err == nil && n >= 11 && frozen[module]
}

// python is how modules are found: the directory that relative imports are meant from, and the version, e.g. 311. A version
// of "" is any.
type python struct {
	v            view
	dir, version string
}

// pythonOf returns how imports of a module are found, by the module's path.
func (v view) pythonOf(name string) python {
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	p := python{v: v, dir: dir}
	if path.Base(dir) == pycache {
		p.dir = strings.TrimSuffix(strings.TrimSuffix(dir, pycache), "/")
		// NAME.cpython-311.pyc, or NAME.cpython-311.opt-1.pyc
		if _, tag, ok := strings.Cut(base, ".cpython-"); ok {
			p.version, _, _ = strings.Cut(tag, ".")
		}
	}
	if p.version == "" {
		p.version = versionIn(dir)
	}
	return p
}

// versionIn returns the version in a path with a directory like lib/python3.11, "" if there is none.
func versionIn(dir string) string {
	for part := range strings.SplitSeq(dir, "/") {
		if v, ok := strings.CutPrefix(part, "python3."); ok && isDigits(v) {
			return "3" + v
		}
	}
	return ""
}

func isDigits(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r < '0' || r > '9' })
}

// paths returns where modules are looked for that aren't relative: sys.path, of Python as its makers and as Debian install it.
func (p python) paths() []string {
	// In front is where the program is; for a module of a package that's the directory that its topmost package is in.
	top := p.dir
	for top != "" && p.has(top+"/"+initModule+pySuffix) {
		top = path.Dir(top)
		if top == "." {
			top = ""
		}
	}
	dirs := []string{top}
	if len(p.version) < 2 {
		return dirs
	}
	name := "python" + p.version[:1] + "." + p.version[1:]
	for _, prefix := range []string{"usr/local/lib/", "usr/lib/"} {
		lib := prefix + name
		dirs = append(dirs, lib, lib+"/lib-dynload", lib+"/site-packages", lib+"/dist-packages")
	}
	dirs = append(dirs, "usr/lib/python3/dist-packages", "usr/lib64/"+name, "usr/lib64/"+name+"/lib-dynload", "usr/lib64/"+name+"/site-packages")
	return slices.DeleteFunc(dirs, func(dir string) bool { return dir != top && !p.has(dir) })
}

func (p python) has(name string) bool {
	f, _ := p.v.lookup(strings.TrimPrefix(name, "/"))
	return f != nil
}

// module returns the file of a module or package in a directory, and whether there is one; dir is the package's own
// directory, if it's one. A package needn't have a file.
func (p python) module(in, name string) (file place, dir string, ok bool) {
	base := strings.TrimPrefix(in+"/"+name, "/")
	if f, inode := p.v.lookup(base); f != nil {
		if entry := f.layer.Inode(inode); entry.IsDir() || entry.Target != "" {
			if file, ok := p.file(base, initModule); ok {
				return file, base, true
			}
			if entry.IsDir() {
				return place{}, base, true
			}
		}
	}
	file, ok = p.file(in, name)
	return file, "", ok
}

// file returns the file of a module in a directory: an extension, what was compiled, or the source.
func (p python) file(in, name string) (place, bool) {
	in = strings.TrimPrefix(in+"/", "/")
	var names []string
	if p.version != "" {
		tag := ".cpython-" + p.version
		names = append(names, in+name+tag+"-x86_64-linux-gnu.so", in+name+tag+"-aarch64-linux-gnu.so",
			in+name+".abi3.so", in+pycache+"/"+name+tag+pycSuffix)
	}
	for _, name := range append(names, in+name+".so", in+name+pySuffix) {
		if f, _ := p.v.lookup(name); f != nil {
			return p.v.find(name)
		}
	}
	return place{}, false
}

// find calls found for the files that an import reads, in the order in which it reads them.
func (p python) find(paths []string, im imported, found func(place)) {
	if im.level == 0 && isFrozen(im.module, p.version) {
		return
	}
	if im.level > 0 {
		dir := p.dir
		for range im.level - 1 {
			if dir = path.Dir(dir); dir == "." {
				return
			}
		}
		paths = []string{dir}
	}
	for _, dir := range paths {
		isPackage := true
		there := im.module == ""
		if !there {
			for name := range strings.SplitSeq(im.module, ".") {
				file, in, ok := p.module(dir, name)
				if !ok {
					isPackage = false
					break
				}
				there = true
				if file.f != nil {
					found(file)
				}
				if dir, isPackage = in, in != ""; !isPackage {
					break
				}
			}
		}
		if !there {
			continue // the next directory may have it
		}
		for _, name := range im.names {
			if file, _, ok := p.module(dir, name); isPackage && ok && file.f != nil {
				found(file)
			}
		}
		return
	}
}

// importsOf asks for the modules that a module imports. It reports whether there is nothing more to be found out about it.
func (f *Filler) importsOf(e extent) bool {
	name := f.nameOf(e.dir, e.inode)
	in := f.layer.Inode(e.inode)
	r, ok := f.sink.(io.ReaderAt)
	if !ok || in.Size > maxModule {
		return false
	}
	p := make([]byte, in.Size)
	f.readPresent(r, p, in.Data)
	list, err := parsePyc(p)
	switch path.Ext(name) {
	case pySuffix:
		list, err = parsePython(p), nil
	case pthSuffix:
		list, err = parsePth(p), nil
	}
	if err == nil {
		f.fetchImports(f.pathOf(e.dir)+"/"+name, list)
	}
	return err == nil && !strings.HasSuffix(name, pySuffix) // the source may name other files besides
}

// fetchImports asks for what the module at a path imports.
func (f *Filler) fetchImports(name string, list []imported) {
	v := f.view()
	py := v.pythonOf(strings.TrimPrefix(name, "/"))
	if py.version == "" {
		py.version = v.pythonVersion()
	}
	paths := py.paths()
	var files []place
	seen := map[place]bool{}
	until := f.lookUntil()
	for _, im := range list {
		if until.over() {
			break
		}
		py.find(paths, im, func(file place) {
			if !seen[file] {
				seen[file] = true
				files = append(files, file)
			}
		})
	}
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, file := range files {
		if !file.f.closed {
			file.f.need(file.inode, file.head(), ahead, imports)
		}
	}
	s.dispatch()
}

// pythonVersion returns the version of Python that the image calls python3, "" if there is none.
func (v view) pythonVersion() string {
	for _, dir := range []string{"usr/local/bin", "usr/bin"} {
		if file, ok := v.find(dir + "/python3"); ok {
			name, _ := file.f.layer.Path(file.inode)
			return versionIn(name)
		}
	}
	return ""
}

// startOf returns the modules that a program imports when it starts, whatever it runs, if it's Python.
func (v view) startOf(program string) (files []place) {
	version := versionIn(program)
	if version == "" {
		return nil
	}
	py := python{v: v, version: version}
	paths := py.paths()
	found := func(file place) { files = append(files, file) }
	for _, im := range []imported{
		{module: "encodings", names: []string{"aliases", "utf_8"}}, {module: "sitecustomize"}, {module: "usercustomize"},
	} {
		py.find(paths, im, found)
	}
	for _, dir := range paths {
		for _, f := range v {
			i, err := f.layer.Lookup(cmp.Or(dir, "."))
			for n := 0; err == nil && len(files) < maxStart; n++ {
				e, ok := f.layer.Entry(i, n)
				if !ok {
					break
				}
				if strings.HasSuffix(e.Name, pthSuffix) {
					if file, ok := v.find(dir + "/" + e.Name); ok {
						files = append(files, file)
					}
				}
			}
		}
	}
	return files
}

// parsePython returns what a module imports when it is imported itself, by its source: statements that aren't in a function or a class.
func parsePython(p []byte) (list []imported) {
	inside := false // a function or a class
	for len(p) > 0 && len(list) < maxImports {
		line, rest, _ := bytes.Cut(p, []byte("\n"))
		p = rest
		text := strings.TrimSpace(string(line))
		if text != "" && line[0] != ' ' && line[0] != '\t' {
			first, _, _ := strings.Cut(text, " ")
			inside = first == "def" || first == "class" || first == "async"
		}
		if inside {
			continue
		}
		first, statement, _ := strings.Cut(text, " ")
		switch first {
		case "import":
			for module := range strings.SplitSeq(withoutComment(statement), ",") {
				if fields := strings.Fields(module); len(fields) > 0 && len(list) < maxImports {
					list = append(list, imported{module: fields[0]})
				}
			}
		case "from":
			module, names, ok := strings.Cut(withoutComment(statement), " import ")
			if !ok {
				continue
			}
			if open := strings.TrimSpace(names); strings.HasPrefix(open, "(") && !strings.Contains(open, ")") {
				more, after, _ := bytes.Cut(p, []byte(")"))
				var all strings.Builder
				all.WriteString(names)
				for line := range strings.Lines(string(more)) {
					all.WriteString(" " + withoutComment(line))
				}
				names, p = all.String(), after
			}
			module = strings.TrimSpace(module)
			im := imported{module: strings.TrimLeft(module, ".")}
			im.level = len(module) - len(im.module)
			for name := range strings.SplitSeq(strings.Trim(names, " ()\\\r\n"), ",") {
				if fields := strings.Fields(name); len(fields) > 0 && len(im.names) < maxImports {
					im.names = append(im.names, fields[0])
				}
			}
			list = append(list, im)
		}
	}
	return list
}

// parsePth returns what a file that is read when Python starts may import: any word of its lines that are code.
func parsePth(p []byte) (list []imported) {
	for line := range bytes.Lines(p) {
		if bytes.HasPrefix(line, []byte("import")) {
			words(line, func(w []byte) {
				if len(list) < maxImports {
					list = append(list, imported{level: 1, module: string(w)})
				}
			})
		}
	}
	return list
}

func withoutComment(line string) string {
	line, _, _ = strings.Cut(line, "#")
	statement, _, _ := strings.Cut(line, ";")
	return statement
}
