package exporter

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/moby/buildkit/util/errutil"
)

// TestWhoRefusesIsNamed looks at what a user is told whom a registry doesn't let write, as BuildKit's exporters hand it on.
func TestWhoRefusesIsNamed(t *testing.T) {
	status := func(method string, code int, body string) error {
		err := remoteerrors.ErrUnexpectedStatus{
			Status: http.StatusText(code), StatusCode: code, Body: []byte(body),
			RequestMethod: method, RequestURL: "https://upload.example.com/v2/app/blobs/uploads/",
		}
		return fmt.Errorf("failed to push: %w", errutil.WithDetails(err))
	}
	reason := func(code, message string) string {
		return fmt.Sprintf(`{"errors":[{"code":%q,"message":%q}]}`, code, message)
	}
	const hint = "there is no right to write there: `docker login %s` with"
	for _, c := range []struct {
		name, names string
		err         error
		want        string // the registry to log in to; "" for no hint
	}{
		{"no reason", "registry.example.com/app:1", status(http.MethodPost, http.StatusForbidden, ""), "upload.example.com"},
		{"denied, in the specification's words", "registry.example.com/app:1", status(http.MethodPost, http.StatusForbidden, reason("DENIED", "requested access to the resource is denied")), "registry.example.com"},
		{"denied, in others", "registry.example.com/app:1", status(http.MethodPut, http.StatusForbidden, reason("DENIED", "permission_denied: write_package")), "registry.example.com"},
		{"unauthorized", "app:1,registry.example.com/app:1", status(http.MethodPost, http.StatusUnauthorized, reason("UNAUTHORIZED", "who are you?")), "docker.io` or `docker login registry.example.com"},
		{"a cache that has no name", "", status(http.MethodPost, http.StatusForbidden, reason("DENIED", "no")), "REGISTRY"},
		{"another reason", "registry.example.com/app:1", status(http.MethodPut, http.StatusBadRequest, reason("MANIFEST_INVALID", "no")), ""},
		{"of the source", "registry.example.com/app:1", status(http.MethodGet, http.StatusForbidden, ""), ""},
		{"another error", "registry.example.com/app:1", errors.New("no space left on device"), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := refused(c.err, c.names)
			if !errors.Is(err, c.err) {
				t.Errorf("%v isn't %v any more", err, c.err)
			}
			if c.want == "" {
				if err.Error() != c.err.Error() {
					t.Errorf("got %v, want no more than %v", err, c.err)
				}
			} else if want := fmt.Sprintf(hint, c.want); !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q in it", err, want)
			}
		})
	}
}
