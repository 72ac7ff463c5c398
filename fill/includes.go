package fill

import (
	"bytes"
	"io/fs"
	"path"
	"strings"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A header says in a statement which ones are read after it, and they do: while the compiler reads one, those that it leads to are fetched, each
// when the one that includes it is there. A condition may leave some out, so it's a guess still, of what is mentioned.

// includedBy returns the headers that a header includes.
func (t document) includedBy(v view, p []byte) (files []place) {
	for line := range bytes.Lines(p) {
		name, quoted, ok := parseInclude(line)
		if !ok {
			continue
		}
		if t.until.over() {
			break
		}
		if quoted {
			if file, ok := v.find(t.dir + "/" + name); ok {
				files = append(files, file)
				continue
			}
		}
		files = append(files, v.header(t.dir, name)...)
	}
	return files
}

// parseInclude returns the name in a line that includes a file, and whether it's meant from the including file's directory first.
func parseInclude(line []byte) (name string, quoted, ok bool) {
	rest, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("#"))
	if !ok {
		return "", false, false
	}
	rest = bytes.TrimSpace(rest)
	rest, ok = bytes.CutPrefix(rest, []byte("include"))
	if !ok {
		return "", false, false
	}
	rest = bytes.TrimSpace(bytes.TrimPrefix(rest, []byte("_next")))
	if len(rest) < 2 || rest[0] != '<' && rest[0] != '"' {
		return "", false, false
	}
	end := byte('"')
	if rest[0] == '<' {
		end = '>'
	}
	n := bytes.IndexByte(rest[1:], end)
	if n < 1 || n > longWord {
		return "", false, false
	}
	name = string(rest[1 : 1+n])
	return name, end == '"', fs.ValidPath(name)
}

// header returns the files that a header in a directory may mean by a name: those in the closest directories that are called include, or
// are a target's in one of these.
func (v view) header(from, name string) (files []place) {
	distance := 0
	for _, f := range v {
		f.names.each(stemOf(path.Base(name)), func(dir uint32, e layer.Entry) {
			full := f.pathOf(dir) + "/" + e.Name
			top, ok := strings.CutSuffix(full, "/"+name)
			if !ok || !isIncludeDir(top) {
				return
			}
			file, ok := v.find(full)
			if d := steps(from, top); ok && (len(files) == 0 || d <= distance) {
				if d < distance {
					files = files[:0]
				}
				files, distance = append(files, file), d
			}
		})
	}
	if len(files) > sameName {
		return nil
	}
	return files
}

// isIncludeDir reports whether compilers look for headers in a directory, by its name: /usr/include, or there x86_64-linux-gnu.
func isIncludeDir(dir string) bool {
	above, base := path.Split(dir)
	return base == "include" || strings.Count(base, "-") >= 2 && path.Base(above) == "include"
}
