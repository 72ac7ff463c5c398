package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
)

// ErrNoRange says that a host ignores range requests.
var ErrNoRange = errors.New("answered 200 to a range request")

// Hosts returns the hosts that may serve a blob, in the order to try them.
// It is called before every attempt, so it can bring fresh credentials.
type Hosts func() ([]docker.RegistryHost, error)

// Options tune a Reader. The zero value works.
type Options struct {
	// RetryFor is how long a read goes on trying without receiving a byte.
	// 0 means 60 s.
	RetryFor time.Duration
	// Stall is how long one attempt may be silent, before and between the bytes
	// of its body. 0 means a third of RetryFor, so that a silent host is not all
	// that is tried.
	Stall time.Duration
	// Fetched is told of the bytes of every body part received, and of the time
	// their reader waited for them. Called concurrently.
	Fetched func(dgst digest.Digest, n int64, wait time.Duration)
	// Retrying is told, each time that a request fails, why it is going to be made again, at the same host or another
	// one, if there is time. Called concurrently.
	Retrying func(dgst digest.Digest, why error)
	// Retried is told of each request that is made because one before it has failed. Called concurrently.
	Retried func(dgst digest.Digest)
	// Failed is told of reads that were given up. Called concurrently.
	Failed func(dgst digest.Digest, err error)
}

const (
	defaultRetryFor = 60 * time.Second
	maxRedirects    = 5
	maxRefusals     = 3 // of one request, each with another authorization
)

// Reader reads one blob. Make it with [New].
type Reader struct {
	ref  reference.Spec
	dgst digest.Digest
	opt  Options

	mu        sync.Mutex
	hosts     Hosts
	size      int64                // bytes; 0 until known
	redirects map[string]string    // blob URL -> where the registry sent us last
	avoided   map[string]time.Time // hosts -> until when they are asked last
	whole     bool                 // see AcceptWhole
}

// New returns a Reader of the blob dgst in the repository of ref. size is the
// blob's length in bytes as its descriptor states it, or 0 if that isn't known.
func New(ref reference.Spec, dgst digest.Digest, size int64, hosts Hosts, opt Options) *Reader {
	if opt.RetryFor <= 0 {
		opt.RetryFor = defaultRetryFor
	}
	if opt.Stall <= 0 {
		opt.Stall = opt.RetryFor / 3
	}
	return &Reader{ref: ref, dgst: dgst, opt: opt, hosts: hosts, size: size, redirects: map[string]string{}}
}

// SetHosts replaces where the blob is read from, e.g. when another build brings
// its own credentials. Reads under way use it from their next attempt on.
func (r *Reader) SetHosts(h Hosts) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts = h
}

// Repository is the repository that the blob is read from, e.g.
// "registry.example/team/image".
func (r *Reader) Repository() string { return r.ref.Locator }

// Digest names the blob.
func (r *Reader) Digest() digest.Digest { return r.dgst }

// Size returns the blob's length in bytes, asking the registry for it if the
// descriptor didn't say.
func (r *Reader) Size(ctx context.Context) (int64, error) {
	if n := r.KnownSize(); n > 0 {
		return n, nil
	}
	body, err := r.Fetch(ctx, 0, 1)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	if _, err := io.Copy(io.Discard, body); err != nil {
		return 0, err
	}
	n := r.KnownSize()
	if n == 0 {
		return 0, fmt.Errorf("read blob %s of %s: neither manifest nor registry says how long it is", r.dgst, r.ref.Locator)
	}
	return n, nil
}

// KnownSize returns the blob's length in bytes, 0 if neither descriptor nor registry has said it so far.
func (r *Reader) KnownSize() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.size
}

// learnSize takes size for the blob's if that isn't known, and returns what is.
func (r *Reader) learnSize(size int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size == 0 {
		r.size = size
	}
	return r.size
}

// Fetch returns the n bytes at off, both at least 0 and n at least 1. The body
// ends with io.EOF after exactly n bytes or with an error that names blob and
// host. The caller closes it. ctx bounds the body as well.
//
// The body has two methods more. Source() string is the host that answered last, a mirror or the registry, which may have redirected
// to a store. Whole() bool reports whether that sends the whole blob: see [Reader.AcceptWhole].
func (r *Reader) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return r.fetch(ctx, off, n, "")
}

// Refetch is Fetch for bytes that turned out to be corrupt: it asks the other hosts first, if there are any, and
// the registry anew for where its blobs are. from is the Source of the body that they came in, "" if that isn't known.
func (r *Reader) Refetch(ctx context.Context, off, n int64, from string) (io.ReadCloser, error) {
	r.mu.Lock()
	clear(r.redirects)
	r.mu.Unlock()
	return r.fetch(ctx, off, n, from)
}

func (r *Reader) fetch(ctx context.Context, off, n int64, blamed string) (io.ReadCloser, error) {
	if off < 0 || n < 1 {
		return nil, fmt.Errorf("read blob %s: invalid range of %d bytes at %d", r.dgst, n, off)
	}
	start := time.Now()
	b := &body{r: r, ctx: ctx, off: off, end: off + n, blamed: blamed, deadline: start.Add(r.opt.RetryFor)}
	if err := b.open(); err != nil {
		return nil, b.fail(err)
	}
	b.opening = time.Since(start)
	return b, nil
}

// get sends one range request to one host and returns its body, which holds the
// bytes from off on. whole says that an answer with the whole blob will do.
func (r *Reader) get(ctx context.Context, host docker.RegistryHost, off, end int64, whole bool) (io.ReadCloser, error) {
	blobURL := r.url(host)
	r.mu.Lock()
	target, known := r.redirects[blobURL]
	r.mu.Unlock()
	if known {
		if resp, err := r.send(ctx, host, target, off, end); err == nil {
			if body, err := r.accept(resp, off, end, whole); err == nil {
				return body, nil
			}
		}
		// A signed URL that has expired, or a store that isn't what it was: the registry knows where the blob is now.
		r.mu.Lock()
		delete(r.redirects, blobURL)
		r.mu.Unlock()
		if context.Cause(ctx) != nil {
			return nil, context.Cause(ctx)
		}
	}

	target = blobURL
	for range maxRedirects {
		resp, err := r.send(ctx, host, target, off, end)
		if err != nil {
			return nil, err
		}
		loc, err := resp.Location()
		if resp.StatusCode/100 == 3 && err == nil {
			drain(resp)
			target = loc.String()
			continue
		}
		body, err := r.accept(resp, off, end, whole)
		if err == nil && target != blobURL {
			r.mu.Lock()
			r.redirects[blobURL] = target
			r.mu.Unlock()
		}
		return body, err
	}
	return nil, &statusError{host: host.Host, status: fmt.Sprintf("redirected more than %d times", maxRedirects)}
}

func (r *Reader) url(host docker.RegistryHost) string {
	u := url.URL{
		Scheme: host.Scheme,
		Host:   host.Host,
		Path: path.Join("/", host.Path, strings.TrimPrefix(r.ref.Locator, r.ref.Hostname()+"/"),
			"blobs", r.dgst.String()),
	}
	// A mirror learns which registry is meant, as containerd's resolver does it.
	if ns := r.ref.Hostname(); ns != host.Host && (ns != "docker.io" || host.Host != "registry-1.docker.io") {
		u.RawQuery = url.Values{"ns": {ns}}.Encode()
	}
	return u.String()
}

