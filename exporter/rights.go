package exporter

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// refused says what to do about a registry that doesn't let the client write. BuildKit says what it was that the registry refused, but where the
// registry gives a reason, as most do, that is all it says. The names are those of what was to be written, which commas separate.
func refused(err error, names string) error {
	hosts := hostsOf(names)
	if s, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		// What is only read from its source is asked for by GET, what is pushed is looked for by HEAD.
		if s.RequestMethod == http.MethodGet || s.StatusCode != http.StatusUnauthorized && s.StatusCode != http.StatusForbidden {
			return err
		}
		if u, perr := url.Parse(s.RequestURL); perr == nil && u.Host != "" {
			hosts = []string{u.Host}
		}
	} else if reasons, ok := errors.AsType[docker.Errors](err); !ok || !slices.ContainsFunc(reasons, isAboutRights) {
		return err
	}
	if len(hosts) == 0 {
		hosts = []string{"REGISTRY"}
	}
	return fmt.Errorf("%w; there is no right to write there: `docker login %s` with an account that has it, or name another destination", err, strings.Join(hosts, "` or `docker login "))
}

// isAboutRights reports whether a registry's reason is that it doesn't know who asks, or that they may not.
func isAboutRights(reason error) bool {
	code, ok := errors.AsType[docker.ErrorCode](reason)
	if e, detailed := errors.AsType[docker.Error](reason); detailed {
		code, ok = e.Code, true
	}
	return ok && (code == docker.ErrorCodeDenied || code == docker.ErrorCodeUnauthorized)
}

// hostsOf returns the registries that names lead to.
func hostsOf(names string) (hosts []string) {
	for _, r := range repositoriesOf(names) {
		if host, _, _ := strings.Cut(r, "/"); host != "" && !slices.Contains(hosts, host) {
			hosts = append(hosts, host)
		}
	}
	return hosts
}
