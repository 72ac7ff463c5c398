package fill

import (
	"cmp"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Files say which ones are read after them also where it isn't what a loader goes by: a header includes others, a module imports
// others, a program holds the names of its data. So what is read is looked through for words that are names of files close by, and those are
// fetched while the reader is busy with what it has. A word may mean something else, so this is a guess, with an account of its own
// (mentioned, in afford), and what was fetched for it isn't looked through until it's read: it doesn't go on by itself, but for
// what is included by statements and programs that others run (includes.go, runs.go).

const (
	// maxText is how much of a file is looked through, in bytes.
	maxText = 1 << 20
	// maxMentioned is the number of files from which what mentions them is taken for a list, which says nothing about what's next.
	maxMentioned = 48
	// sameName is the number of files of a name that are equally close from which none of them is meant.
	sameName = 4
	// farthest is how many steps it is at most from the directory of a file to that of one that it means. A program is further
	// away from its data: /usr/bin from /usr/lib/PACKAGE/TARGET/VERSION.
	farthest        = 4
	farthestProgram = 6
	// longLook is how long a file is looked through. Those of a distribution take milliseconds; one can be written, for a layer that has
	// names for it, that takes hours.
	longLook = time.Second
	// shortWord and longWord bound the words that are taken for names.
	shortWord, longWord = 2, 255
)

// kind is how the files of a kind mention others.
type kind uint8

const (
	silent    kind = iota // not that we know
	includes              // by their names
	importing             // by their names without what follows the stem, or by those of directories with an __init__ file in it
	programs              // by their names, among strings that are something else
	scripts               // by paths and names: what a linker finds in the place of a library
)

// kinds are the kinds of files by the ends of their names: what is read when it's compiled, and what's loaded when it runs.
var kinds = map[string]kind{
	".so": scripts,
	".h":  includes, ".hh": includes, ".hpp": includes, ".hxx": includes, ".inc": includes, ".tcc": includes,
	".py": importing, ".pyc": importing, ".pm": importing, ".rb": importing, ".js": importing, ".mjs": importing, ".cjs": importing, ".lua": importing,
}

// document is a file that may mention others.
type document struct {
	f            *Filler
	inode        uint32
	dir          string
	name, suffix string // suffix is what follows the stem
	kind         kind
	until        look
}

// A look is how long a file may be looked through: until a time, and no longer than its layer is open. The zero value has no bound.
type look struct {
	f  *Filler
	at time.Time
}

func (f *Filler) lookUntil() look { return look{f, time.Now().Add(longLook)} }

// over reports whether it's enough.
func (l look) over() bool { return l.f != nil && (l.f.ctx.Err() != nil || time.Now().After(l.at)) }

// documentOf returns a file as what may mention others, and whether it may.
func (f *Filler) documentOf(e extent) (document, bool) {
	t := document{f: f, inode: e.inode, name: f.nameOf(e.dir, e.inode), until: f.lookUntil()}
	t.suffix = t.name[len(stemOf(t.name)):]
	t.kind = kinds[path.Ext(t.name)]
	if t.kind == silent && f.binary.has(e.first) && !strings.Contains(t.name, ".so") {
		t.kind = programs
	}
	size := f.layer.Inode(e.inode).Size
	if t.kind == silent || t.kind != programs && size > maxText || t.kind == scripts && size > maxLinkerScript {
		return t, false
	}
	t.dir = f.pathOf(e.dir)
	return t, true
}

// follow fetches what a document mentions.
func (t document) follow() {
	r, ok := t.f.sink.(io.ReaderAt)
	if !ok {
		return
	}
	in := t.f.layer.Inode(t.inode)
	first, end := t.f.framesOf(&in)
	if first == end {
		return
	}
	parts := []part{{0, in.Size}}
	if t.kind == programs {
		// Of one that isn't all there, what is has been found all the same.
		p, _ := parseELF(io.NewSectionReader(r, in.Data, in.Size), in.Size)
		parts = p.constant
	}
	isDriven := t.kind == programs && t.f.driven.has(first)
	left := int64(maxText)
	v := t.f.view()
	args := t.f.argsOf(t.inode)
	passes := passesFor(t.name, args)
	distances := map[place]int{}
	helpers := map[place]bool{} // and whether they will be run
	included := map[place]bool{}
	seen := map[string]bool{}
	for _, part := range parts {
		p := make([]byte, min(part.n, left))
		left -= int64(len(p))
		t.f.readPresent(r, p, in.Data+part.off)
		if t.kind == programs {
			t.helpers(v, p, passes, func(file place, sure bool) { helpers[file] = sure })
		}
		if t.kind == scripts {
			t.linkerScript(v, p)
			return
		}
		if t.kind == includes {
			for _, file := range t.includedBy(v, p) {
				included[file], distances[file] = true, 0
			}
		}
		words(p, func(w []byte) {
			if seen[string(w)] || t.until.over() {
				return
			}
			word := string(w)
			seen[word] = true
			files, distance := v.mentioned(t, word)
			if len(files) == 0 && t.kind == importing && len(word) > shortWord {
				// Of a string in a compiled module the byte that follows is often a letter.
				files, distance = v.mentioned(t, word[:len(word)-1])
			}
			for _, file := range files {
				switch {
				case isDriven && file.isHelper():
					helpers[file] = false
				case !included[file]:
					distances[file] = distance
				}
			}
		})
	}
	t.f.run(helpers)
	if len(helpers) > 0 {
		t.link(v, librariesFor(t.name, args))
	}
	if len(distances) == 0 || len(distances) > maxMentioned {
		return
	}
	files := make([]place, 0, len(distances))
	for file := range distances {
		files = append(files, file)
	}
	slices.SortFunc(files, func(a, b place) int {
		return cmp.Or(cmp.Compare(distances[a], distances[b]), cmp.Compare(a.inode, b.inode))
	})
	s := t.f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, file := range files {
		in := file.f.layer.Inode(file.inode)
		first, end := file.f.framesOf(&in)
		if file.f.closed || first == end {
			continue
		}
		if got := file.f.want(first, end, mentioned, anySize); got > first && file.f.binary.has(first) {
			file.f.named.set(first) // so that a library brings what it needs
		}
		if included[file] {
			file.f.started.set(first)
			file.f.learn(first)
		}
	}
	s.dispatch()
}

// readPresent reads what there is of a range of the data space. The rest stays zero.
func (f *Filler) readPresent(r io.ReaderAt, p []byte, off int64) {
	first, end := f.layer.ChunksOf(off, int64(len(p)))
	for c := first; c < end; c++ {
		ch := &f.layer.Chunks[c]
		from, to := max(ch.Data-off, 0), min(ch.End()-off, int64(len(p)))
		if !f.sink.Have(c) {
			continue
		}
		if _, err := r.ReadAt(p[from:to], off+from); err != nil {
			clear(p[from:to])
		}
	}
}

// words calls word for what may be a name in p. What it's called with is p's.
func words(p []byte, word func(w []byte)) {
	for i := 0; i < len(p); i++ {
		k := i
		for k < len(p) && inWords[p[k]] {
			k++
		}
		if n := k - i; n >= shortWord && n <= longWord {
			word(p[i:k])
		}
		i = k
	}
}

// inWords are the bytes that words consist of.
var inWords = func() (in [256]bool) {
	for _, c := range []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+./") {
		in[c] = true
	}
	return in
}()

