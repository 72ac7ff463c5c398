package fill

import (
	"sync/atomic"
	"time"
)

// Stats are the counters of a Filler since it was opened.
type Stats struct {
	// Hits are calls of Fill that found everything present, Misses those that had to wait.
	Hits, Misses int64
	// Fetched are the compressed bytes received, Copied those that needn't be, as other chunks have the same digests, and Written the bytes of verified chunks put into the sink.
	Fetched, Copied, Written int64
	// Guessed are the compressed bytes that nobody has asked for so far, of those that a miss was widened by.
	Guessed int64
	// Requests are the ranges asked for.
	Requests int64
	// Waited is the time that callers of Fill have waited in total.
	Waited time.Duration
	// Errors are the calls of Fill that failed while their callers were waiting.
	Errors int64
	// Corrupt are the frames that failed verification, Retries those that were fetched again for it.
	Corrupt, Retries int64
	// Queue are the compressed bytes asked for or about to be that haven't been written.
	Queue int64
	// Missing are the chunks not in the sink, of Chunks.
	Missing, Chunks int64
	// Source is where the last request was answered, empty if the Fetcher doesn't say.
	Source string
}

// counters are what Stats are read from.
type counters struct {
	hits, misses, fetched, copied, served, requests, waited, errors, corrupt, retries atomic.Int64

	source atomic.Pointer[string]
}

// Stats returns the Filler's counters. They don't belong to the same instant. It looks at every chunk.
func (f *Filler) Stats() Stats {
	c := &f.count
	s := Stats{
		Hits: c.hits.Load(), Misses: c.misses.Load(), Fetched: c.fetched.Load(), Copied: c.copied.Load(), Written: c.served.Load(),
		Requests: c.requests.Load(), Waited: time.Duration(c.waited.Load()), Errors: c.errors.Load(),
		Corrupt: c.corrupt.Load(), Retries: c.retries.Load(),
		Chunks: int64(len(f.layer.Chunks)),
	}
	for i := range f.layer.Chunks {
		if !f.sink.Have(i) {
			s.Missing++
		}
	}
	if src := c.source.Load(); src != nil {
		s.Source = *src
	}
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	for _, n := range f.guessed {
		s.Guessed += n
	}
	for _, fl := range f.flights {
		if !fl.local() {
			s.Queue += fl.size()
		}
	}
	return s
}

// corrupted takes note of a frame that failed verification.
func (f *Filler) corrupted() {
	f.count.corrupt.Add(1)
	if f.opt.Corrupt != nil {
		f.opt.Corrupt()
	}
}

// Queue is what a Scheduler has before it, in compressed bytes asked for or about to be that haven't been written, by
// how urgent they are.
type Queue struct {
	// Demand is what somebody waits for, Ahead what is read ahead of somebody, Profiled what Prefetch has asked for.
	Demand     int64 `json:"demand"`
	Ahead      int64 `json:"ahead"`
	Profiled   int64 `json:"profiled"`
	Background int64 `json:"background"`
	// Unswept are the frames that background work hasn't come to yet, of layers that something was read of; 0 unless
	// SchedulerOptions.Background is set.
	Unswept int64 `json:"unsweptFrames"`
}

// Queue returns what is to be done.
func (s *Scheduler) Queue() Queue {
	s.mu.Lock()
	defer s.mu.Unlock()
	var bytes [levels]int64
	var q Queue
	for _, f := range s.fillers {
		for _, fl := range f.flights {
			if !fl.local() {
				bytes[fl.level] += fl.size()
			}
		}
		if s.opt.Background && f.used > 0 {
			q.Unswept += int64(f.unswept)
		}
	}
	q.Demand, q.Ahead, q.Profiled, q.Background = bytes[demand], bytes[ahead], bytes[profiled], bytes[background]
	return q
}
