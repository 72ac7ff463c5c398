package fill

import (
	"bytes"
	"cmp"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A program that runs others names them: a compiler's driver the passes, which are in a directory of its own, and the assembler beside it. They
// run one after the other, each when the one before is done, so they are asked for, with what they need, when the driver is there. Which
// of them will run the driver doesn't say, so those that are large aren't fetched unless the command says it (compilers.go), and the others
// have an account of their own (runs, in afford).

const (
	// largeHelper is the number of compressed bytes from which a program isn't fetched because another one runs it.
	largeHelper = 512 << 10
	// ownDir is how many names a path has at least for being a program's own directory, and helperDepth how far below that
	// are the programs that it runs: /usr/lib/PACKAGE, and there TARGET/VERSION.
	ownDir, helperDepth = 3, 2
)

// isHelper reports whether a file is a program that may be fetched because another one runs it.
func (p place) isHelper() bool {
	in := p.f.layer.Inode(p.inode)
	first, end := p.f.framesOf(&in)
	frames := p.f.layer.Frames
	return first < end && p.isProgram() && frames[end-1].End()-frames[first].Offset <= largeHelper
}

func (p place) isProgram() bool {
	name, _ := p.f.layer.Path(p.inode)
	return p.f.layer.Inode(p.inode).Mode&0o111 != 0 && !strings.Contains(path.Base(name), ".so")
}

// helpers calls found for the programs that a program runs, by a part of it that is only read, and whether they will be run, which are
// those that passes names.
func (t document) helpers(v view, p []byte, passes map[string]bool, found func(file place, sure bool)) {
	var own []string
	for s := range bytes.SplitSeq(p, []byte{0}) {
		name := strings.Trim(string(s[:min(len(s), longWord)]), "/")
		if len(s) > 0 && s[0] == '/' && strings.Count(name, "/") >= ownDir-1 {
			if f, inode := v.lookup(name); f != nil {
				if in := f.layer.Inode(inode); in.IsDir() {
					own = append(own, name)
				}
			}
		}
	}
	if len(own) == 0 {
		return
	}
	seen := map[string]bool{}
	commands(p, func(w []byte) {
		if seen[string(w)] || t.until.over() {
			return
		}
		name := string(w)
		seen[name] = true
		v.programs(name, func(at string, file place) {
			if !file.isHelper() && !passes[name] {
				return
			}
			if slices.ContainsFunc(own, func(top string) bool {
				return (at == top || strings.HasPrefix(at, top+"/")) && steps(top, at) <= helperDepth
			}) {
				found(file, passes[name])
			}
			// The tools of a target are called after it, as the driver is, whatever they're called by.
			if family, _, ok := strings.Cut(t.name, "-"); ok && at == t.dir {
				if full, _ := file.f.layer.Path(file.inode); strings.HasPrefix(path.Base(full), family+"-") {
					found(file, passes[name])
				}
			}
		})
	})
}

// programs calls found for the programs of a name, and the directories that they're in.
func (v view) programs(name string, found func(dir string, file place)) {
	for _, f := range v {
		f.names.each(stemOf(name), func(dir uint32, e layer.Entry) {
			if e.Name != name {
				return
			}
			at := f.pathOf(dir)
			if file, ok := v.find(at + "/" + name); ok && file.isProgram() {
				found(at, file)
			}
		})
	}
}

// commands calls command for what strings or lines in p begin with, if it may be the name of a program. What it's called with is p's.
func commands(p []byte, command func(w []byte)) {
	start := true // of a string or line, but for blanks
	for i := 0; i < len(p); i++ {
		switch c := p[i]; {
		case c == 0 || c == '\n':
			start = true
		case c == ' ' || c == '\t':
		case start && inWords[c] && c != '-':
			k := i
			for k < len(p) && inWords[p[k]] {
				k++
			}
			w := p[i:k]
			if n := len(w); n >= shortWord && n <= longWord && k < len(p) && (p[k] == 0 || p[k] == ' ') && !bytes.ContainsRune(w, '/') {
				command(w)
			}
			start, i = false, k-1
		default:
			start = false
		}
	}
}

// run asks for programs that another one runs, and for what they need; for all of those that it's sure to run.
func (f *Filler) run(helpers map[place]bool) {
	if len(helpers) == 0 || len(helpers) > maxMentioned {
		return
	}
	files := slices.SortedFunc(maps.Keys(helpers), func(a, b place) int { return cmp.Compare(a.inode, b.inode) })
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, file := range files {
		in := file.f.layer.Inode(file.inode)
		if first, end := file.f.framesOf(&in); first < end && !file.f.closed {
			file.f.driven.set(first)
			if !helpers[file] {
				file.start(runs)
				continue
			}
			file.start(commanded)
			file.f.need(file.inode, part{0, in.Size}, profiled, commanded)
		}
	}
	s.dispatch()
}

// start asks for a program that is expected to be run, and looks through it as soon as it's there.
func (p place) start(why evidence) {
	in := p.f.layer.Inode(p.inode)
	if first, end := p.f.framesOf(&in); end == first+1 { // of a larger one, what it mentions may not be in what comes first
		p.f.started.set(first)
	}
	p.f.need(p.inode, p.head(), ahead, why)
}
