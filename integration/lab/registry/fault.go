package registry

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Kind is something that goes wrong.
type Kind int

// What can go wrong with a request.
const (
	// IgnoreRange answers a range request with 200 and the whole blob.
	IgnoreRange Kind = iota + 1
	// Status answers with Fault.Code, and Retry-After if Fault.RetryAfter is set.
	Status
	// ShortBody sends about half of the body, and closes the connection.
	ShortBody
	// Corrupt inverts one byte of the body: the one at Fault.Offset of the blob,
	// if the answer covers it.
	Corrupt
	// Reset resets the connection before any answer.
	Reset
	// Silence answers nothing until the fault is removed or the client leaves.
	Silence
)

// A Fault is applied to requests that it matches.
type Fault struct {
	Kind Kind
	// Match says which requests are hit; nil hits every GET of a blob.
	Match func(*http.Request) bool
	// Skip lets that many matching requests pass first; Count, if positive, hits only
	// that many; For, if positive, ends the fault that long after the first hit.
	Skip, Count int
	For         time.Duration

	Code       int           // Status
	RetryAfter time.Duration // Status
	Offset     int64         // Corrupt
}

// MatchBlob matches GETs of one blob.
func MatchBlob(d digest.Digest) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+d.String())
	}
}

// MatchAny matches every request.
func MatchAny(*http.Request) bool { return true }

func matchBlobs(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

// Faults are the faults in force. They are safe for concurrent use.
type Faults struct {
	mu     sync.Mutex
	active []*activeFault
}

type activeFault struct {
	Fault
	seen, hit int
	first     time.Time
	gone      chan struct{}
}

// Add puts a fault in force and returns how to remove it. The newest fault
// that matches a request is the one that hits it.
func (f *Faults) Add(fault Fault) (remove func()) {
	if fault.Match == nil {
		fault.Match = matchBlobs
	}
	a := &activeFault{Fault: fault, gone: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.active = append(f.active, a)
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for i, o := range f.active {
			if o == a {
				f.active = append(f.active[:i], f.active[i+1:]...)
				close(a.gone)
				return
			}
		}
	}
}

// Clear removes every fault.
func (f *Faults) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.active {
		close(a.gone)
	}
	f.active = nil
}

func (f *Faults) pick(r *http.Request) *activeFault {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range slices.Backward(f.active) {

		if !a.Match(r) {
			continue
		}
		a.seen++
		if a.seen <= a.Skip || a.Count > 0 && a.hit >= a.Count {
			continue
		}
		if a.hit == 0 {
			a.first = time.Now()
		}
		if a.For > 0 && time.Since(a.first) > a.For {
			continue
		}
		a.hit++
		return a
	}
	return nil
}

func (f *Faults) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := f.pick(r)
		if a == nil {
			next.ServeHTTP(w, r)
			return
		}
		switch a.Kind {
		case IgnoreRange:
			r.Header.Del("Range")
			next.ServeHTTP(w, r)
		case Status:
			if a.RetryAfter > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(int(a.RetryAfter.Seconds())))
			}
			http.Error(w, "a fault made on purpose", a.Code)
		case ShortBody:
			next.ServeHTTP(&shortWriter{ResponseWriter: w}, r)
			panic(http.ErrAbortHandler)
		case Corrupt:
			next.ServeHTTP(&corruptWriter{ResponseWriter: w, at: a.Offset}, r)
		case Reset:
			reset(w)
		case Silence:
			select {
			case <-r.Context().Done():
			case <-a.gone:
				next.ServeHTTP(w, r)
			}
		default:
			panic(fmt.Sprintf("registry: unknown fault %d", a.Kind))
		}
	})
}

// reset closes the client's connection so that it sees ECONNRESET.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		_ = tcp.SetLinger(0) // without it the client sees EOF, which tests as much
	}
	conn.Close()
}

// shortWriter passes on the first half of the announced body.
type shortWriter struct {
	http.ResponseWriter
	left    int64
	started bool
}

func (w *shortWriter) WriteHeader(status int) {
	w.start()
	w.ResponseWriter.WriteHeader(status)
}

func (w *shortWriter) start() {
	if w.started {
		return
	}
	w.started = true
	n, err := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64)
	if err == nil {
		w.left = n / 2
	}
}

func (w *shortWriter) Write(p []byte) (int, error) {
	w.start()
	if int64(len(p)) > w.left {
		if _, err := w.ResponseWriter.Write(p[:w.left]); err != nil {
			return 0, err
		}
		w.left = 0
		_ = http.NewResponseController(w.ResponseWriter).Flush() // the abort that follows drops what is buffered
		panic(http.ErrAbortHandler)
	}
	w.left -= int64(len(p))
	return w.ResponseWriter.Write(p)
}

// corruptWriter inverts the byte at one offset of the blob.
type corruptWriter struct {
	http.ResponseWriter
	at      int64
	pos     int64
	started bool
}

func (w *corruptWriter) WriteHeader(status int) {
	w.start()
	w.ResponseWriter.WriteHeader(status)
}

func (w *corruptWriter) start() {
	if w.started {
		return
	}
	w.started = true
	// Content-Range: bytes 100-199/1000
	if cr, ok := strings.CutPrefix(w.Header().Get("Content-Range"), "bytes "); ok {
		from, _, _ := strings.Cut(cr, "-")
		if n, err := strconv.ParseInt(from, 10, 64); err == nil {
			w.pos = n
		}
	}
}

func (w *corruptWriter) Write(p []byte) (int, error) {
	w.start()
	if i := w.at - w.pos; i >= 0 && i < int64(len(p)) {
		p = append([]byte(nil), p...)
		p[i] ^= 0xff
	}
	n, err := w.ResponseWriter.Write(p)
	w.pos += int64(n)
	return n, err
}
