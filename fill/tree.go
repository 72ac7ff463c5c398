package fill

import (
	"cmp"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Who copies a directory reads all that is below it: from its first file on there's nothing to guess, and what its files mention doesn't
// matter.

// maxTree bounds the frames of a layer that are asked for at once. The rest of a larger tree is read ahead of, as any other.
const maxTree = 1 << 16

// fetchTree asks for all that is below a directory, or for a file, in each layer from the topmost down to one that hides those below. The copy
// may turn out to be cached: what is asked for on that chance is no more than background work would fetch.
func (v view) fetchTree(name string) {
	if len(v) == 0 || !v[0].s.opt.Background {
		return
	}
	at, f, _ := v.resolve(name)
	if f == nil {
		return
	}
	for _, f := range v {
		i, err := f.layer.Lookup(cmp.Or(at, "."))
		if err != nil {
			continue // one that hides a directory above isn't looked for: what is below it is fetched in vain
		}
		in := f.layer.Inode(i)
		switch {
		case in.IsDir():
			f.fetchFrames(f.filesBelow(i))
		case hasContent(f.layer, i):
			first, end := f.framesOf(&in)
			f.fetchFrames([]extent{{first: first, end: end}})
		}
		if !in.IsDir() || in.Opaque {
			return
		}
	}
}

// filesBelow returns the files below a directory of the layer.
func (f *Filler) filesBelow(top uint32) (files []extent) {
	is := map[uint32]bool{layer.Root: false}
	is[top] = true
	var isBelow func(dir uint32) bool
	isBelow = func(dir uint32) bool {
		yes, known := is[dir]
		if !known {
			parent, ok := f.parents[dir]
			yes = ok && isBelow(parent)
			is[dir] = yes
		}
		return yes
	}
	for _, e := range f.files {
		if isBelow(e.dir) {
			files = append(files, e)
		}
	}
	return files
}

// fetchFrames makes flights of what will be read for certain.
func (f *Filler) fetchFrames(files []extent) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	room := maxTree
	for _, e := range files {
		for i := e.first; i < e.end && room > 0 && !f.closed; i++ {
			f.copied.set(i)
			if !f.whole && f.flights[i] == nil && !f.there(i) {
				// Behind what is read ahead of a step that runs meanwhile.
				f.hinted += f.flight(i, profiled, asked).size()
				room--
			}
		}
	}
	f.s.dispatch()
}
