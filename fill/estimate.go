package fill

import "time"

// Start values of an estimate: a link of 100 Mbit/s and 30 ms.
const (
	firstRate = 12.5e6
	firstRTT  = 30 * time.Millisecond

	minRTT  = 100 * time.Microsecond
	minRate = 64e3
	maxRate = 10e9
	// shortSample is the time over which a rate is measured at least; shorter ones see the bursts of a connection.
	shortSample = 20 * time.Millisecond
	// smallSample is the number of bytes from which a rate is taken from a request that was over before that.
	smallSample = 64 << 10
	quickSample = 5 * time.Millisecond
)

// estimate is what is known of the link: moving averages over the requests of all layers. Its owner locks.
type estimate struct {
	rate float64       // bytes per second
	rtt  time.Duration // from a request to its first byte
	// measured says that the rate is not the one to start with any more.
	measured bool
	// least is the shortest of them so far.
	least time.Duration

	sampling bool
	since    time.Time
	bytes    int64
	busy     bool // enough was outstanding all the time for the link to be the limit
}

func newEstimate() estimate { return estimate{rate: firstRate, rtt: firstRTT} }

// answered takes note of the time from a request to its first byte. A longer one is more likely a queue, of our own
// making, than a longer way.
func (e *estimate) answered(d time.Duration) {
	d = max(d, minRTT)
	if e.least == 0 {
		e.least, e.rtt = d, d
	}
	e.least = min(e.least, d)
	if d < e.rtt {
		e.rtt -= (e.rtt - d) / 2
	} else {
		e.rtt += (min(d, 3*e.least) - e.rtt) / 8
	}
}

// arrived takes note of n bytes; left is how many are still outstanding.
func (e *estimate) arrived(now time.Time, n, left int64) {
	if !e.sampling {
		// The first bytes have waited for their reader: the clock runs from the end of them.
		e.sampling, e.since, e.bytes, e.busy = left > 0, now, 0, true
		return
	}
	e.bytes += n
	e.busy = e.busy && left >= e.bdp()/2
	d := now.Sub(e.since)
	switch {
	case d >= max(e.rtt, shortSample), left == 0 && d >= quickSample && e.bytes >= smallSample:
		e.sample(float64(e.bytes) / d.Seconds())
		e.sampling = false
	case left == 0:
		e.sampling = false
	}
}

func (e *estimate) sample(rate float64) {
	switch {
	case rate > e.rate:
		e.rate += (rate - e.rate) / 2
	case e.busy:
		e.rate += (rate - e.rate) / 4
	default:
		return
	}
	e.measured = true
	e.rate = min(max(e.rate, minRate), maxRate)
}

// bdp is how many bytes the link carries in a round trip, within reason: less is not worth a request, and more
// than 16 MiB is not worth the memory.
func (e *estimate) bdp() int64 {
	return min(max(int64(e.rate*e.rtt.Seconds()), 64<<10), 16<<20)
}
