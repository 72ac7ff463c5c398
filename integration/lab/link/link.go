// Package link puts a registry behind a network link of given bandwidth and
// delay.
//
// A [Link] is two network namespaces joined by a veth pair. The server's side
// is where a registry listens ([Link.Listen]); the client's side is where a
// daemon runs ([Link.Start]). Bandwidth is shaped by tc's tbf in both directions, for
// all connections together. Delay cannot be had from tc everywhere (netem is
// often missing), so [Link.Front] adds it where the server handles requests:
// one round trip for a request, one more for the connection it is the first
// of, one more for TLS. Slow start and loss are not modelled; a request that
// keeps its connection and streams its answer waits once, as on a real line.
//
// The front also counts requests, bytes of answers, and the most requests that
// were outstanding at a time.
//
// It needs root and iproute2. Names carry the pid, so that links of several
// processes don't meet. Close removes everything; so do package cleanup's
// traps.
package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/cleanup"
)

// A Shape is what a link is like.
type Shape struct {
	Mbit  int           // bandwidth in Mbit/s; 0 does not shape
	Delay time.Duration // round trip time
}

func (s Shape) String() string {
	return fmt.Sprintf("%d Mbit/s, %v", s.Mbit, s.Delay)
}

// Addresses in the namespaces. Every link has namespaces of its own, so all
// links use the same.
const (
	serverIP = "10.77.0.1"
	clientIP = "10.77.0.2"
)

// A Link is a shaped link between two network namespaces.
type Link struct {
	// ServerIP is the address of the server's side as the client sees it.
	ServerIP string

	shape          Shape
	server, client string // names of the namespaces
	undo           func()
	err            error

	counts counts
	delay  atomic.Int64 // round trip time in ns
}

var links atomic.Int64

