package fill

import (
	"slices"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// walk is a way through the tree that the layers of an image make together, in the order in which overlayfs lists directories, which is that of
// tar, cp or a scanner: the entries of a directory one after the other, and those of a subdirectory in its place. Of a directory that several layers
// have, overlayfs lists what the lowest has at first, then what the others add, from the topmost down (ovl_dir_read_merged in fs/overlayfs/readdir.c).
// Its fields are guarded by Scheduler.mu.
type walk struct {
	layers view
	lists  *listings
	stack  []listing // of the directories that it's in, from the root down

	f          *Filler // the layer of the file that it's at
	frame, end int     // what of that file comes next
}

// maxPassed is how many frames that are there are passed at a time.
const maxPassed = 4096

// seek goes to frame i of a layer, and reports whether that is of a file which can be seen in the image.
func (w *walk) seek(f *Filler, i int) bool {
	file, k := f.fileAround(i)
	if k < 0 {
		return false
	}
	var way []uint32 // directories of f, from below the root down
	for dir := file.dir; ; {
		above, ok := f.parents[dir]
		if !ok {
			break
		}
		way = append(way, dir)
		dir = above
	}
	slices.Reverse(way)
	stack := make([]listing, 0, len(way)+1)
	same := len(w.stack) > 0 // directories as before, which needn't be listed again
	if same {
		stack = append(stack, w.stack[0])
	} else {
		var roots []place
		for _, o := range w.layers {
			roots = append(roots, place{o, layer.Root})
		}
		stack = append(stack, listing{entries: w.lists.list(roots)})
	}
	for depth, dir := range way {
		top := &stack[depth]
		at := slices.IndexFunc(top.entries, func(e listed) bool { return slices.Contains(e.dirs, place{f, dir}) })
		if at < 0 {
			return false
		}
		same = same && depth+1 < len(w.stack) && top.next == at+1
		top.next = at + 1
		if same {
			stack = append(stack, w.stack[depth+1])
		} else {
			stack = append(stack, listing{entries: w.lists.list(top.entries[at].dirs)})
		}
	}
	top := &stack[len(stack)-1]
	at := slices.IndexFunc(top.entries, func(e listed) bool { return e.file == place{f, file.inode} })
	if at < 0 {
		return false
	}
	top.next = at + 1
	w.stack = stack
	w.f, w.frame, w.end = f, i, file.end
	return true
}

// next returns the file that comes next.
func (w *walk) next() (place, bool) {
	for len(w.stack) > 0 {
		top := &w.stack[len(w.stack)-1]
		if top.next == len(top.entries) {
			w.stack = w.stack[:len(w.stack)-1]
			continue
		}
		e := top.entries[top.next]
		top.next++
		if e.dirs == nil {
			return e.file, true
		}
		w.stack = append(w.stack, listing{entries: w.lists.list(e.dirs)})
	}
	return place{}, false
}

// ask makes flights of what comes next, of up to batch bytes or one frame, but of no more than room bytes, and returns how many bytes they are.
func (w *walk) ask(batch, room int64) (n int64) {
	for range maxPassed {
		if w.frame == w.end {
			file, ok := w.next()
			if !ok {
				return n
			}
			in := file.f.layer.Inode(file.inode)
			w.f = file.f
			if w.frame, w.end = w.f.framesOf(&in); w.frame == w.end {
				continue // it can't be read any more
			}
		}
		f := w.f
		if fl := f.flights[w.frame]; fl != nil {
			f.s.raise(fl, ahead)
		} else if !f.closed && !f.there(w.frame) {
			size := f.layer.Frames[w.frame].Size
			if f.s.pausing(f) || n+size > room || n > 0 && n+size > batch {
				return n
			}
			f.flight(w.frame, ahead, swept)
			n += size
		}
		w.frame++
	}
	return n
}
