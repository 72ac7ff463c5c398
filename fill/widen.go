package fill

import (
	"math"
	"slices"
	"sort"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A run is a place of a layer that is being read from front to back, maybe leaving something out: a file, or the files
// of a directory one after the other. Where frames are contiguous, files of a directory mostly are too.
type run struct {
	first, last int   // frames touched
	latest      int   // of them
	ahead       int   // what is before this frame is in the sink, on its way or not worth it
	bytes       int64 // of the frames touched
	touches     int
	strict      int // touches in a row that left nothing out
	files       int // files that they went on to
}

const (
	maxRuns = 16
	// nearby is the number of bytes that a run may leave out, at least.
	nearby = 64 << 10
	// light is the number of bytes up to which a frame is fetched for being near to others.
	light = 32 << 10
	// tiny is the same for being in a directory next to others.
	tiny = 8 << 10
	// manyDirs is how many directories side by side are read until others are expected to be.
	manyDirs = 3
	// anySize is no such number.
	anySize = math.MaxInt64
	// smallFile is the number of compressed bytes up to which a file is fetched as a whole.
	smallFile = 256 << 10
	// program is the number of frames up to which a file of which two were asked for is fetched as a whole.
	program = 8
	// maxLook is how many frames or files are looked at for evidence.
	maxLook = 512
	// inOrder is the number of files in a row from which a run isn't expected to end with its file or directory.
	inOrder = 16
	// streaming is the number of round trips' worth of bytes from which a run is taken for one that goes on.
	streaming = 16
	// smallLayer is the number of bytes below which what was read of a layer says little about the rest.
	smallLayer = 4 << 20
)

// evidence is why something is expected to be asked for.
type evidence uint8

const (
	asked     evidence = iota // it has been
	guess                     // what was asked for is next to it
	cousin                    // what was asked for is in directories next to its own
	mentioned                 // what was asked for mentions it
	near                      // so were some of its neighbours
	strict                    // everything before it was asked for, in this order, or much of its file
	linked                    // a program needs it that was asked for
	runs                      // a program runs it that was asked for
	commanded                 // what a program was called with has it run or read it
	imports                   // a module imports it that was asked for, or that such a module imports
	swept                     // the image is being read from one end to the other
	reasons
)

// afford reports whether n more bytes may be fetched that nobody has asked for. What stays unused of them is bounded by what
// guesses of the same kind were right, a sixteenth of what was asked for, and a few round trips' worth, however the layer is
// read: guessing right makes room for more of it, and no kind of guess takes the room of another.
func (f *Filler) afford(n int64, why evidence) bool {
	left := f.allowance(why) - f.guessed[why]
	switch {
	case why == mentioned:
		left /= 4
	case why < strict:
		left /= 16 // so that there is always some for what is small, which saves a round trip as well
	}
	return n <= left
}

func (f *Filler) allowance(why evidence) int64 {
	bdp := f.s.est.bdp()
	n := f.right[why] + (f.used+f.hinted)/16
	switch why {
	case guess, cousin:
		return n + min(bdp, 1<<20)
	case mentioned:
		return n + min(4*bdp, 1<<20)
	case near:
		return n + min(4*bdp, 4<<20)
	case strict:
		return n + max(6*bdp, 2<<20)
	case runs:
		return n + max(4*bdp, 2<<20)
	case commanded:
		return n + max(32*bdp, 16<<20)
	case imports:
		return n + max(8*bdp, 4<<20)
	default:
		return n + max(16*bdp, 8<<20)
	}
}

// settle ends the account of a guess: it was right, or failed.
func (f *Filler) settle(frame int, right bool) {
	why := f.guesses[frame]
	if why == asked {
		return
	}
	n := f.layer.Frames[frame].Size
	f.guesses[frame] = asked
	f.guessed[why] -= n
	if right {
		f.right[why] += n
	}
}

// touch is called when a frame is asked for the first time. It is missed if it wasn't there nor on its way.
func (f *Filler) touch(i int, missed bool) {
	size := f.layer.Frames[i].Size
	f.used += size
	foreseen := f.guesses[i] == swept
	f.settle(i, true)
	f.learn(i)
	r := f.follow(i)
	if !foreseen { // else the walk goes on by itself
		f.widen(r, i)
	}
	f.stream(r, i, foreseen, missed)
	f.touches++
	if f.size >= smallLayer && !f.most && (f.used >= f.size*3/4 || f.used >= f.size/2 && f.touches >= len(f.layer.Frames)/2) {
		f.most, f.cursor, f.unswept = true, i, len(f.layer.Frames)
	}
}

// follow returns the run that a frame belongs to.
func (f *Filler) follow(i int) *run {
	frames := f.layer.Frames
	for k, r := range slices.Backward(f.runs) {
		reach := max(nearby, min(r.bytes, f.s.est.bdp()/2))
		switch {
		case i < r.first && frames[r.first].Offset-frames[i].End() > reach,
			i > r.last && i >= r.ahead && frames[i].Offset-frames[r.last].End() > reach:
			continue
		case i == r.last+1 && (i == r.latest+1 || frames[i].Size <= light):
			r.strict++
			if file, _ := f.fileAround(i); file.first == i {
				r.files++
			}
		case i > r.last:
			r.strict, r.files = 0, 0
		}
		r.first, r.last, r.latest = min(r.first, i), max(r.last, i), i
		r.bytes += frames[i].Size
		r.touches++
		f.runs = append(slices.Delete(f.runs, k, k+1), r)
		return r
	}
	if len(f.runs) == maxRuns {
		f.runs = slices.Delete(f.runs, 0, 1)
	}
	r := &run{first: i, last: i, latest: i, ahead: i + 1, bytes: frames[i].Size, touches: 1}
	f.runs = append(f.runs, r)
	return r
}

// widen asks for what will be wanted after frame i, as far as there is evidence for it.
func (f *Filler) widen(r *run, i int) {
	frames := f.layer.Frames
	file, place := f.fileAround(i)
	fileSize := frames[file.end-1].End() - frames[file.first].Offset
	bdp := f.s.est.bdp()
	streams := f.streams(r)
	why, window, heaviest := near, min(2*r.bytes, 2*bdp), int64(light)
	end := 0
	if fileSize > smallFile {
		// A large file may be read anywhere, but of a program nearly everything is needed.
		n := file.end - file.first
		if i == file.first && f.binary.has(i) {
			f.want(file.end-1, file.end, strict, anySize) // where the dynamic section is
		}
		if t := f.touchedOf(file); n > 1 && (t >= 2 && n <= program || n <= maxLook && 3*t >= 2*n) {
			why := strict
			if f.binary.has(file.first) {
				why = linked // its loader has been there
			}
			f.want(file.first, file.end, why, anySize)
		}
		if r.strict == 0 {
			return
		}
		why, end, heaviest = strict, file.end, anySize
	} else {
		f.want(file.first, file.end, strict, anySize)
		if !streams {
			if !f.modules.has(i) { // it says which others are read
				f.widenDir(i, f.around(place, 2*bdp))
			}
			return
		}
	}
	if streams {
		// What is large among files that are small might be worth a round trip of its own.
		why, end, heaviest = strict, len(frames), max(bdp/4, heaviest)
	}
	if why == strict {
		window = min(max(4*r.bytes, window), 4*bdp)
		if r.bytes >= streaming*bdp {
			window, heaviest = min(8*bdp, f.s.opt.Memory), anySize
		}
	}

	from := frames[i].End()
	r.ahead = max(r.ahead, i+1)
	if r.ahead > i+1 && frames[r.ahead-1].End()-from >= window/2 {
		return // not worth a request yet
	}
	to := r.ahead + sort.Search(max(end-r.ahead, 0), func(k int) bool { return frames[r.ahead+k].Offset >= from+window })
	r.ahead = max(r.ahead, f.want(r.ahead, to, why, heaviest))
}

// want asks for the frames from first up to end but the heavier ones, and returns up to where it could be afforded.
func (f *Filler) want(first, end int, why evidence, heaviest int64) int {
	if f.s.pausing(f) {
		return first
	}
	for i := first; i < end; i++ {
		if f.flights[i] != nil || f.there(i) {
			continue
		}
		size := f.layer.Frames[i].Size
		if size > heaviest {
			continue
		}
		if !f.afford(size, why) {
			if why < strict {
				continue
			}
			return i
		}
		f.flight(i, ahead, why)
	}
	return end
}

// fileAround returns the frames of the file that frame i belongs to, or of the last of those that share it, and its place in
// Filler.files; -1 if the frame belongs to none.
func (f *Filler) fileAround(i int) (extent, int) {
	k := sort.Search(len(f.files), func(k int) bool { return f.files[k].first > i }) - 1
	if k >= 0 && f.files[k].end > i {
		return f.files[k], k
	}
	return extent{first: i, end: i + 1}, -1
}

// around returns the small files in the same directory as that at a place, as far as they are not more than reach bytes away.
// Between them may be subdirectories.
func (f *Filler) around(place int, reach int64) (files []extent) {
	if place < 0 {
		return nil
	}
	e := f.files[place]
	frames := f.layer.Frames
	off, end := frames[e.first].Offset, frames[e.end-1].End()
	add := func(o extent) {
		if o.dir == e.dir && frames[o.end-1].End()-frames[o.first].Offset <= smallFile {
			files = append(files, o)
		}
	}
	for k := place - 1; k >= 0 && k > place-maxLook && off-frames[f.files[k].first].Offset <= reach; k-- {
		add(f.files[k])
	}
	slices.Reverse(files)
	for k := place + 1; k < len(f.files) && k < place+maxLook && frames[f.files[k].end-1].End()-end <= reach; k++ {
		add(f.files[k])
	}
	return files
}

// widenDir asks for files of a directory of which frame i was asked for.
func (f *Filler) widenDir(i int, files []extent) {
	frames := f.layer.Frames
	bdp := f.s.est.bdp()
	t := 0
	for _, o := range files {
		if f.touched.has(o.first) {
			t++
		}
	}
	if t == 0 {
		f.widenTree(i)
	}
	why, reach, heaviest := guess, int64(nearby), int64(light)
	if t > 0 {
		why, reach = near, min(nearby<<min(t, 4), bdp)
		heaviest = min(int64(light)<<min(t, 3), smallFile)
	}
	for _, o := range files {
		if frames[o.end-1].End() >= frames[i].Offset-reach && frames[o.first].Offset <= frames[i].End()+reach {
			f.want(o.first, o.end, why, heaviest)
		}
	}
}

// widenTree asks for what is small in directories next to that of frame i, of which it is the first to be asked for, if others
// of them have been read: a package mostly has several.
func (f *Filler) widenTree(i int) {
	e, place := f.fileAround(i)
	if place < 0 {
		return
	}
	frames := f.layer.Frames
	for range 2 {
		top, ok := f.parents[e.dir]
		if !ok || top == layer.Root {
			return
		}
		f.below[top]++
		if f.below[top] >= manyDirs {
			reach := f.s.est.bdp()
			under := func(o extent) bool {
				dir := o.dir
				for range 2 {
					if dir == top {
						return true
					}
					dir = f.parents[dir]
				}
				return dir == top
			}
			first := place
			for first > 0 && first > place-maxLook && frames[i].Offset-frames[f.files[first-1].first].Offset <= reach {
				first--
			}
			for k := first; k < len(f.files) && k < place+maxLook && frames[f.files[k].end-1].End()-frames[i].End() <= reach; k++ {
				if under(f.files[k]) {
					f.want(f.files[k].first, f.files[k].end, cousin, tiny)
				}
			}
		}
		e.dir = top
	}
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
