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
	// Status answers with Fault.Code, Fault.Reason if there is one, and Retry-After if Fault.RetryAfter is set.
	Status
	// ShortBody sends about half of the body, and closes the connection.
	ShortBody
	// Corrupt inverts one byte of the body: the one at Fault.Offset of the blob,
	// if the answer covers it.
	Corrupt
	// Reset resets the connection before any answer.
	Reset
	// Silence answers nothing until the fault ends or the client leaves.
	Silence
	// Stall sends about half of the body, and the rest when the fault ends.
	Stall
	// Slow answers after Fault.Delay.
	Slow
)

// A Fault is applied to requests that it matches.
type Fault struct {
	Kind Kind
	// Match says which requests are hit; nil hits every GET of a blob.
	Match func(*http.Request) bool
	// Skip lets that many matching requests pass first; Count, if positive, hits only
	// that many; For, if positive, ends the fault that long after the first hit. Removing it ends it too.
	Skip, Count int
	For         time.Duration

	Code       int           // Status
	Reason     string        // Status: a code of the distribution specification, such as DENIED, that the answer's JSON gives; none if empty
	RetryAfter time.Duration // Status
	Offset     int64         // Corrupt
	Delay      time.Duration // Slow
}

// MatchBlob matches GETs of one blob.
func MatchBlob(d digest.Digest) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+d.String())
	}
}

// MatchByte matches GETs of ranges of one blob that hold the byte at off.
func MatchByte(d digest.Digest, off int64) func(*http.Request) bool {
	blob := MatchBlob(d)
	return func(r *http.Request) bool {
		first, last, ok := parseRange(r.Header.Get("Range"))
		return blob(r) && ok && first <= off && off <= last
	}
}

// parseRange parses a Range header of the one form that readers of blobs use.
func parseRange(h string) (first, last int64, ok bool) {
	n, err := fmt.Sscanf(h, "bytes=%d-%d", &first, &last)
	return first, last, err == nil && n == 2
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
	hits   int
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

// Hits returns how many requests were hit by any fault.
func (f *Faults) Hits() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hits
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
		f.hits++
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
			if a.Reason != "" {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(a.Code)
				fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"a fault made on purpose"}]}`, a.Reason)
				return
			}
			http.Error(w, "a fault made on purpose", a.Code)
		case ShortBody:
			// The abort drops what is buffered.
			next.ServeHTTP(&halfWriter{ResponseWriter: w, then: func() { panic(http.ErrAbortHandler) }}, r)
			panic(http.ErrAbortHandler)
		case Corrupt:
			next.ServeHTTP(&corruptWriter{ResponseWriter: w, at: a.Offset}, r)
		case Reset:
			reset(w)
		case Silence:
			if a.wait(r) {
				next.ServeHTTP(w, r)
			}
		case Stall:
			next.ServeHTTP(&halfWriter{ResponseWriter: w, then: func() {
				if !a.wait(r) {
					panic(http.ErrAbortHandler)
				}
			}}, r)
		case Slow:
			select {
			case <-r.Context().Done():
			case <-time.After(a.Delay):
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

// wait waits for the end of the fault, and returns false if the client leaves before.
func (a *activeFault) wait(r *http.Request) bool {
	var over <-chan time.Time
	if a.For > 0 {
		over = time.After(time.Until(a.first.Add(a.For)))
	}
	select {
	case <-r.Context().Done():
		return false
	case <-over:
	case <-a.gone:
	}
	return true
}

// halfWriter calls then after the first half of the announced body, which the client has by then.
type halfWriter struct {
	http.ResponseWriter
	then    func()
	left    int64 // until then is called; not any more if negative
	started bool
}

func (w *halfWriter) WriteHeader(status int) {
	w.start()
	w.ResponseWriter.WriteHeader(status)
}

func (w *halfWriter) start() {
	if w.started {
		return
	}
	w.started = true
	n, err := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64)
	if err == nil {
		w.left = n / 2
	}
}

func (w *halfWriter) Write(p []byte) (n int, err error) {
	w.start()
	if w.left >= 0 && int64(len(p)) > w.left {
		if n, err = w.ResponseWriter.Write(p[:w.left]); err != nil {
			return n, err
		}
		w.left = -1
		_ = http.NewResponseController(w.ResponseWriter).Flush()
		w.then()
		p = p[n:]
	} else if w.left >= 0 {
		w.left -= int64(len(p))
	}
	m, err := w.ResponseWriter.Write(p)
	return n + m, err
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
