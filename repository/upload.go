package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	attempts = 4                      // of a request that can be made again
	pause    = 500 * time.Millisecond // before the second one, twice as long before each after that
	refusals = 3                      // of one request, each with another authorization
	endIn    = 2 * time.Second        // what an upload that isn't wanted any more has to end
	cancelIn = 10 * time.Second       // what a registry may take to forget an upload

	octets       = "application/octet-stream"
	digestHeader = "Docker-Content-Digest" // of what a registry has got
)

// A StatusError is an answer of a registry that isn't what was asked for.
type StatusError struct {
	Ref, Doing string
	Host       string
	Code       int
	Status     string // as in "403 Forbidden"
	Detail     error  // what the registry says of it, or nil

	otherWay bool // whether there is another way to do it
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("%s: %s: %s answered %s", e.Ref, e.Doing, e.Host, e.Status)
	if e.Detail != nil {
		s += ": " + e.Detail.Error()
	}
	switch e.Code {
	case http.StatusUnauthorized, http.StatusForbidden:
		s += "; " + noRight(e.Host)
	case http.StatusRequestEntityTooLarge:
		s += fmt.Sprintf("; requests have up to %d bytes, and it, or a proxy in front of it, wants less: have it take more", chunkSize)
	}
	return s
}

func noRight(host string) string {
	return fmt.Sprintf("there is no right to write there: `docker login %s` with an account that has it, or name another destination", host)
}

// Transient reports whether an upload that has failed may succeed when it's made again.
func Transient(err error) bool {
	if s, ok := errors.AsType[*StatusError](err); ok {
		// A token may have expired on the way.
		return s.otherWay || s.Code >= 500 || s.Code == http.StatusTooManyRequests || s.Code == http.StatusRequestTimeout || s.Code == http.StatusUnauthorized && s.Doing == doingUpload
	}
	return errors.Is(err, errUpload) && brokenOff(err)
}

// brokenOff reports whether it's the network that has failed.
func brokenOff(err error) bool {
	if errors.Is(err, context.Canceled) {
		return false
	}
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
}

var errUpload = errors.New("the upload broke off")

const doingUpload = "upload a blob"

// pushHost is the registry itself: mirrors take nothing.
func (r *registry) pushHost() (docker.RegistryHost, error) {
	hosts, err := r.registryHosts()
	if err != nil {
		return docker.RegistryHost{}, fmt.Errorf("%s: %w", r, err)
	}
	for _, h := range hosts {
		if h.Capabilities.Has(docker.HostCapabilityPush) {
			return h, nil
		}
	}
	return docker.RegistryHost{}, fmt.Errorf("%s: no host of its registry takes pushes", r)
}

// endpoint is the URL of something in the repository.
func (r *registry) endpoint(host docker.RegistryHost, what string, query map[string]string) *url.URL {
	u := &url.URL{Scheme: host.Scheme, Host: host.Host, Path: path.Join("/", host.Path, r.path, what)}
	if strings.HasSuffix(what, "/") {
		u.Path += "/"
	}
	q := url.Values{}
	for k, v := range query {
		q.Set(k, v)
	}
	u.RawQuery = q.Encode()
	return u
}