// New makes a link. The caller closes it.
func New(ctx context.Context, shape Shape) (*Link, error) {
	id := fmt.Sprintf("lz%d-%d", os.Getpid(), links.Add(1))
	l := &Link{ServerIP: serverIP, shape: shape, server: id + "s", client: id + "c"}
	l.delay.Store(int64(shape.Delay))
	l.undo = cleanup.Add(func() {
		// The veth pair goes with its namespaces, and they with their last process.
		for _, ns := range []string{l.client, l.server} {
			if _, err := os.Stat("/run/netns/" + ns); err == nil {
				l.err = errors.Join(l.err, ip(context.Background(), "netns", "del", ns))
			}
		}
	})
	steps := [][]string{
		{"netns", "add", l.server},
		{"netns", "add", l.client},
		{"-n", l.server, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", l.client},
		{"-n", l.server, "addr", "add", serverIP + "/24", "dev", "wire"},
		{"-n", l.client, "addr", "add", clientIP + "/24", "dev", "wire"},
		{"-n", l.server, "link", "set", "lo", "up"},
		{"-n", l.client, "link", "set", "lo", "up"},
		{"-n", l.server, "link", "set", "wire", "up"},
		{"-n", l.client, "link", "set", "wire", "up"},
	}
	for _, s := range steps {
		if err := ip(ctx, s...); err != nil {
			return nil, errors.Join(fmt.Errorf("make link: %w", err), l.Close())
		}
	}
	if shape.Mbit > 0 {
		// The bucket holds 5 ms, and no less than four of the 64 KiB segments that
		// veth passes whole; the queue holds 50 ms, as a home router's might.
		burst := max(256<<10, shape.Mbit*1_000_000/8/200)
		for _, ns := range []string{l.server, l.client} {
			if err := run(ctx, "tc", "-n", ns, "qdisc", "add", "dev", "wire", "root", "tbf",
				"rate", fmt.Sprintf("%dmbit", shape.Mbit), "burst", fmt.Sprint(burst), "latency", "50ms"); err != nil {
				return nil, errors.Join(fmt.Errorf("shape link: %w", err), l.Close())
			}
		}
	}
	return l, nil
}

// Shape returns what the link was made as.
func (l *Link) Shape() Shape { return l.shape }

// Close removes the link. Processes started on it must have ended.
func (l *Link) Close() error {
	l.undo()
	return l.err
}

// Listen listens on a free port of the server's address.
func (l *Link) Listen() (net.Listener, error) {
	var ln net.Listener
	err := inside(l.server, func() (err error) {
		var lc net.ListenConfig
		ln, err = lc.Listen(context.Background(), "tcp", serverIP+":0")
		return err
	})
	return ln, err
}

// Start starts cmd on the client's side. The command sees the machine's mounts,
// not a copy of them as under `ip netns exec`.
func (l *Link) Start(cmd *exec.Cmd) error { return inside(l.client, cmd.Start) }

// Dial connects from the client's side, for clients in this process.
func (l *Link) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var conn net.Conn
	err := inside(l.client, func() (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// inside runs do on a thread that is in the network namespace.
func inside(ns string, do func() error) error {
	errc := make(chan error, 1)
	go func() {
		// A thread that cannot be brought back is not unlocked: it ends with this goroutine.
		runtime.LockOSThread()
		errc <- func() error {
			own, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return fmt.Errorf("enter network namespace %s: %w", ns, err)
			}
			defer own.Close()
			other, err := os.Open("/run/netns/" + ns)
			if err != nil {
				return fmt.Errorf("enter network namespace %s: %w", ns, err)
			}
			defer other.Close()
			if err := unix.Setns(int(other.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter network namespace %s: %w", ns, err)
			}
			doErr := do()
			if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err != nil {
				return errors.Join(doErr, fmt.Errorf("leave network namespace %s: %w", ns, err))
			}
			runtime.UnlockOSThread()
			return doErr
		}()
	}()
	return <-errc
}

func ip(ctx context.Context, args ...string) error { return run(ctx, "ip", args...) }

func run(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Counts are what went over a link since it was made or reset.
type Counts struct {
	Requests    int   `json:"requests"`
	Bytes       int64 `json:"bytes"`       // of response bodies
	Outstanding int   `json:"outstanding"` // the most at a time
}

type counts struct {
	mu  sync.Mutex
	c   Counts
	now int
}

// Counts returns what went over the link.
func (l *Link) Counts() Counts {
	l.counts.mu.Lock()
	defer l.counts.mu.Unlock()
	return l.counts.c
}

// ResetCounts starts counting anew.
func (l *Link) ResetCounts() {
	l.counts.mu.Lock()
	defer l.counts.mu.Unlock()
	l.counts.c = Counts{Outstanding: l.counts.now}
}

// SetDelay changes the round trip time of requests to come, 0 for none: to
// push images to a registry behind the link without waiting for it.
func (l *Link) SetDelay(d time.Duration) { l.delay.Store(int64(d)) }

// Front wraps a handler so that a request waits for the round trips that it would take.
func (l *Link) Front(next http.Handler) http.Handler {
	var seen sync.Map // remote addresses of connections that have had a request
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.counts.enter()
		cw := &writer{ResponseWriter: w, counts: &l.counts}
		defer l.counts.leave()
		if rtt := time.Duration(l.delay.Load()); rtt > 0 {
			wait := rtt
			if _, old := seen.LoadOrStore(r.RemoteAddr, struct{}{}); !old {
				wait += rtt
				if r.TLS != nil {
					wait += rtt
					if r.TLS.Version < tls.VersionTLS13 {
						wait += rtt
					}
				}
			}
			select {
			case <-time.After(wait):
			case <-r.Context().Done():
				return
			}
		}
		next.ServeHTTP(cw, r)
	})
}

func (c *counts) enter() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.c.Requests++
	c.now++
	c.c.Outstanding = max(c.c.Outstanding, c.now)
}

func (c *counts) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now--
}

func (c *counts) add(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.c.Bytes += n
}

// writer counts what is written and keeps io.ReaderFrom, so that the kernel sends files.
type writer struct {
	http.ResponseWriter
	counts *counts
}

var _ io.ReaderFrom = (*writer)(nil)

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.counts.add(int64(n))
	return n, err
}

func (w *writer) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, r)
	w.counts.add(n)
	return n, err
}

func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }
