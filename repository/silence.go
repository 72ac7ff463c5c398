package repository

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// silentFor is how long a registry may neither take a byte nor send one. It is generous: some answer to the end of an upload when they have copied it
// to where they keep blobs.
const silentFor = 5 * time.Minute

// patient returns hosts that are given up when they have been silent for that long.
func patient(hosts Hosts, limit time.Duration) Hosts {
	return func(registry string) ([]docker.RegistryHost, error) {
		all, err := hosts(registry)
		if err != nil {
			return nil, err
		}
		out := make([]docker.RegistryHost, len(all))
		for i, h := range all {
			client := http.Client{}
			if h.Client != nil {
				client = *h.Client
			}
			if client.Transport == nil {
				client.Transport = http.DefaultTransport
			}
			client.Transport = patience{client.Transport, limit}
			h.Client = &client
			out[i] = h
		}
		return out, nil
	}
}

// A silentError says that a host was silent. It's a net.Error, as those of networks are.
type silentError struct {
	host  string
	limit time.Duration
}

func (e *silentError) Error() string {
	return fmt.Sprintf("%s has neither taken nor sent a byte for %s", e.host, e.limit)
}
func (e *silentError) Timeout() bool   { return true }
func (e *silentError) Temporary() bool { return true }

// patience ends requests to hosts that are silent.
type patience struct {
	http.RoundTripper
	limit time.Duration
}

// RoundTrip implements http.RoundTripper.
func (p patience) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	silent := &silentError{req.URL.Host, p.limit}
	w := &watch{ctx: ctx, limit: p.limit, timer: time.AfterFunc(p.limit, func() { cancel(silent) })}
	req = req.Clone(ctx)
	if req.Body != nil && req.Body != http.NoBody {
		req.Body = &sent{req.Body, w}
	}
	if again := req.GetBody; again != nil {
		req.GetBody = func() (io.ReadCloser, error) {
			body, err := again()
			return &sent{body, w}, err
		}
	}
	resp, err := p.RoundTripper.RoundTrip(req)
	w.answered()
	if err != nil {
		err = w.why(err)
		cancel(err)
		return nil, err
	}
	resp.Body = &received{resp.Body, w, cancel}
	return resp, nil
}

// A watch runs while it's the host's turn.
type watch struct {
	ctx   context.Context //nolint:containedctx // of the request; its cause says that the host was silent
	limit time.Duration

	mu    sync.Mutex
	timer *time.Timer
	done  bool // there is an answer: what is still sent is of no interest
}

func (w *watch) answered() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
	w.timer.Stop()
}

// sending starts or stops the watch while a body is sent.
func (w *watch) sending(turn bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.done:
	case turn:
		w.timer.Reset(w.limit)
	default:
		w.timer.Stop()
	}
}

// why returns why a request has failed with err.
func (w *watch) why(err error) error {
	if silent, ok := errors.AsType[*silentError](context.Cause(w.ctx)); ok {
		return silent
	}
	return err
}

// sent is the body of a request. While its bytes are being made nobody waits for the host.
type sent struct {
	io.ReadCloser
	w *watch
}

// Read implements io.Reader.
func (s *sent) Read(p []byte) (int, error) {
	s.w.sending(false)
	defer s.w.sending(true)
	return s.ReadCloser.Read(p)
}

// received is the body of an answer.
type received struct {
	io.ReadCloser
	w      *watch
	cancel context.CancelCauseFunc
}

// Read implements io.Reader.
func (r *received) Read(p []byte) (int, error) {
	r.w.timer.Reset(r.w.limit)
	n, err := r.ReadCloser.Read(p)
	r.w.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		err = r.w.why(err)
	}
	return n, err
}

// Close implements io.Closer.
func (r *received) Close() error {
	err := r.ReadCloser.Close()
	r.cancel(context.Canceled)
	return err
}
