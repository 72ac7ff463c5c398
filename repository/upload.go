package repository

import (
	"bytes"
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
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
)

const (
	attempts = 4                      // of a request that can be made again
	pause    = 500 * time.Millisecond // before the second one, twice as long before each after that
	refusals = 3                      // of one request, each with another authorization
	endIn    = 2 * time.Second        // what an upload that isn't wanted any more has to end
	cancelIn = 10 * time.Second       // what a registry may take to forget an upload
)

// A StatusError is an answer of a registry that isn't what was asked for.
type StatusError struct {
	Ref, Doing string
	Host       string
	Code       int
	Status     string // as in "403 Forbidden"
	Detail     error  // what the registry says of it, or nil
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("%s: %s: %s answered %s", e.Ref, e.Doing, e.Host, e.Status)
	if e.Detail != nil {
		s += ": " + e.Detail.Error()
	}
	if e.Code == http.StatusUnauthorized || e.Code == http.StatusForbidden {
		s += "; " + noRight(e.Host)
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
		return s.Code >= 500 || s.Code == http.StatusTooManyRequests || s.Code == http.StatusRequestTimeout || s.Code == http.StatusUnauthorized && s.Doing == doingUpload
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
func (r *registry) again(ctx context.Context, method, what string, query map[string]string, mediaType string, body []byte) (resp *http.Response, err error) {
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

// authorized makes a request until the registry doesn't refuse its authorization any more, if there is another one.
func (r *registry) authorized(ctx context.Context, host docker.RegistryHost, method string, u *url.URL, header http.Header, body []byte) (*http.Response, error) {
	var refused []*http.Response
	for {
		var payload io.Reader
		if body != nil {
			payload = bytes.NewReader(body)
		}
		resp, err := r.send(ctx, host, method, u, header, payload)
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
func (r *registry) send(ctx context.Context, host docker.RegistryHost, method string, u *url.URL, header http.Header, body io.Reader) (*http.Response, error) {
	ctx, err := r.scope(ctx)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, withoutQuery(err))
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
	pr, pw := io.Pipe()
	u.pipe, u.done = pw, make(chan struct{})
	// The request has a little time to come to its end when ctx has: a registry may still write what it got of one that was broken off
	// when it's told to forget it.
	patch, stop := outlive(ctx)
	u.stop = stop
	go func() {
		defer close(u.done)
		u.resp, u.err = r.send(patch, u.host, http.MethodPatch, u.location, http.Header{"Content-Type": {"application/octet-stream"}}, pr)
		if u.err == nil && u.resp.StatusCode/100 != 2 {
			u.err = r.failed(u.resp, explain(u.resp), doingUpload)
		}
		if u.err != nil {
			u.err = fmt.Errorf("%w: %w", errUpload, u.err)
		}
		pr.CloseWithError(u.err) // who writes learns why it isn't wanted any more
	}()
	return u, nil
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
	// The host that answered: a client may have fallen back to plain HTTP.
	u.host.Scheme, u.host.Host = resp.Request.URL.Scheme, resp.Request.URL.Host
	return u, u.follow(resp)
}

// upload is a blob on its way to a registry: POST, PATCH with all of its bytes, PUT with its digest.
// https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-a-blob-in-chunks
type upload struct {
	of       *registry
	ctx      context.Context //nolint:containedctx // an io.Writer has no other way to get one
	host     docker.RegistryHost
	location *url.URL

	pipe  *io.PipeWriter
	stop  context.CancelCauseFunc // of the PATCH
	done  chan struct{}           // closed when the PATCH has ended, with resp or err
	resp  *http.Response
	err   error
	ended bool
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

// Write implements io.Writer.
func (u *upload) Write(p []byte) (int, error) {
	if err := context.Cause(u.ctx); err != nil {
		return 0, err
	}
	n, err := u.pipe.Write(p)
	if err != nil && !u.ended {
		// A registry that answers early has closed the pipe before its answer is known.
		<-u.done
		if u.err != nil {
			err = u.err
		}
	}
	return n, err
}

// Commit implements Upload.
func (u *upload) Commit(ctx context.Context, dgst digest.Digest, _ int64) error {
	defer u.Cancel()
	u.pipe.Close()
	<-u.done
	if u.err != nil {
		return u.err
	}
	drain(u.resp)
	if err := u.follow(u.resp); err != nil {
		return err
	}
	to := *u.location
	q := to.Query()
	q.Set("digest", dgst.String())
	to.RawQuery = q.Encode()
	resp, err := u.of.authorized(ctx, u.host, http.MethodPut, &to, http.Header{"Content-Type": {"application/octet-stream"}}, nil)
	if err != nil {
		return fmt.Errorf("%w: %w", errUpload, err)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusNoContent {
		return u.of.failed(resp, explain(resp), "complete blob "+dgst.String())
	}
	u.ended = true
	return nil
}

// Cancel implements Upload.
func (u *upload) Cancel() {
	if u.ended {
		return
	}
	u.ended = true
	if u.pipe != nil {
		u.pipe.Close()
		hurry := time.AfterFunc(endIn, func() { u.stop(errUpload) })
		<-u.done
		hurry.Stop()
		if u.resp != nil {
			drain(u.resp)
			_ = u.follow(u.resp)
		}
	}
	u.forget()
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
