package blob

import (
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"
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
	if errors.Is(err, ErrNoRange) {
		return true
	}
	var se *statusError
	if !errors.As(err, &se) {
		return false
	}
	switch se.code {
	case http.StatusRequestTimeout, http.StatusTooManyRequests:
		return false
	}
	return se.code >= 400 && se.code < 500
}

// retryAfter parses the header's delay in seconds or its date (RFC 9110, section
// 10.2.3); 0 if there is none.
func retryAfter(h string) time.Duration {
	if h == "" {
		return 0
	}
	if s, err := strconv.Atoi(h); err == nil && s >= 0 {
		return time.Duration(s) * time.Second
	}
	if t, err := http.ParseTime(h); err == nil {
		return max(0, time.Until(t))
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
