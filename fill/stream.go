package fill

// Who reads an image from one end to the other, as tar, a scanner or a copy does, walks the tree that its layers make
// together: one directory after the other, of one layer after the other. In a layer that is a run that ends soon, and goes on
// when the walk comes back. So it takes more than windows in front of runs to keep the link busy in between: while somebody
// reads so, what comes next on the same walk is fetched ahead, from where it was missed last (walk.go).

// maxStrays is how many frames may be touched out of order until nobody is thought to read an image from one end to the other.
const maxStrays = 64

// firstSweep is how many bytes are swept, if the link doesn't carry more in a round trip, before any of them have been read. From then on
// as many as have been are expected to be, besides.
const firstSweep = 1 << 20

// streams reports whether a run is one that leaves nothing out, file after file.
func (f *Filler) streams(r *run) bool {
	span := f.layer.Frames[r.last].End() - f.layer.Frames[r.first].Offset
	return 4*r.bytes >= 3*span && r.files >= inOrder && r.bytes >= nearby
}

// stream takes note of whether the touch of frame i, in run r, is part of reading everything. It may be as it was foreseen, or missed.
func (f *Filler) stream(r *run, i int, foreseen, missed bool) {
	s := f.s
	_, same := f.beside[s.reader]
	same = same || s.reader == f
	switch {
	case f.streams(r), same && (r.strict > 0 || foreseen):
		f.streamed += f.layer.Frames[i].Size
		s.reader, s.strays = f, 0
	case same:
		s.reader = f
		if s.strays++; s.strays > maxStrays {
			s.reader = nil
		}
	}
	switch {
	case s.reader == nil:
		s.walk = nil
	case s.reader != f:
	case s.walk == nil || !same:
		s.walk = &walk{layers: f.layers(), lists: &s.lists}
		s.walk.seek(f, i)
	case missed:
		s.walk.seek(f, i)
	}
}

// sweepImage asks for what comes next of an image that somebody reads from one end to the other. It reports whether there is
// room for more.
func (s *Scheduler) sweepImage() bool {
	if s.walk == nil {
		return true
	}
	var room int64
	trust := max(s.est.bdp(), firstSweep)
	for _, f := range s.walk.layers {
		room += f.streamed - f.guessed[swept] // as much again
		trust += f.right[swept] - f.guessed[swept]
	}
	// Who reads whole directories in an order of their own, as compilers read packages, looks the same for a while.
	room = min(room, trust)
	// Many files that are small don't make a request each.
	for batch := s.batch(); room >= batch; {
		if !s.space(ahead, batch) {
			return false
		}
		n := s.walk.ask(batch, room)
		if n == 0 {
			break
		}
		room -= n
		for fl := s.head(ahead); fl != nil; fl = s.head(ahead) {
			if !s.room(fl) {
				return false
			}
			s.send(s.plan(fl))
		}
	}
	return true
}
