package frames

import (
	"context"
	"golang.org/x/sync/semaphore"
	"runtime"
	"sync"
)

// A Pool bounds what the writers that share it take together: CPUs, and memory for frames in the making. It is safe for concurrent use.
type Pool struct {
	cpus *semaphore.Weighted
	// room is for as many bytes of tars as keep the CPUs busy while a large frame holds up the small ones behind it.
	room *semaphore.Weighted
	size int64

	mu   sync.Mutex
	jobs int
	// free are buffers that nobody uses, by their class, kept bytes of them. A sync.Pool would keep as many again, and go on to do so for a
	// while when there are no jobs any more.
	free [len(classes)][][]byte
	kept int64
}

// classes are the sizes of buffers, in bytes: for frames of small files, for those of one file, and for chunks of [DefaultChunkSize] with
// what stands behind them, or what they are compressed to. There are so few that one which is free mostly fits: what isn't used again is
// garbage, of which there is as much as of everything else in a daemon before it is collected.
var classes = [...]int{256 << 10, 1 << 20, DefaultChunkSize + 2*frameSlack}

const largest = len(classes) - 1

// classFor returns the class of buffers with room for so many bytes, the largest if there is none.
func classFor(size int) int {
	for class, s := range classes {
		if size <= s {
			return class
		}
	}
	return largest
}

// NewPool returns a Pool for so many CPUs; 0 is GOMAXPROCS. There is a chunk of [DefaultChunkSize] of a tar for each, and two more, and as
// much again for what they are compressed to.
func NewPool(cpus int) *Pool {
	if cpus <= 0 {
		cpus = runtime.GOMAXPROCS(0)
	}
	size := int64(cpus+2) * int64(classes[largest])
	return &Pool{cpus: semaphore.NewWeighted(int64(cpus)), room: semaphore.NewWeighted(size), size: size}
}

// begin is called at the beginning of a job, and what it returns at its end.
func (p *Pool) begin() (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.jobs++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.jobs--; p.jobs == 0 {
			clear(p.free[:])
			p.kept = 0
		}
	}
}

// frame waits for room for a frame of up to limit bytes of a tar, of which size are expected. Who has one must not wait for another
// before it is sent.
func (p *Pool) frame(ctx context.Context, size, limit int) (*Frame, error) {
	// Chunks above the default size take more than their share, or none would be compressed beside another.
	room := int64(classes[classFor(limit)])
	if err := p.room.Acquire(ctx, room); err != nil {
		return nil, context.Cause(ctx)
	}
	return &Frame{
		Tar: p.Buffer(size), limit: limit, room: room,
		packed: make(chan struct{}), hashed: make(chan struct{}),
	}, nil
}

func (p *Pool) release(f *Frame) {
	p.put(f.Tar)
	p.put(f.out)
	p.room.Release(f.room)
}

// A Frame is a piece of a tar that is compressed by itself. It begins with a payload, unless it has none, so that readers find that without
// decompressing what is before; behind each payload are the headers of what follows in the tar.
type Frame struct {
	Tar     []byte
	Records []Record
	// Untold says that there is something in this frame, or in one before, that the TOC has no place for: see [Output.Untold].
	Untold bool

	limit int // of len(Tar)
	room  int64
	out   []byte
	// packed is closed when out is there, hashed when the digests of the records are; or when the job has failed.
	packed, hashed chan struct{}
}

// A Record is an entry of the TOC in the making, and where its payload is in the frame. One without a payload stands where that would
// be: behind its headers.
type Record struct {
	TOC         Entry
	Start, Size int
	Part        Part
	// AccessTime and ChangeTime are as the TOC would have them, "" if the tar doesn't.
	AccessTime, ChangeTime string
	// CRC, and Begin and End in the packed frame, are for a format to keep what it has found out in Pack.
	CRC        uint64
	Begin, End int
}

// A Part is what a chunk is of its file.
type Part int

// The parts.
const (
	Whole Part = iota // all of it, or no chunk at all
	FirstPart
	NextPart
	LastPart
)

// Payload returns the chunk.
func (r *Record) Payload(f *Frame) []byte { return f.Tar[r.Start:][:r.Size] }

// Buffer returns an empty buffer with room for so many bytes.
func (p *Pool) Buffer(size int) []byte {
	class := classFor(size)
	if size > classes[class] {
		return make([]byte, 0, size)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free[class]) > 0 {
		return p.take(class)
	}
	return make([]byte, 0, classes[class])
}

// take returns a buffer that nobody uses, of a class of which there are some.
func (p *Pool) take(class int) []byte {
	free := p.free[class]
	last := len(free) - 1
	b := free[last]
	free[last] = nil
	p.free[class] = free[:last]
	p.kept -= int64(cap(b))
	return b
}

// put takes a buffer back that nobody uses any more.
func (p *Pool) put(b []byte) {
	class := classFor(cap(b))
	if cap(b) != classes[class] {
		return // it has grown, or was made for a chunk of unusual size
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// As many are kept as are in use at most, for tars and for what they're compressed to: these are small at times and large at others. Those of
	// the class that has most give way.
	for p.kept+int64(cap(b)) > 2*p.size {
		most, bytes := class, 0
		for c, free := range p.free {
			if n := len(free) * classes[c]; n > bytes {
				most, bytes = c, n
			}
		}
		if most == class {
			return
		}
		p.take(most)
	}
	p.free[class] = append(p.free[class], b[:0])
	p.kept += int64(cap(b))
}
