package fill

import (
	"cmp"
	"context"
	"errors"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Fetcher reads a range of a blob. blob.Reader is one. A body that doesn't come over the link has a method Local() bool that
// returns true: how fast it arrives says nothing of the link. One that is cut out of a whole blob, all in front of it being received as
// well, has a method Whole() bool that does: see whole.go. Source() string, if there is such a method, is who sends it, as [Refetcher] wants to know.
type Fetcher interface {
	Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// Sink is where the chunks of a layer are kept. Its methods are safe for concurrent use; no chunk is written by two
// callers at the same time.
type Sink interface {
	// Have reports whether a chunk, by its index in Layer.Chunks, has been written. It is called
	// for every read, so it must be quick.
	Have(chunk int) bool
	// WriteChunk writes a chunk, whose bytes are the caller's again when it returns. Its type says that they have been verified.
	WriteChunk(v layer.Verified) error
}

// Doubter is a Sink that doesn't trust all that it has: after an unclean stop, what may have been written isn't there
// before it was verified again. It is when somebody asks for it, rather than being fetched.
type Doubter interface {
	// Doubtful iterates over the chunks that Have denies and Verify may yet find.
	Doubtful() iter.Seq[int]
	// Verify reports whether a chunk is there; Have says the same afterwards.
	Verify(chunk int) bool
}

// LayerOptions tune a Filler. The zero value works.
type LayerOptions struct {
	// Name is what errors call the layer, e.g. its digest.
	Name string
	// Packed, if not nil, is the same layer, which takes less memory: it is used from then on.
	Packed *layer.Layer
	// Slow, if not nil, is told of a read that has waited for SchedulerOptions.SlowAfter and still
	// does, with a path of the file that it waits for. It returns what is called when the wait is over, if
	// that isn't nil. Called concurrently.
	Slow func(file string, waited time.Duration) (over func())
	// Copied, if not nil, is told of the compressed bytes that needn't be fetched, as other chunks have the same digests. It must not block, and
	// must not call the Filler or its Scheduler.
	Copied func(int64)
	// Missed, if not nil, is told of every Fill that has waited, when that is over. Called concurrently.
	Missed func(Miss)
	// Corrupt, if not nil, is told of every frame that failed verification. It must not block, and must not call the
	// Filler or its Scheduler.
	Corrupt func()
}

// Miss is a Fill that had to wait for bytes.
type Miss struct {
	// Off and Bytes are the range of the data space that was asked for.
	Off, Bytes int64
	// Start and Waited say when it was and how long it took.
	Start  time.Time
	Waited time.Duration
	// Err is what Fill returned, nil also if nobody waited any more.
	Err error
}

var errClosedFiller = errors.New("layer is closed")

// Filler brings the chunks of one layer into its sink. Make it with [Scheduler.Open].
type Filler struct {
	lender // its wg is also that of the requests and of what decodes

	s    *Scheduler
	from Fetcher
	opt  LayerOptions

	ctx     context.Context //nolint:containedctx // of the requests, which outlive who asked first
	cancel  context.CancelCauseFunc
	files   []extent          // by first frame
	parents map[uint32]uint32 // of directories
	size    int64             // of all frames, in bytes

	touched bitmap // frames that somebody has asked for
	count   counters

	binary   bitmap // first frames of files that look like programs and libraries
	modules  bitmap // first frames of Python modules
	programs bitmap // frames that begin with an ELF file
	names    names  // of all entries
	read     bitmap // first frames of files that were looked through for what they mention
	named    bitmap // frames that something needs which was read
	started  bitmap // first frames of files that are looked through when they're there, before they're read
	driven   bitmap // first frames of programs that others run
	copied   bitmap // frames of what is copied, and not run

	// Guarded by Scheduler.mu.
	closed      bool
	guesses     []evidence          // why a frame was fetched that nobody had asked for, nor has since
	guessed     [reasons]int64      // bytes of them
	right       [reasons]int64      // bytes of those that somebody has asked for since
	used        int64               // compressed bytes of the frames touched
	hinted      int64               // compressed bytes that Prefetch has asked for, and Expect of what is copied
	streamed    int64               // compressed bytes touched in runs that stream
	runs        []*run              // most recently used last
	beside      map[*Filler]int     // layers of the same images, and by how much they are above
	announces   map[int][]string    // files that are read when a frame is, until it is
	below       map[uint32]int      // directories in them, and in those, of which something was asked for
	unread      map[int]uint32      // programs to look into when a frame is there, by the frame
	looked      map[uint32]bool     // those that were
	args        map[uint32][]string // what programs will be called with, as far as that is known
	touches     int                 // frames touched
	most        bool                // most of the layer was asked for: all of it is fetched
	cursor      int                 // where sweep goes on
	unswept     int                 // frames that sweep hasn't looked at
	pausedUntil time.Time           // nothing is fetched before that nobody waits for
	pause       time.Duration
	whole       bool // the last request was answered by the whole blob
}

// extent is the frames of a file, from first up to end, and the directory that the file is in.
type extent struct {
	first, end int
	dir, inode uint32
}

// Open returns a Filler of l, whose blob is read from from. The caller closes it.
func (s *Scheduler) Open(l *layer.Layer, from Fetcher, to Sink, opt LayerOptions) *Filler {
	f := &Filler{
		s: s, from: from, opt: opt,
		touched: newBitmap(len(l.Frames)), guesses: make([]evidence, len(l.Frames)),
		programs: newBitmap(len(l.Frames)), named: newBitmap(len(l.Frames)), started: newBitmap(len(l.Frames)), driven: newBitmap(len(l.Frames)), copied: newBitmap(len(l.Frames)), read: newBitmap(len(l.Frames)),
		unswept: len(l.Frames),
		beside:  map[*Filler]int{}, below: map[uint32]int{}, announces: announcements(l), unread: map[int]uint32{}, looked: map[uint32]bool{}, args: map[uint32][]string{},
	}
	f.lend(l, to)
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	for i := range l.Frames {
		f.size += l.Frames[i].Size
	}
	f.files, f.parents = filesOf(l), parentsOf(l)
	f.findKinds()
	if opt.Packed != nil {
		f.layer = opt.Packed
	}
	f.names.layer = f.layer
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fillers = append(s.fillers, f)
	s.lenders = append(s.lenders, &f.lender)
	if f.closed = s.closed; !f.closed {
		f.wg.Go(f.compare)
	}
	return f
}

// filesOf returns where the files of a layer are, by their first frame. Of a file that several frames share, the larger comes last.
func filesOf(l *layer.Layer) []extent {
	var files []extent
	for dir, d := range l.All() {
		for _, e := range d.Entries {
			in := &l.Inodes[e.Inode]
			if !in.IsRegular() || in.NumChunks == 0 {
				continue
			}
			last := in.FirstChunk + in.NumChunks - 1
			files = append(files, extent{int(l.Chunks[in.FirstChunk].Frame), int(l.Chunks[last].Frame) + 1, dir, e.Inode})
		}
	}
	slices.SortFunc(files, func(a, b extent) int {
		return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.end, b.end), cmp.Compare(a.dir, b.dir))
	})
	// Cloned, it has no room left over.
	return slices.Clone(slices.CompactFunc(files, func(a, b extent) bool { return a.first == b.first && a.end == b.end }))
}

