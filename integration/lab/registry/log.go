package registry

import (
	"cmp"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// An Entry is one request and its answer.
type Entry struct {
	Time   time.Time `json:"time"`
	Proto  string    `json:"proto"` // HTTP/1.1 or HTTP/2.0
	Method string    `json:"method"`
	Path   string    `json:"path"` // with the query
	Range  string    `json:"range,omitempty"`
	Status int       `json:"status"`
	Bytes  int64     `json:"bytes"` // of the response body that were written
	// Received are bytes of the request body that were read.
	Received int64   `json:"received,omitempty"`
	Took     float64 `json:"seconds"`
	// Authorized says that the request carried credentials or a token, never which.
	Authorized bool `json:"authorized"`
}

// Digest returns the digest of the blob or manifest that the entry names, or "".
func (e Entry) Digest() digest.Digest {
	path, _, _ := strings.Cut(e.Path, "?")
	d := digest.Digest(path[strings.LastIndexByte(path, '/')+1:])
	if d.Validate() != nil {
		return ""
	}
	return d
}

// Blob reports whether the entry is about reading a blob.
func (e Entry) Blob() bool {
	return strings.Contains(e.Path, "/blobs/") && !strings.Contains(e.Path, "/blobs/uploads/")
}

// Manifest reports whether the entry is about a manifest.
func (e Entry) Manifest() bool { return strings.Contains(e.Path, "/manifests/") }

// A Log holds the requests that a registry has answered, in the order in which the
// answers ended. It is safe for concurrent use.
type Log struct {
	mu      sync.Mutex
	entries []Entry
	tee     io.Writer
}

// Tee writes later entries to w too, as one JSON object per line.
func (l *Log) Tee(w io.Writer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tee = w
}

// Reset forgets everything.
func (l *Log) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = nil
}

// Entries returns the entries for which every keep returns true.
func (l *Log) Entries(keep ...func(Entry) bool) []Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []Entry
next:
	for _, e := range l.entries {
		for _, k := range keep {
			if !k(e) {
				continue next
			}
		}
		out = append(out, e)
	}
	return out
}

// BlobBytes returns how many bytes of each blob were sent to readers.
func (l *Log) BlobBytes() map[digest.Digest]int64 {
	got := map[digest.Digest]int64{}
	for _, e := range l.Entries(Entry.Blob) {
		if e.Method == http.MethodGet && e.Status < 300 {
			got[e.Digest()] += e.Bytes
		}
	}
	return got
}

// Sent returns how many different bytes of a blob were sent in answer to range requests, and how many were sent
// again.
func (l *Log) Sent(d digest.Digest) (once, again int64) {
	type span struct{ from, to int64 }
	var spans []span
	for _, e := range l.Entries(Entry.Blob) {
		first, _, ok := parseRange(e.Range)
		if ok && e.Status == http.StatusPartialContent && e.Digest() == d {
			spans = append(spans, span{first, first + e.Bytes})
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	var end int64
	for _, s := range spans {
		fresh := max(0, s.to-max(s.from, end))
		once += fresh
		again += s.to - s.from - fresh
		end = max(end, s.to)
	}
	return once, again
}

// Bytes returns the sum of all response bodies.
func (l *Log) Bytes() int64 {
	var n int64
	for _, e := range l.Entries() {
		n += e.Bytes
	}
	return n
}

func (l *Log) add(e Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, e)
	if l.tee != nil {
		// The log in memory is what counts; a full disk is not the client's fault.
		_ = json.NewEncoder(l.tee).Encode(e)
	}
}

func (l *Log) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		cw := &countingWriter{ResponseWriter: w}
		cr := &countingReader{ReadCloser: r.Body}
		r.Body = cr
		e := Entry{
			Time:       start,
			Proto:      r.Proto,
			Method:     r.Method,
			Path:       r.URL.RequestURI(),
			Range:      r.Header.Get("Range"),
			Authorized: r.Header.Get("Authorization") != "",
		}
		// Deferred, because a fault may abort the handler by panicking.
		defer func() {
			e.Status, e.Bytes, e.Received, e.Took = cw.status, cw.n, cr.n, time.Since(start).Seconds()
			l.add(e)
		}()
		next.ServeHTTP(cw, r)
	})
}

// countingReader counts what is read.
type countingReader struct {
	io.ReadCloser
	n int64
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.n += int64(n)
	return n, err
}

// countingWriter counts what is written and keeps io.ReaderFrom, through
// which net/http sends files without copying them.
type countingWriter struct {
	http.ResponseWriter
	status int
	n      int64
}

var _ io.ReaderFrom = (*countingWriter)(nil)

func (w *countingWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(p)
	w.n += int64(n)
	return n, err
}

func (w *countingWriter) ReadFrom(r io.Reader) (int64, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := io.Copy(w.ResponseWriter, r)
	w.n += n
	return n, err
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
