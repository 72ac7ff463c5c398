package fill

import (
	"cmp"
	"slices"
)

// Who reads an image from one end to the other, as tar, a scanner or a copy does, walks the tree that its layers make
// together: one directory after the other, of one layer after the other. In a layer that is a run that ends soon, and goes on
// when the walk comes back. So it takes more than windows in front of runs to keep the link busy in between: while somebody
// reads so, the layers of the image are swept, the one that is read first, from where it was missed last.

// maxStrays is how many frames may be touched out of order until nobody is thought to read an image from one end to the other.
const maxStrays = 64

// firstSweep is how many bytes are swept, if the link doesn't carry more in two round trips, before any of them have been read. From then on
// as many as have been are expected to be, besides.
const firstSweep = 2 << 20

// streams reports whether a run is one that leaves nothing out, file after file.
func (f *Filler) streams(r *run) bool {
	span := f.layer.Frames[r.last].End() - f.layer.Frames[r.first].Offset
	return 4*r.bytes >= 3*span && r.files >= inOrder && r.bytes >= nearby
}

// stream takes note of whether the touch of frame i, in run r, is part of reading everything.
func (f *Filler) stream(r *run, i int) {
	s := f.s
	_, same := f.beside[s.reader]
	same = same || s.reader == f
	switch {
	case f.streams(r), same && r.strict > 0:
		f.streamed += f.layer.Frames[i].Size
		s.reader, s.strays = f, 0
	case same:
		s.reader = f
		if s.strays++; s.strays > maxStrays {
			s.reader = nil
		}
	}
}

// image returns the layers of the images that a layer is of: that one, those above it, and those below.
func (f *Filler) image() []*Filler {
	list := []*Filler{f}
	for o := range f.beside {
		list = append(list, o)
	}
	n := len(list)
	slices.SortFunc(list[1:], func(a, b *Filler) int {
		return cmp.Compare((f.beside[a]+n)%n, (f.beside[b]+n)%n)
	})
	return list
}

// sweepImage asks for what is missing of an image that somebody reads from one end to the other. It reports whether there is
// room for more.
func (s *Scheduler) sweepImage() bool {
	if s.reader == nil {
		return true
	}
	if !s.space(ahead, 1) {
		return false
	}
	image := s.reader.image()
	var room, used, size int64
	streamed := 0
	trust := max(2*s.est.bdp(), firstSweep)
	for _, f := range image {
		room += f.streamed - f.guessed[swept] // as much again
		trust += f.right[swept] - f.guessed[swept]
		used, size = used+f.used, size+f.size
		if f.streamed > 0 {
			streamed++
		}
	}
	// Who reads whole directories in an order of their own, as compilers read packages, looks the same for a while.
	room = min(room, trust)
	all := streamed > 1 && used >= size/2 // which is no directory of it
	for _, f := range image {
		// Many files that are small don't make a request each.
		for batch := s.batch(); room >= batch && (f.used > 0 || all) && !s.pausing(f); {
			i := f.nextMissing()
			// One that is large waits until as much may be swept, or somebody asks for it.
			if i < 0 || !all && room < f.layer.Frames[i].Size {
				break
			}
			if !s.space(ahead, f.layer.Frames[i].Size) {
				return false
			}
			before := f.guessed[swept]
			s.send(s.plan(f.batchFrom(i, ahead, swept, batch)))
			room -= f.guessed[swept] - before
		}
	}
	return true
}
