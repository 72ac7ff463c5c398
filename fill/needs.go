package fill

import (
	"cmp"
	"errors"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// What a file needs is known, not guessed, where the file says so itself: a program names its loader and its libraries, and
// they name theirs. So they're asked for when the program's first bytes have arrived, rather than one after the other as the
// loader opens them. They may be in other layers of the image: see Scheduler.Join.

// Join says that layers are of one image, from the lowest to the topmost: what a file of one needs may be in another. Those that
// aren't known are nil. A layer may be of several images.
func (s *Scheduler) Join(layers ...*Filler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range layers {
		for k, o := range layers {
			if f != nil && o != nil && f != o && !f.closed && !o.closed {
				f.beside[o] = k - i
			}
		}
	}
}

// view is the layers that a path may lead through, the topmost first. It knows nothing of whiteouts: it's good for what is
// fetched in vain if it's wrong.
type view []*Filler

func (f *Filler) view() view {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	return f.layers()
}

// layers is view for who holds Scheduler.mu.
func (f *Filler) layers() view {
	v := view{f}
	for o := range f.beside {
		v = append(v, o)
	}
	slices.SortFunc(v, func(a, b *Filler) int { return cmp.Compare(f.beside[b], f.beside[a]) }) // f itself is at 0
	return v
}

// place is an inode of a layer: if nothing else is said, a regular file with content.
type place struct {
	f     *Filler
	inode uint32
}

const (
	maxLinks = 40  // that a path leads through, as in Linux
	maxSteps = 256 // names in it, with those of the symlinks
)

// find returns the regular file at a path, following symlinks from layer to layer.
func (v view) find(name string) (place, bool) {
	_, f, inode := v.resolve(name)
	if f == nil || !hasContent(f.layer, inode) {
		return place{}, false
	}
	return place{f, inode}, true
}

// resolve follows a path from layer to layer. It returns the path without symlinks, the topmost layer that has it and its inode there; no
// layer if none has it.
func (v view) resolve(name string) (at string, f *Filler, inode uint32) {
	rest := strings.Split(name, "/")
	links := 0
	if len(v) > 0 {
		f, inode = v[0], layer.Root
	}
	for steps := 0; len(rest) > 0; steps++ {
		part := rest[0]
		rest = rest[1:]
		switch {
		case steps == maxSteps:
			return "", nil, 0
		case part == "" || part == ".":
			continue
		case part == "..":
			at, _ = path.Split(at)
			at = strings.TrimSuffix(at, "/")
			continue
		}
		next := path.Join(at, part)
		if f, inode = v.lookup(next); f == nil {
			return "", nil, 0
		}
		in := f.layer.Inode(inode)
		if in.Target == "" {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", nil, 0
		}
		if strings.HasPrefix(in.Target, "/") {
			at = ""
		}
		rest = append(strings.Split(in.Target, "/"), rest...)
	}
	return at, f, inode
}

// hasContent reports whether an inode is a regular file that isn't empty.
func hasContent(l *layer.Layer, inode uint32) bool {
	in := l.Inode(inode)
	return in.IsRegular() && in.NumChunks > 0
}

// lookup returns the layer that has a path, and its inode there.
func (v view) lookup(name string) (*Filler, uint32) {
	for _, f := range v {
		if i, err := f.layer.Lookup(name); err == nil {
			if in := f.layer.Inode(i); !in.IsWhiteout() {
				return f, i
			}
		}
	}
	return nil, 0
}

// usual are the directories in which loaders look for libraries, of glibc and musl, on Debian and elsewhere.
var usual = []string{
	"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu",
	"lib64", "usr/lib64", "lib", "usr/lib", "usr/local/lib",
}

// library returns the file that a program in the directory origin means by the name of a library.
func (v view) library(name, origin string, runpath []string) (place, bool) {
	if strings.Contains(name, "/") {
		return v.find(name)
	}
	for _, dir := range runpath {
		dir = strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(dir)
		if p, ok := v.find(dir + "/" + name); ok {
			return p, true
		}
	}
	for _, dir := range usual {
		if p, ok := v.find(dir + "/" + name); ok {
			return p, true
		}
	}
	return place{}, false
}

// wholeLibrary is the number of compressed bytes up to which all of a library is fetched that something needs.
const wholeLibrary = 2 << 20

// loaderCache is what glibc's loader reads before any library.
const loaderCache = "etc/ld.so.cache"

// announced are files that are read after others, whatever the image: who runs a command looks up its user, then a shell
// runs it.
var announced = map[string][]string{
	"etc/passwd": {"etc/group", "bin/sh", loaderCache},
	"etc/group":  {"bin/sh", loaderCache},
	// glibc's setlocale reads one after the other.
	"usr/lib/locale/C.utf8/LC_CTYPE": {"usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache", "usr/lib/aarch64-linux-gnu/gconv/gconv-modules.cache"},
}

// announcements returns, by frame, what the reading of a layer's files announces.
func announcements(l *layer.Layer) map[int][]string {
	by := map[int][]string{}
	for name, then := range announced {
		if i, err := l.Lookup(name); err == nil && hasContent(l, i) {
			by[int(l.Chunks[l.Inode(i).FirstChunk].Frame)] = then
		}
	}
	return by
}

// learn is called when a frame was asked for or is there, to find out what is needed along with it.
func (f *Filler) learn(frame int) {
	if f.closed || f.copied.has(frame) {
		return
	}
	if names := f.announces[frame]; names != nil && f.touched.has(frame) {
		delete(f.announces, frame)
		f.wg.Go(func() { f.fetchAll(names) })
	}
	isAsked, isModule := f.touched.has(frame), f.modules.has(frame)
	isStarted := f.started.has(frame)
	all := f.s.reader != nil // who reads an image from one end to the other doesn't go by what files mention
	if (isAsked || isStarted || isModule && f.named.has(frame)) && !f.read.has(frame) && f.present(frame) {
		f.read.set(frame)
		if file, k := f.fileAround(frame); k >= 0 && file.first == frame {
			f.wg.Go(func() {
				if isModule && f.importsOf(file) || !isAsked && !isStarted || all {
					return
				}
				if t, ok := f.documentOf(file); ok {
					t.follow()
				}
			})
		}
	}
	inode, waits := f.unread[frame]
	if !waits && f.programs.has(frame) && (f.touched.has(frame) || f.named.has(frame)) {
		if file, k := f.fileAround(frame); k >= 0 && file.first == frame && !f.looked[file.inode] {
			inode, waits = file.inode, true
		}
	}
	if waits {
		delete(f.unread, frame)
		f.looked[inode] = true
		f.wg.Go(func() { f.look(inode) })
	}
}

// fetchAll asks for files by their paths.
func (f *Filler) fetchAll(names []string) {
	v := f.view()
	files := make([]place, 0, len(names))
	for _, name := range names {
		if file, ok := v.find(name); ok {
			files = append(files, file)
		}
	}
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	for _, file := range files {
		file.f.need(file.inode, part{0, file.f.layer.Inode(file.inode).Size}, ahead, linked)
	}
	f.s.dispatch()
}

// Expected is a file that is about to be read, or run.
type Expected struct {
	// Paths are those that it may be at, below the root: the first is taken that there is. One that ends with a slash is going to be copied,
	// a directory or a file: all that is below it is asked for, if SchedulerOptions.Background allows it, and nothing that it needs.
	Paths []string
	// Args are what a program is called with, as far as that's known.
	Args []string
}

// Expect asks for files that are about to be read, and for what they need, without waiting. They are looked for in all layers of an image
// that the Filler's layer is one of.
func (f *Filler) Expect(files []Expected) {
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.closed {
		return
	}
	f.wg.Go(func() {
		v := f.view()
		for _, e := range files {
			for _, name := range e.Paths {
				if strings.HasSuffix(name, "/") {
					v.fetchTree(name)
				} else if file, ok := v.find(name); ok {
					s.mu.Lock()
					file.called(e.Args)
					file.start(linked)
					s.dispatch()
					s.mu.Unlock()
					break
				}
			}
		}
	})
}

// need asks for a file that a program needs, or for where it begins if it's large.
func (p place) need() { p.f.need(p.inode, p.head(), ahead, linked) }

// head is what's asked for of a file before anybody has read it: all of it, or where it begins if it's large.
func (p place) head() part {
	in := p.f.layer.Inode(p.inode)
	if first, end := p.f.framesOf(&in); first < end && p.f.layer.Frames[end-1].End()-p.f.layer.Frames[first].Offset > wholeLibrary {
		return part{0, 1}
	}
	return part{0, in.Size}
}

// look reads an ELF file as far as it is there, and asks for what is needed when it runs: first what the loader reads of
// it, then its libraries, then the rest of it. What lacks for that, it's called again for.
func (f *Filler) look(inode uint32) {
	r, ok := f.sink.(io.ReaderAt)
	if !ok {
		return
	}
	in := f.layer.Inode(inode)
	p, err := parseELF(io.NewSectionReader(r, in.Data, in.Size), in.Size)
	v := f.view()
	var libraries []place
	if err == nil {
		dir := ""
		if strings.Contains(strings.Join(p.runpath, ":"), "ORIGIN") {
			name, _ := f.layer.Path(inode)
			dir = path.Dir(name)
		}
		for _, name := range p.needed {
			if lib, ok := v.library(name, dir, p.runpath); ok {
				libraries = append(libraries, lib)
			}
		}
	}
	for _, name := range []string{p.interp, loaderCache} {
		if file, ok := v.find(name); ok && p.interp != "" {
			libraries = append(libraries, file)
		}
	}
	var modules []place
	if p.interp != "" {
		name, _ := f.layer.Path(inode)
		modules = v.startOf(path.Base(name))
	}
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, part := range p.first {
		for _, i := range f.need(inode, part, ahead, linked) {
			if err != nil && !errors.Is(err, errNotELF) {
				f.unread[i] = inode
			}
		}
	}
	for _, lib := range libraries {
		lib.need()
	}
	for _, module := range modules {
		module.f.need(module.inode, module.head(), ahead, imports)
	}
	if p.interp != "" || err == nil && len(p.needed) == 0 {
		f.need(inode, part{0, in.Size}, profiled, linked)
	}
	s.dispatch()
}

// need asks for a part of a file that will be read, and returns its frames that aren't there.
func (f *Filler) need(inode uint32, p part, l level, why evidence) (missing []int) {
	in := f.layer.Inode(inode)
	first, end := f.layer.ChunksOf(in.Data+p.off, min(p.n, in.Size-p.off))
	for c := first; c < end && !f.closed && !f.s.pausing(f); c++ {
		i := int(f.layer.Chunks[c].Frame)
		f.named.set(i)
		switch {
		case f.flights[i] != nil:
			f.s.raise(f.flights[i], l)
			missing = append(missing, i)
		case f.there(i):
			f.learn(i)
		case f.afford(f.layer.Frames[i].Size, why):
			f.flight(i, l, why)
			missing = append(missing, i)
		}
	}
	return missing
}

// framesOf returns the frames of a file. It has none if the tree can't be read any more: see layer.Layer.Err.
func (f *Filler) framesOf(in *layer.Inode) (first, end int) {
	if in.NumChunks == 0 {
		return 0, 0
	}
	chunks := f.layer.Chunks
	return int(chunks[in.FirstChunk].Frame), int(chunks[in.FirstChunk+in.NumChunks-1].Frame) + 1
}
