package link

import (
	"io"
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
	if took := get(http.MethodHead); took < 200*time.Millisecond || took > 300*time.Millisecond {
		t.Errorf("first request took %v, want two round trips of 100ms", took)
	}
	if took := get(http.MethodHead); took < 100*time.Millisecond || took > 180*time.Millisecond {
		t.Errorf("second request took %v, want one round trip of 100ms", took)
	}
	// 10 MiB at 80 Mbit/s are 1.05 s, and the link's headers come on top.
	if took := get(http.MethodGet); took < 1050*time.Millisecond || took > 1600*time.Millisecond {
		t.Errorf("%d bytes took %v, want about 1.2s", size, took)
	}
	if c := l.Counts(); c.Requests != 3 || c.Bytes < size || c.Outstanding != 1 {
		t.Errorf("counts %+v, want 3 requests, 1 outstanding, at least %d bytes", c, size)
	}
}
