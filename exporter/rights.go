package exporter

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// refused says what to do about a registry that doesn't let the client write. BuildKit says what it was that the registry refused.
func refused(err error) error {
	s, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	// What is only read from its source is asked for by GET, what is pushed is looked for by HEAD.
	if !ok || s.RequestMethod == http.MethodGet || s.StatusCode != http.StatusUnauthorized && s.StatusCode != http.StatusForbidden {
		return err
	}
	registry := ""
	if u, perr := url.Parse(s.RequestURL); perr == nil && u.Host != "" {
		registry = " " + u.Host
	}
	return fmt.Errorf("%w; there is no right to write there: `docker login%s` with an account that has it, or name another destination", err, registry)
}
