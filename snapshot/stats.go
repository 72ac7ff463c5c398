package snapshot

import (
	"cmp"
	"slices"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// Stats say how far lazy layers have come. What the kernel answers by itself, because the bytes are there, is in none of
// these figures: nobody tells us.
type Stats struct {
	Summary
	// Layers are those that are open or being opened, by digest.
	Layers []LayerStats `json:"layers"`
}

// Summary is what Stats say of all layers.
type Summary struct {
	// Door is how readers get into layers.
	Door string `json:"door"`
	// Link is what the link to the registries is taken for. Until enough has come over it to measure its rate, that is a guess.
	Link struct {
		BytesPerSecond int64   `json:"bytesPerSecond"`
		RTTSeconds     float64 `json:"rttSeconds"`
		Measured       bool    `json:"measured"`
	} `json:"link"`
	// Queue is what is to be fetched, in bytes by urgency.
	Queue fill.Queue `json:"queue"`
	// Totals count since the Snapshotter was opened, also of layers that are gone.
	Totals Totals `json:"totals"`
}

// Totals are counters of all layers.
type Totals struct {
	// Mounted is the number of layers that are open now.
	Mounted int `json:"mounted"`
	// Fetched are the bytes received from registries, tables of contents included; Served those of reads that were
	// answered by us.
	Fetched int64 `json:"fetched"`
	Served  int64 `json:"served"`
	// Copied are the compressed bytes that needn't be fetched, as a lazy layer had the chunks already.
	Copied int64 `json:"copied"`
	// Misses are the reads that had to wait, Errors those that failed.
	Misses int64 `json:"misses"`
	Errors int64 `json:"errors"`
	// Retries are the requests made again, Corrupt what failed verification: frames and tables of contents.
	Retries int64 `json:"retries"`
	Corrupt int64 `json:"corrupt"`
}

// LayerStats are one layer's figures since it was opened, but for Filled.
type LayerStats struct {
	Digest digest.Digest `json:"digest"`
	// Repository is where the blob is read from now, Source the host that answered last: the registry's or a
	// mirror's.
	Repository string `json:"repository"`
	Source     string `json:"source,omitempty"`
	// Open is false while the table of contents is on its way.
	Open bool `json:"open"`
	// Filled are the verified bytes that are there, of Total; both uncompressed. Size is the compressed blob's.
	Filled int64 `json:"filled"`
	Total  int64 `json:"total"`
	Size   int64 `json:"size,omitempty"`
	// Fetched are the bytes received for this layer, Copied those that needn't be fetched, as it or another one had the chunks already, Served
	// those of reads that were answered.
	Fetched int64 `json:"fetched"`
	Copied  int64 `json:"copied"`
	Served  int64 `json:"served"`
	// Hits are the reads that came to us and found everything there, Misses those that had to wait, WaitSeconds for
	// how long in total; Errors failed.
	Hits        int64   `json:"hits"`
	Misses      int64   `json:"misses"`
	WaitSeconds float64 `json:"waitSeconds"`
	Errors      int64   `json:"errors"`
	// Requests are the ranges asked for, Retries those asked for again; Corrupt are the frames that failed
	// verification.
	Requests int64 `json:"requests"`
	Retries  int64 `json:"retries"`
	Corrupt  int64 `json:"corrupt"`
	// Trouble is the last reason of a retry or error, TroubleSeconds how long ago that was.
	Trouble        string  `json:"trouble,omitempty"`
	TroubleSeconds float64 `json:"troubleSeconds,omitempty"`
}

// totals are what Totals are read from.
type totals struct {
	fetched, copied, served, misses, errors, retries, corrupt atomic.Int64
}

// counts are what a layer's Stats are read from that its Filler doesn't count.
type counts struct {
	fetched, served, retries atomic.Int64

	total   int64 // bytes of all chunks; written by open
	source  atomic.Pointer[string]
	trouble atomic.Pointer[trouble]
}

// trouble is why a request had to be made again, or a read failed.
type trouble struct {
	at  time.Time
	err error
}

// Stats returns how far the layers have come. It looks at every chunk of them: for people and scrapers.
func (s *Snapshotter) Stats() Stats { return s.door.stats() }

// Summary returns what Stats does of all layers. It is quick.
func (s *Snapshotter) Summary() Summary {
	sum, _ := s.door.summary()
	return sum
}

func (e *engine) stats() Stats {
	sum, layers := e.summary()
	st := Stats{Summary: sum, Layers: make([]LayerStats, 0, len(layers))}
	for _, s := range layers {
		st.Layers = append(st.Layers, s.stats())
	}
	slices.SortFunc(st.Layers, func(a, b LayerStats) int { return cmp.Compare(a.Digest, b.Digest) })
	return st
}

func (e *engine) summary() (Summary, []*served) {
	t := &e.totals
	sum := Summary{Door: e.opt.Door, Queue: e.sched.Queue(), Totals: Totals{
		Fetched: t.fetched.Load(), Copied: t.copied.Load(), Served: t.served.Load(), Misses: t.misses.Load(), Errors: t.errors.Load(),
		Retries: t.retries.Load(), Corrupt: t.corrupt.Load(),
	}}
	rate, rtt, measured := e.sched.Link()
	sum.Link.BytesPerSecond, sum.Link.RTTSeconds, sum.Link.Measured = int64(rate), rtt.Seconds(), measured
	e.mu.Lock()
	defer e.mu.Unlock()
	layers := make([]*served, 0, len(e.layers))
	for _, s := range e.layers {
		layers = append(layers, s)
		if s.opened() {
			sum.Totals.Mounted++
		}
	}
	return sum, layers
}

func (s *served) stats() LayerStats {
	c := &s.counts
	r := s.reader()
	l := LayerStats{
		Digest: s.key.Blob, Repository: r.Repository(), Size: r.KnownSize(),
		Fetched: c.fetched.Load(), Served: c.served.Load(), Retries: c.retries.Load(),
	}
	if src := c.source.Load(); src != nil {
		l.Source = *src
	}
	if t := c.trouble.Load(); t != nil {
		l.Trouble, l.TroubleSeconds = t.err.Error(), time.Since(t.at).Seconds()
	}
	if !s.opened() {
		return l
	}
	f := s.filler.Stats()
	l.Open, l.Filled, l.Total = true, s.held.Filled(), c.total
	l.Hits, l.Misses, l.WaitSeconds, l.Errors = f.Hits, f.Misses, f.Waited.Seconds(), f.Errors
	l.Requests, l.Corrupt, l.Copied = f.Requests, f.Corrupt, f.Copied
	return l
}