// mentioned returns the files that a word of a document means, which are those of its name that are closest to it, and how many
// steps it is to the directory that they're in.
func (v view) mentioned(t document, word string) (files []place, distance int) {
	if strings.HasPrefix(word, "/") {
		if file, ok := v.find(word); ok {
			return []place{file}, 0
		}
		return nil, 0
	}
	above, name := path.Split(strings.TrimPrefix(strings.TrimRight(word, "./"), "./"))
	stem := stemOf(name)
	limit := farthest
	if t.kind == programs {
		limit = farthestProgram
	}
	distance = limit + 1
	for _, f := range v {
		f.names.each(stem, func(dir uint32, e layer.Entry) {
			if !t.means(f, name, above, e) {
				return
			}
			at := f.pathOf(dir)
			d := steps(t.dir, at)
			if d > distance || d > limit || above != "" && !strings.HasSuffix("/"+at+"/", "/"+above) {
				return
			}
			full := at + "/" + e.Name
			if in := f.layer.Inode(e.Inode); in.IsDir() {
				full += t.init()
			} else if top, i := v.lookup(strings.TrimPrefix(full, "/")); top != f || i != e.Inode {
				return // it's hidden
			}
			file, ok := v.find(full)
			if !ok {
				return
			}
			if d < distance {
				files, distance = files[:0], d
			}
			files = append(files, file)
		})
	}
	if len(files) > sameName {
		return nil, 0
	}
	return files, distance
}

// means reports whether a name in a document, below above if that isn't empty, may mean an entry of the same stem.
func (t document) means(f *Filler, name, above string, e layer.Entry) bool {
	whole := e.Name == name
	if in := f.layer.Inode(e.Inode); in.IsDir() {
		return whole && t.kind == importing
	}
	suffix := e.Name[len(stemOf(e.Name)):]
	switch {
	case whole && suffix == "":
		return above != "" // else it's any word
	case whole && above != "":
		return true
	case whole:
		return t.kind == programs || suffix == t.suffix || kinds[path.Ext(name)] == t.kind
	case len(stemOf(name)) < len(name):
		return false // it says another suffix
	default:
		return t.kind == importing && (suffix == t.suffix || strings.HasSuffix(suffix, ".so"))
	}
}

// pycache is where Python has compiled modules, beside the modules themselves.
const pycache = "__pycache__"

// init returns the path, in a directory, of the file that is read when it's imported, as Python has them.
func (t document) init() string {
	if path.Base(t.dir) == pycache {
		return "/" + pycache + "/__init__" + t.suffix
	}
	return "/__init__" + t.suffix
}

// steps returns how many steps it is from a directory to another, up and down.
func steps(from, to string) int {
	for from != "" || to != "" {
		a, restA, _ := strings.Cut(from, "/")
		b, restB, _ := strings.Cut(to, "/")
		if a != b {
			break
		}
		from, to = restA, restB
	}
	return depth(from) + depth(to)
}

func depth(dir string) int {
	if dir == "" {
		return 0
	}
	return strings.Count(dir, "/") + 1
}