// findKinds finds the files that look like programs and libraries, and those that look like Python modules.
func (f *Filler) findKinds() {
	l := f.layer
	f.binary, f.modules = newBitmap(len(l.Frames)), newBitmap(len(l.Frames))
	for _, d := range l.All() {
		for _, e := range d.Entries {
			in := &l.Inodes[e.Inode]
			if !in.IsRegular() || in.NumChunks == 0 {
				continue
			}
			frame := int(l.Chunks[in.FirstChunk].Frame)
			if in.Mode&0o111 != 0 || strings.Contains(e.Name, ".so") {
				f.binary.set(frame)
			}
			if isModule(e.Name) {
				f.modules.set(frame)
			}
		}
	}
}

// parentsOf returns the directories that directories are in.
func parentsOf(l *layer.Layer) map[uint32]uint32 {
	parents := map[uint32]uint32{}
	for dir, d := range l.All() {
		for _, e := range d.Entries {
			if l.Inodes[e.Inode].IsDir() {
				parents[e.Inode] = dir
			}
		}
	}
	return parents
}

// Fill returns nil when the n bytes of the data space at off are in the sink. ctx bounds the wait; what is under way
// goes on without the caller. An error names file and layer, and is a *[CorruptError] if the bytes that arrived were
// wrong. It isn't kept: the next Fill tries again.
func (f *Filler) Fill(ctx context.Context, off, n int64) error {
	first, end := f.layer.ChunksOf(off, n)
	for c := first; c < end; c++ {
		if !f.sink.Have(c) || !f.touched.has(int(f.layer.Chunks[c].Frame)) {
			return f.miss(ctx, Miss{Off: off, Bytes: n}, first, end)
		}
	}
	f.count.hits.Add(1)
	return nil
}