// again makes a request as often as it takes, at the registry itself.
func (r *registry) again(ctx context.Context, method, what string, query map[string]string, mediaType string, body payload) (resp *http.Response, err error) {
	host, err := r.pushHost()
	if err != nil {
		return nil, err
	}
	header := http.Header{}
	if mediaType != "" {
		header.Set("Content-Type", mediaType)
	}
	for n, wait := 1, pause; ; n, wait = n+1, 2*wait {
		resp, err = r.authorized(ctx, host, method, r.endpoint(host, what, query), header, body)
		if n == attempts || context.Cause(ctx) != nil {
			return resp, err
		}
		if err == nil && resp.StatusCode < 500 && resp.StatusCode != http.StatusTooManyRequests {
			return resp, nil
		}
		if err != nil && !brokenOff(err) {
			return nil, err
		}
		if err == nil {
			drain(resp)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// A payload is the body of a request that can be made again. Nil is none.
type payload interface {
	io.ReaderAt
	Size() int64
}

// authorized makes a request until the registry doesn't refuse its authorization any more, if there is another one.
func (r *registry) authorized(ctx context.Context, host docker.RegistryHost, method string, u *url.URL, header http.Header, body payload) (*http.Response, error) {
	var refused []*http.Response
	for {
		resp, err := r.send(ctx, host, method, u, header, body)
		if err != nil || resp.StatusCode != http.StatusUnauthorized || host.Authorizer == nil || len(refused) == refusals || !isHost(host, u) {
			return resp, err
		}
		drain(resp)
		refused = append(refused, resp)
		ctx, err := r.scope(ctx)
		if err != nil {
			return nil, err
		}
		if err := host.Authorizer.AddResponses(ctx, refused); err != nil {
			// What the registry has said, and why there is nothing to add.
			return nil, r.failed(resp, withoutQuery(err), strings.ToLower(method)+" "+path.Base(path.Dir(u.Path)))
		}
	}
}

func (r *registry) scope(ctx context.Context) (context.Context, error) {
	return docker.ContextWithRepositoryScope(ctx, r.ref, true)
}

// send makes one request. Only the registry gets its headers and credentials; another host that uploads go to gets none.
func (r *registry) send(ctx context.Context, host docker.RegistryHost, method string, u *url.URL, header http.Header, body payload) (*http.Response, error) {
	if body == nil {
		return r.sendStream(ctx, host, method, u, header, nil, 0)
	}
	return r.sendStream(ctx, host, method, u, header, io.NewSectionReader(body, 0, body.Size()), body.Size())
}

// sendStream is send of so many bytes, -1 if nobody knows.
func (r *registry) sendStream(ctx context.Context, host docker.RegistryHost, method string, u *url.URL, header http.Header, body io.Reader, size int64) (*http.Response, error) {
	ctx, err := r.scope(ctx)
	if err != nil {
		return nil, err
	}
	if size == 0 {
		body = http.NoBody
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, withoutQuery(err))
	}
	req.ContentLength = size
	if again, ok := body.(*io.SectionReader); ok { // where it is sent on to
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(again, 0, size)), nil }
	}
	if isHost(host, u) {
		maps.Copy(req.Header, host.Header)
		if host.Authorizer != nil {
			if err := host.Authorizer.Authorize(ctx, req); err != nil {
				if err = fmt.Errorf("%s: authorize at %s: %w", r, host.Host, withoutQuery(err)); refused(err) {
					err = fmt.Errorf("%w; %s", err, noRight(host.Host))
				}
				return nil, err
			}
		}
	}
	maps.Copy(req.Header, header)
	client := host.Client
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, withoutQuery(err))
	}
	return resp, nil
}

func isHost(host docker.RegistryHost, u *url.URL) bool {
	return u.Host == host.Host && u.Scheme == host.Scheme
}

func (r *registry) failed(resp *http.Response, detail error, doing string) error {
	return &StatusError{Ref: r.String(), Doing: doing, Host: resp.Request.URL.Host, Code: resp.StatusCode, Status: resp.Status, Detail: detail}
}

// explain returns what the registry says of an error.
// https://github.com/opencontainers/distribution-spec/blob/main/spec.md#error-codes
func explain(resp *http.Response) error {
	var body struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&body) != nil {
		return nil
	}
	var said []string
	for _, e := range body.Errors {
		said = append(said, strings.TrimSpace(e.Code+" "+e.Message))
	}
	if said == nil {
		return nil
	}
	return errors.New(strings.Join(said, ", "))
}

// CheckPush implements Repository.
func (r *registry) CheckPush(ctx context.Context) error {
	if r.Tag() == "" {
		return fmt.Errorf("%s: an image's digest is known only when it is made; name the destination by a tag", r)
	}
	u, err := r.begin(ctx)
	if err != nil {
		return err
	}
	u.forget()
	return nil
}

// Create implements Repository.
func (r *registry) Create(ctx context.Context) (Upload, error) {
	u, err := r.begin(ctx)
	if err != nil {
		return nil, err
	}
	switch way(r.way.Load()) {
	case inChunks:
		return u.inChunks(), nil
	case atOnce:
		return u.atOnce()
	}
	return u.streamed(), nil
}

