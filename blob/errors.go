package blob

import (
	"crypto/tls"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// statusError is an answer of a host that isn't the range asked for.
type statusError struct {
	host   string
	status string
	code   int           // HTTP status, 0 if the answer was malformed
	after  time.Duration // Retry-After
}

func (e *statusError) Error() string { return e.host + " " + e.status }

// permanent reports whether asking the same host again is pointless.
func permanent(err error) bool {
	if errors.Is(err, ErrNoRange) || errors.Is(err, docker.ErrInvalidAuthorization) {
		return true
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	var code int
	if se, ok := errors.AsType[*statusError](err); ok {
		code = se.code
	} else if token, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		code = token.StatusCode
	} else {
		return false // no answer at all
	}
	switch code {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	}
	return code < 500
}

// pauseOf returns what a host has asked for by Retry-After, 0 if it hasn't.
func pauseOf(err error) time.Duration {
	if se, ok := errors.AsType[*statusError](err); ok {
		return se.after
	}
	return 0
}

// maxRetryAfter keeps absurd values from overflowing; no read waits that long.
const maxRetryAfter = 24 * time.Hour

// retryAfter parses the header's delay in seconds or its date (RFC 9110, section
// 10.2.3); 0 if there is none.
func retryAfter(h string) time.Duration {
	if h == "" {
		return 0
	}
	if s, err := strconv.ParseUint(h, 10, 64); err == nil {
		return time.Duration(min(s, uint64(maxRetryAfter/time.Second))) * time.Second
	}
	if t, err := http.ParseTime(h); err == nil {
		return min(max(0, time.Until(t)), maxRetryAfter)
	}
	return 0
}

// hideQuery takes the query out of a URL in an error: signed URLs carry
// credentials there.
func hideQuery(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	u, perr := url.Parse(ue.URL)
	if perr != nil {
		return ue.Err
	}
	u.RawQuery = ""
	return &url.Error{Op: ue.Op, URL: u.Redacted(), Err: ue.Err}
}
