package fill

import (
	"bytes"
	"path"
	"strings"
)

// A compiler's driver has a pass for each language, a program of some 10 MB, and has what they make linked with libraries, which are large as well.
// Which of them are read isn't in the driver, but in the command that runs it: the files that it names say what they are, and its
// options what is made of them.

// passes are GCC's passes by what the names of the files end with that they compile, see "Options Controlling the Kind of Output" in its
// manual. Of other drivers none is found by these names.
var passes = map[string]string{
	".c": "cc1", ".i": "cc1", ".h": "cc1", ".S": "cc1", ".sx": "cc1",
	".cc": "cc1plus", ".cp": "cc1plus", ".cxx": "cc1plus", ".cpp": "cc1plus", ".CPP": "cc1plus", ".c++": "cc1plus", ".C": "cc1plus", ".ii": "cc1plus",
	".m": "cc1obj", ".mi": "cc1obj", ".mm": "cc1objplus", ".M": "cc1objplus", ".mii": "cc1objplus",
	".f": "f951", ".for": "f951", ".F": "f951", ".FOR": "f951", ".f90": "f951", ".f95": "f951", ".f03": "f951", ".f08": "f951", ".F90": "f951", ".F95": "f951",
	".go": "go1", ".d": "d21", ".adb": "gnat1", ".ads": "gnat1",
}

// linkable are what the names of the files end with that are only linked.
var linkable = map[string]bool{".o": true, ".a": true, ".s": true}

// passesFor returns the passes that a driver will run, by its name and what it's called with.
func passesFor(driver string, args []string) map[string]bool {
	names := map[string]bool{}
	for _, arg := range args {
		name, ok := passes[path.Ext(arg)]
		switch {
		case !ok || strings.HasPrefix(arg, "-"):
			continue
		case name == "cc1" && strings.Contains(driver, "++"):
			name = "cc1plus" // g++ takes C for C++
		}
		names[name] = true
	}
	return names
}

// librariesFor returns the libraries that are read when a driver has something linked, by its name and what it's called with: of each, its
// names, of which the first is taken that there is.
func librariesFor(driver string, args []string) (files [][]string) {
	names := []string{"gcc", "c"}
	if strings.Contains(driver, "++") {
		names = append(names, "stdc++", "m")
	}
	isStatic, linked := false, false
	for _, arg := range args {
		_, isSource := passes[path.Ext(arg)]
		name, isLibrary := strings.CutPrefix(arg, "-l")
		switch {
		case arg == "-c" || arg == "-S" || arg == "-E" || arg == "-M" || arg == "-MM" || arg == "-fsyntax-only" || arg == "-nostdlib":
			return nil
		case arg == "-static":
			isStatic = true
		case isLibrary && name != "":
			names = append(names, name)
		case !strings.HasPrefix(arg, "-") && (isSource || linkable[path.Ext(arg)]):
			linked = true
		}
	}
	if !linked {
		return nil
	}
	for _, name := range names {
		if isStatic {
			files = append(files, []string{"lib" + name + ".a"})
		} else {
			files = append(files, []string{"lib" + name + ".so", "lib" + name + ".a"})
		}
	}
	return files
}

// link asks for libraries that will be linked: those closest to the driver.
func (t document) link(v view, libraries [][]string) {
	var files []place
	for _, names := range libraries {
		for _, name := range names {
			if found, _ := v.mentioned(t, name); len(found) > 0 {
				files = append(files, found...)
				break
			}
		}
	}
	s := t.f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, file := range files {
		in := file.f.layer.Inode(file.inode)
		if first, end := file.f.framesOf(&in); first < end && !file.f.closed {
			file.f.started.set(first) // so that a script is followed
			file.f.need(file.inode, part{0, in.Size}, profiled, commanded)
		}
	}
	s.dispatch()
}

// maxLinkerScript is the size up to which what has the name of a library is looked at for being a script. Those that there are have some 300 bytes.
const maxLinkerScript = 4 << 10

// linkerScript asks for the libraries that a script stands for which has a library's name, as libc.so does for libc.so.6 and libc_nonshared.a: see
// "Implicit Linker Scripts" in the manual of GNU ld.
func (t document) linkerScript(v view, script []byte) {
	if bytes.HasPrefix(script, []byte(elfMagic)) {
		return
	}
	var files []place
	for word := range strings.FieldsFuncSeq(string(script), func(r rune) bool { return strings.ContainsRune(" \t\n(),;", r) }) {
		if !strings.Contains(word, ".so") && path.Ext(word) != ".a" {
			continue
		}
		if file, ok := v.library(word, "", []string{t.dir}); ok {
			files = append(files, file)
		}
	}
	s := t.f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, file := range files {
		if !file.f.closed {
			file.need()
		}
	}
	s.dispatch()
}

// called takes note of what a program will be called with.
func (p place) called(args []string) {
	in := p.f.layer.Inode(p.inode)
	if first, end := p.f.framesOf(&in); first < end && len(args) > 0 && !p.f.closed && !p.f.read.has(first) {
		p.f.args[p.inode] = args
	}
}

// argsOf returns what a program will be called with, as far as that is known, to who looks through it.
func (f *Filler) argsOf(inode uint32) []string {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	args := f.args[inode]
	delete(f.args, inode)
	return args
}