// begin starts an upload that nothing is sent to yet.
func (r *registry) begin(ctx context.Context) (*upload, error) {
	host, err := r.pushHost()
	if err != nil {
		return nil, err
	}
	// Who breaks this off doesn't learn which upload the registry has begun.
	post, stop := outlive(ctx)
	defer stop(nil)
	resp, err := r.again(post, http.MethodPost, "blobs/uploads/", nil, "", nil)
	if err != nil {
		return nil, err
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusAccepted {
		return nil, r.failed(resp, explain(resp), "begin an upload")
	}
	u, err := r.begun(ctx, host, resp)
	if err == nil && ctx.Err() != nil {
		u.forget()
		return nil, context.Cause(ctx)
	}
	return u, err
}

// outlive returns a context that ends a little later than another one.
func outlive(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	longer, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() { time.AfterFunc(endIn, func() { stop(context.Cause(ctx)) }) })
	return longer, stop
}

func (r *registry) begun(ctx context.Context, host docker.RegistryHost, resp *http.Response) (*upload, error) {
	u := &upload{of: r, ctx: ctx, host: host}
	if n, err := strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64); err == nil {
		u.least = n
	}
	// The host that answered: a client may have fallen back to plain HTTP.
	u.host.Scheme, u.host.Host = resp.Request.URL.Scheme, resp.Request.URL.Host
	return u, u.follow(resp)
}

// upload is a blob on its way to a registry, which has begun it.
// https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-blobs
type upload struct {
	of       *registry
	ctx      context.Context //nolint:containedctx // an io.Writer has no other way to get one
	host     docker.RegistryHost
	location *url.URL
	least    int64 // bytes that a chunk has, but for the last one
	ended    bool
}

// follow takes note of where the upload goes on.
func (u *upload) follow(resp *http.Response) error {
	next, err := resp.Location()
	if err != nil {
		return fmt.Errorf("%s: %s doesn't say where an upload goes on", u.of, u.host.Host)
	}
	u.location = next
	return nil
}

// complete makes a blob of what was sent, with the rest of it, unless that is nil.
func (u *upload) complete(ctx context.Context, dgst digest.Digest, size int64, rest payload) error {
	to := *u.location
	q := to.Query()
	q.Set("digest", dgst.String())
	to.RawQuery = q.Encode()
	resp, err := u.of.authorized(ctx, u.host, http.MethodPut, &to, http.Header{"Content-Type": {octets}}, rest)
	if err != nil {
		return fmt.Errorf("%w: %w", errUpload, err)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusNoContent {
		doing := "complete blob " + dgst.String()
		if rest != nil {
			doing = doingUpload
		}
		return u.of.failed(resp, explain(resp), doing)
	}
	u.ended = true
	return u.check(ctx, resp, dgst, size)
}

// check finds out whether the registry has what was sent, by its answer if that says so.
func (u *upload) check(ctx context.Context, resp *http.Response, dgst digest.Digest, size int64) error {
	if got := digest.Digest(resp.Header.Get(digestHeader)); got == dgst {
		return nil
	} else if got.Validate() == nil && got.Algorithm() == dgst.Algorithm() {
		return fmt.Errorf("%s: the registry keeps the blob %s as %s", u.of, dgst, got)
	}
	there, err := u.of.Has(ctx, ocispecs.Descriptor{Digest: dgst, Size: size})
	if err == nil && !there {
		err = fmt.Errorf("%s: the registry has taken the blob %s of %d bytes, and hasn't got it", u.of, dgst, size)
	}
	return err
}

// cancel gives up an upload that isn't complete, and to which nothing is being sent.
func (u *upload) cancel() {
	if !u.ended {
		u.ended = true
		u.forget()
	}
}

// forget has the registry drop the upload, also when the context has ended. What fails costs the registry room until it drops old
// uploads.
func (u *upload) forget() {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(u.ctx), cancelIn, errUpload)
	defer cancel()
	if resp, err := u.of.authorized(ctx, u.host, http.MethodDelete, u.location, nil, nil); err == nil {
		drain(resp)
	}
}

// withoutQuery hides the query of URLs in errors, which may hold a signature.
func withoutQuery(err error) error {
	failed, ok := errors.AsType[*url.Error](err)
	if !ok {
		return err
	}
	if u, perr := url.Parse(failed.URL); perr == nil {
		u.RawQuery = ""
		return &url.Error{Op: failed.Op, URL: u.Redacted(), Err: failed.Err}
	}
	return failed.Err
}

// drain lets the connection be used again, unless that means reading much.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
}
