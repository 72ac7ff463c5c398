package fill

import (
	"slices"
	"sort"
)

// A run is a place of a layer that is being read from front to back, maybe leaving something out: a file, or the files
// of a directory one after the other. Where frames are contiguous, files of a directory mostly are too.
type run struct {
	first, last int   // frames touched
	ahead       int   // what is before this frame is in the sink, on its way or not worth it
	bytes       int64 // of the frames touched
	touches     int
	strict      int // touches in a row that left nothing out
}

const (
	maxRuns = 16
	// nearby is the number of bytes that a run may leave out, at least.
	nearby = 32 << 10
	// smallFile is the number of compressed bytes up to which a file is fetched as a whole.
	smallFile = 256 << 10
	// streaming is the number of round trips' worth of bytes from which a run is taken for one that goes on.
	streaming = 16
	// smallLayer is the number of bytes below which what was read of a layer says little about the rest.
	smallLayer = 4 << 20
)

// evidence is why something is expected to be asked for.
type evidence int

const (
	guess  evidence = iota // what was asked for is next to it
	near                   // so were some of its neighbours
	strict                 // everything before it was asked for, in this order
)

// afford reports whether n more bytes may be fetched that nobody has asked for. All that stays unused of them is bounded by a
// fifth of what was asked for, or so, however the layer is read; guessing right makes room for more of it.
func (f *Filler) afford(n int64, why evidence) bool {
	bdp := f.s.est.bdp()
	var limit int64
	switch why {
	case guess:
		limit = min(bdp/4, 256<<10) + f.used/10
	case near:
		limit = min(bdp/2, 512<<10) + (f.used+f.hinted)/5
	case strict:
		limit = max(6*bdp, 2<<20) + f.used/4
	}
	return f.guessed+n <= limit
}

// touch is called when a frame is asked for the first time.
func (f *Filler) touch(i int) {
	size := f.layer.Frames[i].Size
	f.used += size
	if f.guesses.has(i) {
		f.guesses.clear(i)
		f.guessed -= size
	}
	f.widen(f.follow(i), i)
	if f.used >= f.size/2 && f.size >= smallLayer && !f.most {
		f.most, f.cursor, f.unswept = true, i, len(f.layer.Frames)
	}
}

// follow returns the run that a frame belongs to.
func (f *Filler) follow(i int) *run {
	frames := f.layer.Frames
	for k, r := range slices.Backward(f.runs) {
		reach := max(nearby, min(r.bytes, f.s.est.bdp()/2))
		switch {
		case i < r.first || i > r.last && i >= r.ahead && frames[i].Offset-frames[r.last].End() > reach:
			continue
		case i == r.last+1:
			r.strict++
		case i > r.last:
			r.strict = 0
		}
		r.last = max(r.last, i)
		r.bytes += frames[i].Size
		r.touches++
		f.runs = append(slices.Delete(f.runs, k, k+1), r)
		return r
	}
	if len(f.runs) == maxRuns {
		f.runs = slices.Delete(f.runs, 0, 1)
	}
	r := &run{first: i, last: i, ahead: i + 1, bytes: frames[i].Size, touches: 1}
	f.runs = append(f.runs, r)
	return r
}

// widen asks for what will be wanted after frame i, as far as there is evidence for it.
func (f *Filler) widen(r *run, i int) {
	frames := f.layer.Frames
	file := f.fileAround(i)
	fileSize := frames[file.end-1].End() - frames[file.first].Offset
	if fileSize <= smallFile {
		// What the whole file hasn't told about the rest of it, its neighbours will.
		f.want(file.first, file.end, near)
	} else if n := file.end - file.first; n > 2 && n <= 1024 && 2*f.touchedOf(file) >= n {
		f.want(file.first, file.end, strict)
	}

	bdp := f.s.est.bdp()
	why, window, end := near, min(max(2*r.bytes, nearby), 2*bdp), len(frames)
	switch {
	case r.touches == 1:
		if frames[i].Size > nearby {
			return // a large file may be read anywhere
		}
		why, window = guess, nearby
	case r.strict > 0 && 4*r.bytes >= 3*(frames[r.last].End()-frames[r.first].Offset):
		why = strict
		window = min(max(4*r.bytes, nearby), 4*bdp)
		if r.bytes >= streaming*bdp {
			window = min(8*bdp, f.s.opt.Memory)
		}
	}
	if fileSize > smallFile && r.first >= file.first {
		end = file.end // the run has seen but this file
	}
	from := frames[r.last].End()
	r.ahead = max(r.ahead, r.last+1)
	if r.ahead > r.last+1 && frames[r.ahead-1].End()-from >= window/2 {
		return // not worth a request yet
	}
	to := r.ahead + sort.Search(max(end-r.ahead, 0), func(k int) bool { return frames[r.ahead+k].Offset >= from+window })
	r.ahead = max(r.ahead, f.want(r.ahead, to, why))
}

// want asks for the frames from first up to end, and returns up to where it could be afforded.
func (f *Filler) want(first, end int, why evidence) int {
	if f.s.pausing(f) {
		return first
	}
	for i := first; i < end; i++ {
		if f.flights[i] != nil || f.present(i) {
			continue
		}
		if !f.afford(f.layer.Frames[i].Size, why) {
			return i
		}
		f.flight(i, ahead, true)
	}
	return end
}

// fileAround returns the frames of the file that frame i belongs to, or of the last of those that share it.
func (f *Filler) fileAround(i int) extent {
	k := sort.Search(len(f.files), func(k int) bool { return f.files[k].first > i })
	if k > 0 && f.files[k-1].end > i {
		return f.files[k-1]
	}
	return extent{i, i + 1}
}

// touchedOf returns how many frames of a file were asked for.
func (f *Filler) touchedOf(file extent) (n int) {
	for i := file.first; i < file.end; i++ {
		if f.touched.has(i) {
			n++
		}
	}
	return n
}
