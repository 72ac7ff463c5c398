package fill

import (
	"io"
	"math/bits"
	"sync"
	"sync/atomic"
)

// level is how urgent something is; lower goes first.
type level int8

const (
	demand     level = iota // somebody waits
	ahead                   // somebody will probably ask for it next
	profiled                // an earlier build asked for it, or a copy is about to
	background              // nobody asked
	levels
)

// state is how far a flight is.
type state int8

const (
	queued state = iota
	fetching
	decoding
	awaiting // the flights of others that bring the same bytes
	copying
	landed
)

// flight is a frame on its way into the sink: one, whoever asks. Its fields are guarded by Scheduler.mu.
type flight struct {
	f      *Filler
	frame  int
	level  level
	state  state
	again  bool     // what arrived first was corrupt
	in     *arrival // what has arrived of it, nil before
	source string   // who has sent that last, "" if the body doesn't say
	req    *request // that fetches it

	then    []*flight // those that wait for this one
	awaits  []*flight // those that this one waits for
	started bool      // that it is copied

	done chan struct{} // closed when it has landed
	err  error         // why the frame isn't in the sink, without names; set before done is closed
}

func (fl *flight) size() int64 { return fl.f.layer.Frames[fl.frame].Size }

// arrival is a frame's compressed bytes, which can be read while they arrive.
type arrival struct {
	buf  []byte
	refs atomic.Int32 // of the writer and the reader; the last one gives buf back

	mu   sync.Mutex
	more *sync.Cond
	have int
	err  error
}

func newArrival(size int64) *arrival {
	a := &arrival{buf: getBuffer(int(size))}
	a.more = sync.NewCond(&a.mu)
	a.refs.Store(1)
	return a
}

func (a *arrival) release() {
	if a.refs.Add(-1) == 0 {
		putBuffer(a.buf)
	}
}

// got returns how many bytes have arrived.
func (a *arrival) got() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.have
}

// fill reads the bytes that are missing.
func (a *arrival) fill(r io.Reader) error {
	for have := a.got(); have < len(a.buf); {
		n, err := r.Read(a.buf[have:])
		have += n
		if n > 0 {
			a.mu.Lock()
			a.have = have
			a.more.Broadcast()
			a.mu.Unlock()
		}
		if err != nil && have < len(a.buf) {
			if err == io.EOF { //nolint:errorlint // io.Reader's contract
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// fail tells the reader that nothing more will arrive.
func (a *arrival) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
	a.more.Broadcast()
}

// failed returns why not everything has arrived.
func (a *arrival) failed() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// arriving reads an arrival, giving its decoder's place to others while it waits.
type arriving struct {
	*arrival
	at    int
	slots *decoders
	level level
}

// Read implements io.Reader.
func (r *arriving) Read(p []byte) (int, error) {
	if r.at == len(r.buf) {
		return 0, io.EOF
	}
	r.mu.Lock()
	if r.at == r.have && r.err == nil {
		r.mu.Unlock()
		r.slots.lend()
		r.mu.Lock()
		for r.at == r.have && r.err == nil {
			r.more.Wait()
		}
		r.mu.Unlock()
		r.slots.reclaim(r.level)
		r.mu.Lock()
	}
	have, err := r.have, r.err
	r.mu.Unlock()
	n := copy(p, r.buf[r.at:have])
	r.at += n
	if n > 0 {
		err = nil
	}
	return n, err
}

// Buffers are reused by powers of two, from 4 KiB up to 16 MiB.
const (
	minBuffer = 12
	maxBuffer = 24
)

var buffers [maxBuffer + 1]sync.Pool

func getBuffer(n int) []byte {
	class := max(bits.Len(uint(max(n, 1)-1)), minBuffer)
	if class > maxBuffer {
		return make([]byte, n)
	}
	if p, ok := buffers[class].Get().(*[]byte); ok {
		return (*p)[:n]
	}
	return make([]byte, n, 1<<class)
}

func putBuffer(b []byte) {
	class := bits.Len(uint(cap(b))) - 1
	if class < minBuffer || class > maxBuffer || cap(b) != 1<<class {
		return
	}
	buffers[class].Put(&b)
}

// bitmap is a set of frames that can be looked at without a lock.
type bitmap []atomic.Uint64

func newBitmap(n int) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) has(i int) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }

func (b bitmap) set(i int) { b[i/64].Or(1 << (i % 64)) }
