package link

import (
	"io"
	"math"
	"net/http"
	"os"
	"testing"
	"time"
)

// TestLinkIsAsSlowAsItSays downloads through a link and compares time with bandwidth and delay.
func TestLinkIsAsSlowAsItSays(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root")
	}
	l, err := New(t.Context(), Shape{Mbit: 80, Delay: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	ln, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	const size = 10 << 20
	srv := &http.Server{Handler: l.Front(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, size))
	}))}
	go srv.Serve(ln)
	defer srv.Close()

	client := &http.Client{Transport: &http.Transport{DialContext: l.Dial}}
	get := func(method string) time.Duration {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+ln.Addr().String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
		return time.Since(start)
	}
	// A busy machine makes requests slower than the link does, so the bounds above are for the fastest of some.
	requests := 0
	fastest := func(method string, from, to time.Duration, prepare func()) {
		t.Helper()
		best := time.Duration(math.MaxInt64)
		for n := 0; n < 10 && best > to; n++ {
			prepare()
			requests++
			best = min(best, get(method))
		}
		if best < from || best > to {
			t.Errorf("%s took %v, want %v to %v", method, best, from, to)
		}
	}
	// A new connection takes two round trips of 100 ms, one that is there takes one.
	fastest(http.MethodHead, 200*time.Millisecond, 300*time.Millisecond, client.CloseIdleConnections)
	fastest(http.MethodHead, 100*time.Millisecond, 180*time.Millisecond, func() {})
	// 10 MiB at 80 Mbit/s are 1.05 s, and the link's headers come on top.
	fastest(http.MethodGet, 1050*time.Millisecond, 1600*time.Millisecond, func() {})
	if c := l.Counts(); c.Requests != requests || c.Bytes < size || c.Outstanding != 1 {
		t.Errorf("counts %+v, want %d requests, 1 outstanding, at least %d bytes", c, requests, size)
	}
}
