package worker

import (
	"cmp"
	"path"
	"slices"
	"strings"

	bkexecutor "github.com/moby/buildkit/executor"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// A step says what it runs before it begins, and while its container is made nobody reads: there is time to fetch that.

// expect is told what of a lazy layer's image will be read at first; dir is where the layer is mounted.
type expect func(dir string, files []fill.Expected)

func (w *Worker) expect(dir string, files []fill.Expected) {
	if s, ok := w.snapshotter.(*snapshot.Snapshotter); ok {
		s.Expect(dir, files)
	}
}

// defaultPath is where programs are if a step doesn't say: that of BuildKit on Linux.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// maxPrograms bounds what is expected of one step.
const maxPrograms = 16

// programsOf returns what a step reads first: who its user is, and its programs.
func programsOf(meta bkexecutor.Meta) (files []fill.Expected) {
	dirs := defaultPath
	for _, v := range meta.Env {
		if value, ok := strings.CutPrefix(v, "PATH="); ok {
			dirs = value
		}
	}
	files = []fill.Expected{at("etc/passwd"), at("etc/group")}
	known := map[string]int{} // programs, and where they are in files
	for _, c := range commandsIn(meta.Args) {
		name := c[0]
		if i, ok := known[name]; ok {
			files[i].Args = slices.Concat(files[i].Args, c[1:])
			continue
		}
		if len(known) == maxPrograms {
			break
		}
		known[name] = len(files)
		e := fill.Expected{Args: c[1:]}
		switch {
		case path.IsAbs(name):
			e.Paths = append(e.Paths, inRoot(name))
		case strings.Contains(name, "/"):
			e.Paths = append(e.Paths, inRoot(path.Join(meta.Cwd, name)))
		default:
			for dir := range strings.SplitSeq(dirs, ":") {
				e.Paths = append(e.Paths, inRoot(path.Join(dir, name)))
			}
		}
		files = append(files, e)
	}
	return append(files, localesOf(meta.Env)...)
}

// commandsIn returns the commands of a step: the one that it is and, if that is a shell's with a script, those in the script.
func commandsIn(args []string) [][]string {
	if len(args) == 0 {
		return nil
	}
	shell := strings.HasSuffix(args[0], "sh")
	for i, arg := range args[:len(args)-1] {
		if i > 0 && shell && strings.HasPrefix(arg, "-") && strings.HasSuffix(arg, "c") { // sh -c, bash -ec
			return append([][]string{args[:1]}, commandsOf(args[i+1])...)
		}
	}
	return [][]string{args}
}

// at is a file that is in one place.
func at(name string) fill.Expected { return fill.Expected{Paths: []string{name}} }

// charsets are where glibc keeps the list of its character sets, by the way it is installed.
var charsets = []string{
	"usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache", "usr/lib/aarch64-linux-gnu/gconv/gconv-modules.cache", "usr/lib64/gconv/gconv-modules.cache",
}

// localesOf returns what programs read at their start, of whatever kind they are, to find out how to write to their users: of
// their character set the description and, to load it, the list, and the time zone. Without a locale nothing is read of the first two.
func localesOf(env []string) []fill.Expected {
	value := map[string]string{}
	for _, v := range env {
		name, is, _ := strings.Cut(v, "=")
		value[name] = is
	}
	files := []fill.Expected{at("etc/localtime")}
	locale := cmp.Or(value["LC_ALL"], value["LC_CTYPE"], value["LANG"])
	if locale == "" || locale == "C" || locale == "POSIX" || strings.Contains(locale, "/") {
		return files
	}
	names := []string{locale}
	if name, charset, ok := strings.Cut(locale, "."); ok {
		// As setlocale does it: C.UTF-8 is in C.utf8.
		names = append(names, name+"."+strings.ToLower(strings.ReplaceAll(charset, "-", "")))
	}
	var paths []string
	for _, name := range names {
		paths = append(paths, inRoot("usr/lib/locale/"+name+"/LC_CTYPE"))
	}
	return append(files, fill.Expected{Paths: paths}, fill.Expected{Paths: charsets})
}

// inRoot returns a path as one below the root.
func inRoot(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// notPrograms are words in the place of a command that aren't programs, or needn't be: the shell's own.
var notPrograms = func() map[string]bool {
	not := map[string]bool{}
	for word := range strings.FieldsSeq(". : [ ! alias break case cd command continue do done echo elif else esac eval exec exit export false fi for" +
		" getopts hash if in jobs kill local printf pwd read readonly return set shift source test then times trap true type ulimit umask" +
		" unalias unset until wait while { }") {
		not[word] = true
	}
	return not
}()

// throughOthers are commands whose arguments are one.
var throughOthers = map[string]bool{"command": true, "env": true, "exec": true, "nice": true, "sudo": true, "time": true}

// startsCommand are words behind which a command stands.
var startsCommand = map[string]bool{"!": true, "do": true, "elif": true, "else": true, "if": true, "then": true, "until": true, "while": true, "{": true}

// commandsOf returns what stands where a shell expects commands, each with its arguments. It knows little of the shell's language: a
// mistake costs a lookup, or a file that is fetched and not read.
func commandsOf(script string) (commands [][]string) {
	script = strings.ReplaceAll(script, "\\\n", " ")
	for command := range strings.FieldsFuncSeq(script, func(r rune) bool { return strings.ContainsRune("\n;&|()`", r) }) {
		words := strings.Fields(command)
		for i := range words {
			words[i] = strings.Trim(words[i], `"'`)
		}
		for i, word := range words {
			if startsCommand[word] || throughOthers[word] || strings.HasPrefix(word, "-") || isAssignment(word) {
				continue
			}
			if !notPrograms[word] && !strings.ContainsAny(word, "$<>*?=\"'") && word != "" {
				commands = append(commands, words[i:])
			}
			break
		}
	}
	return commands
}

// isAssignment reports whether a word sets a variable for the command behind it.
func isAssignment(word string) bool {
	name, _, ok := strings.Cut(word, "=")
	return ok && name != "" && !strings.ContainsAny(name, "/-.$")
}