// miss asks for the chunks from first up to end and waits for them.
func (f *Filler) miss(ctx context.Context, m Miss, first, end int) error {
	for c := first; c < end && f.doubts != nil; c++ {
		if !f.sink.Have(c) && f.doubt.has(int(f.layer.Chunks[c].Frame)) {
			f.doubts.Verify(c) // if it is wrong, it's missing
		}
	}
	flights, err := f.ask(first, end)
	if err != nil {
		return f.failed(int(f.layer.Chunks[first].Frame), err)
	}
	if len(flights) == 0 {
		f.count.hits.Add(1)
		return nil
	}
	m.Start = time.Now()
	err = f.wait(ctx, flights, m.Start)
	m.Waited = time.Since(m.Start)
	f.count.misses.Add(1)
	f.count.waited.Add(int64(m.Waited))
	if f.s.opt.Waited != nil {
		f.s.opt.Waited(m.Waited)
	}
	if err != nil && context.Cause(ctx) == nil {
		f.count.errors.Add(1)
		m.Err = err
	}
	if f.opt.Missed != nil {
		f.opt.Missed(m)
	}
	return err
}

// wait waits for all flights, or for the first that fails.
func (f *Filler) wait(ctx context.Context, flights []*flight, start time.Time) error {
	var slow <-chan time.Time
	if f.opt.Slow != nil {
		t := time.NewTimer(f.s.opt.SlowAfter)
		defer t.Stop()
		slow = t.C
	}
	for _, fl := range flights {
		for landed := false; !landed; {
			select {
			case <-fl.done:
				if fl.err != nil {
					return f.failed(fl.frame, fl.err)
				}
				landed = true
			case <-slow:
				slow = nil
				if over := f.opt.Slow(f.fileOf(int(f.layer.Frames[fl.frame].FirstChunk)), time.Since(start)); over != nil {
					defer over()
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	return nil
}

// ask makes flights of what is missing of the chunks from first up to end, and of what will be wanted next.
func (f *Filler) ask(first, end int) ([]*flight, error) {
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.closed {
		return nil, errClosedFiller
	}
	s.asked = time.Now()
	// What doesn't fit into the first round trip of a long range doesn't share the link with what does.
	eager := s.est.bdp()
	var flights []*flight
	var touched []int
	missed := -1
	var bytes int64
	for c := first; c < end; c++ {
		i := int(f.layer.Chunks[c].Frame)
		if !f.touched.has(i) {
			f.touched.set(i)
			touched = append(touched, i)
		}
		if f.sink.Have(c) {
			continue
		}
		fl := f.flights[i]
		if n := len(flights); n > 0 && flights[n-1] == fl {
			continue
		}
		l := demand
		if bytes > eager {
			l = ahead
		}
		if fl == nil {
			fl = f.flight(i, l, asked)
			missed = i
			f.cursor, f.unswept = i, len(f.layer.Frames) // what is swept is what comes next
		} else {
			s.raise(fl, l)
		}
		if !fl.local() {
			bytes += fl.size()
		}
		flights = append(flights, fl)
	}
	if len(flights) > 0 {
		s.yield()
	}
	for _, i := range touched {
		f.touch(i, i == missed)
	}
	s.dispatch()
	return flights, nil
}

// Prefetch asks for the n bytes of the data space at off, which an earlier build has read, without waiting for them. They come
// after what somebody waits for and what is read ahead.
func (f *Filler) Prefetch(off, n int64) {
	first, end := f.layer.ChunksOf(off, n)
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := first; c < end && !f.closed && !f.whole; c++ {
		if f.sink.Have(c) {
			continue
		}
		if fl := f.flights[int(f.layer.Chunks[c].Frame)]; fl != nil {
			s.raise(fl, profiled)
		} else {
			f.hinted += f.flight(int(f.layer.Chunks[c].Frame), profiled, asked).size()
		}
	}
	s.dispatch()
}

// flight makes a flight of a frame that has none. It's queued, unless the frame is elsewhere.
func (f *Filler) flight(frame int, l level, why evidence) *flight {
	fl := f.newFlight(frame, l, why)
	if !f.takeLocal(fl) {
		f.s.enqueue(fl)
	}
	return fl
}

// newFlight makes a flight that its caller queues.
func (f *Filler) newFlight(frame int, l level, why evidence) *flight {
	fl := &flight{f: f, frame: frame, level: l, done: make(chan struct{})}
	f.flights[frame] = fl
	if l == demand {
		f.s.waiting++
	}
	if why != asked {
		f.guesses[frame] = why
		f.guessed[why] += fl.size()
	}
	return fl
}

const (
	firstPause = time.Second
	maxPause   = time.Minute
)

// land ends a flight.
func (f *Filler) land(fl *flight, err error) {
	s := f.s
	if fl.state == fetching || fl.state == decoding {
		s.held -= fl.size()
	}
	if fl.level == demand {
		s.waiting--
		s.asked = time.Now()
	}
	fl.state, fl.err = landed, err
	delete(f.flights, fl.frame)
	close(fl.done)
	for _, other := range fl.then {
		other.arrivedElsewhere(fl, err)
	}
	if err == nil {
		f.pause = 0
		return
	}
	// Who has asked may ask again; the rest waits.
	f.settle(fl.frame, false)
	f.unswept = len(f.layer.Frames)
	f.pause = min(max(2*f.pause, firstPause), maxPause)
	f.pausedUntil = time.Now().Add(f.pause)
}

// drop ends a flight that is queued.
func (f *Filler) drop(fl *flight, why error) {
	if fl.in != nil {
		fl.in.release()
	}
	f.land(fl, why)
}

// present reports whether all chunks of a frame are in the sink.
func (f *Filler) present(frame int) bool {
	fr := &f.layer.Frames[frame]
	for c := fr.FirstChunk; c < fr.FirstChunk+fr.NumChunks; c++ {
		if !f.sink.Have(int(c)) {
			return false
		}
	}
	return true
}

// there reports whether a frame needn't be fetched before somebody asks for it.
func (f *Filler) there(frame int) bool {
	return f.present(frame) || f.doubts != nil && f.doubt.has(frame)
}

// Close cancels what is under way and waits for it. Fill fails from then on, but for what is in the sink.
func (f *Filler) Close() error {
	s := f.s
	s.mu.Lock()
	f.closed = true
	s.fillers = slices.DeleteFunc(s.fillers, func(o *Filler) bool { return o == f })
	s.lenders = slices.DeleteFunc(s.lenders, func(o *lender) bool { return o == &f.lender })
	for o := range f.beside {
		delete(o.beside, f)
	}
	if s.reader == f {
		s.reader = nil
	}
	if s.walk != nil && slices.Contains(s.walk.layers, f) {
		s.walk = nil
	}
	s.lists.forget()
	for _, fl := range f.flights {
		switch fl.state {
		case awaiting:
			s.fetchAfterAll(fl)
		case queued:
			f.drop(fl, errClosedFiller)
		}
	}
	s.dispatch() // what others have waited for in vain
	s.mu.Unlock()
	f.cancel(errClosedFiller)
	f.wg.Wait()
	return nil
}