// send sends one request. Only the registry itself gets its headers and
// credentials; another host that it redirects to gets none.
func (r *Reader) send(ctx context.Context, host docker.RegistryHost, target string, off, end int64) (*http.Response, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", host.Host, hideQuery(err))
	}
	registry := u.Scheme == host.Scheme && u.Host == host.Host
	var tr http.RoundTripper
	if host.Client != nil {
		tr = host.Client.Transport
	}
	if tr == nil {
		tr = http.DefaultTransport
	}
	scope, err := docker.RepositoryScope(r.ref, false)
	if err != nil {
		return nil, err
	}
	ctx = docker.WithScope(ctx, scope)
	var refused []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
		if err != nil {
			return nil, err
		}
		if registry {
			maps.Copy(req.Header, host.Header)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, end-1))
		req.Header.Set("Accept-Encoding", "identity")
		if registry && host.Authorizer != nil {
			if err := host.Authorizer.Authorize(ctx, req); err != nil {
				return nil, fmt.Errorf("%s: authorize: %w", host.Host, hideQuery(err))
			}
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", host.Host, hideQuery(err))
		}
		if resp.StatusCode != http.StatusUnauthorized || len(refused) == maxRefusals || !registry || host.Authorizer == nil {
			return resp, nil
		}
		drain(resp)
		// An authorizer takes its token for expired when the same request is refused
		// twice, so it's told of all refusals, as containerd's resolver tells it.
		refused = append(refused, resp)
		blameToken(resp)
		if err := host.Authorizer.AddResponses(ctx, refused); err != nil {
			return nil, fmt.Errorf("%s: authorize: %w", host.Host, hideQuery(err))
		}
	}
}

// blameToken completes the challenge of a registry that refuses a bearer token without saying why: authorizers get a new
// one only for an error that RFC 6750, section 3.1, has for it.
func blameToken(resp *http.Response) {
	const challenge = "WWW-Authenticate"
	h := resp.Header.Get(challenge)
	if strings.HasPrefix(resp.Request.Header.Get("Authorization"), "Bearer ") &&
		strings.HasPrefix(h, "Bearer ") && !strings.Contains(h, "error=") {
		resp.Header.Set(challenge, h+`,error="invalid_token"`)
	}
}

// accept takes the body of a 206 that starts at off, or what is wanted of that of a 200; everything else is an error.
func (r *Reader) accept(resp *http.Response, off, end int64, whole bool) (io.ReadCloser, error) {
	host := resp.Request.URL.Host
	switch resp.StatusCode {
	case http.StatusPartialContent:
		first, last, size, err := parseContentRange(resp.Header.Get("Content-Range"))
		if err != nil || first != off || last >= end {
			drain(resp)
			return nil, &statusError{host: host, status: fmt.Sprintf(
				"answered bytes %d-%d with Content-Range %q", off, end-1, resp.Header.Get("Content-Range"))}
		}
		if err := r.checkSize(resp, size); err != nil {
			return nil, err
		}
		return resp.Body, nil
	case http.StatusOK:
		if whole {
			return r.cutOut(resp, off, end)
		}
		// Not drained: it may be gigabytes.
		resp.Body.Close()
		return nil, fmt.Errorf("%s %w", host, ErrNoRange)
	default:
		drain(resp)
		return nil, &statusError{
			host: host, status: "answered " + resp.Status, code: resp.StatusCode,
			after: retryAfter(resp.Header.Get("Retry-After")),
		}
	}
}

// checkSize closes the body of a host that has another blob than the one that is known.
func (r *Reader) checkSize(resp *http.Response, size int64) error {
	known := r.learnSize(size)
	if known == 0 || size == 0 || known == size {
		return nil
	}
	resp.Body.Close()
	return &statusError{host: resp.Request.URL.Host, status: fmt.Sprintf("has %d bytes of a blob of %d", size, known)}
}

// drain lets the connection be used again, unless that means reading much.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
}

// contentRange is RFC 9110, section 14.4.
var contentRange = regexp.MustCompile(`^bytes (\d+)-(\d+)/(\d+|\*)$`)

func parseContentRange(h string) (first, last, size int64, err error) {
	m := contentRange.FindStringSubmatch(h)
	if m == nil {
		return 0, 0, 0, fmt.Errorf("invalid Content-Range %q", h)
	}
	if first, err = strconv.ParseInt(m[1], 10, 64); err != nil {
		return 0, 0, 0, err
	}
	if last, err = strconv.ParseInt(m[2], 10, 64); err != nil {
		return 0, 0, 0, err
	}
	if m[3] != "*" {
		if size, err = strconv.ParseInt(m[3], 10, 64); err != nil {
			return 0, 0, 0, err
		}
	}
	if last < first || size > 0 && last >= size {
		return 0, 0, 0, fmt.Errorf("invalid Content-Range %q", h)
	}
	return first, last, size, nil
}
