package blob

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// authorizer counts what it is asked for, and knows a password.
type authorizer struct {
	authorized, challenged atomic.Int64
	secret                 atomic.Value // string; "" before a challenge
}

func (a *authorizer) Authorize(_ context.Context, req *http.Request) error {
	a.authorized.Add(1)
	if s, _ := a.secret.Load().(string); s != "" {
		req.Header.Set("Authorization", s)
	}
	return nil
}

func (a *authorizer) AddResponses(context.Context, []*http.Response) error {
	a.challenged.Add(1)
	a.secret.Store("Basic c2VjcmV0")
	return nil
}

// demand answers 401 to those who don't bring the secret.
func demand(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Authorization") != "Basic c2VjcmV0" {
			status(http.StatusUnauthorized)(w, req)
			return
		}
		next(w, req)
	}
}

func TestChallengeOnce(t *testing.T) {
	blob := randomBlob(1000)
	reg := newRegistry(t, blob)
	reg.Config.Handler = demand(reg.serve)
	var auth authorizer
	host := reg.host(t)
	host.Authorizer = &auth
	r := open(t, blob, quick, fixed(host))
	want(t, r, blob, 0, 10)
	want(t, r, blob, 10, 10)
	if a, c := auth.authorized.Load(), auth.challenged.Load(); a != 3 || c != 1 {
		t.Errorf("authorized %d times, challenged %d times", a, c)
	}
}

// Wrong credentials are a reason to stop, not to try for a minute.
func TestWrongCredentials(t *testing.T) {
	blob := randomBlob(1000)
	reg := newRegistry(t, blob)
	reg.Config.Handler = http.HandlerFunc(status(http.StatusUnauthorized))
	var auth authorizer
	host := reg.host(t)
	host.Authorizer = &auth
	contains(t, fails(t, open(t, blob, patient, fixed(host)), 0, 10), "401 Unauthorized")
	if c := auth.challenged.Load(); c != maxRefusals {
		t.Errorf("challenged %d times", c)
	}
}

// tokenServer is a registry whose tokens come from a server of its own, for user
// "ann" with password "hunter2".
func tokenServer(t *testing.T, reg *registry) *httptest.Server {
	t.Helper()
	auth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		user, password, _ := req.BasicAuth()
		if req.Method == http.MethodPost {
			http.NotFound(w, req) // as older registries answer to OAuth
			return
		}
		if user != "ann" || password != "hunter2" || req.FormValue("scope") != "repository:team/image:pull" {
			status(http.StatusUnauthorized)(w, req)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"token": "t0ken"})
	}))
	t.Cleanup(auth.Close)
	reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Authorization") != "Bearer t0ken" {
			status(http.StatusUnauthorized, "WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="test",scope="repository:team/image:pull"`, auth.URL))(w, req)
			return
		}
		reg.ServeHTTP(w, req)
	})
	return auth
}

func TestTokenAuthentication(t *testing.T) {
	blob := randomBlob(1000)
	for _, password := range []string{"hunter2", "wrong"} {
		reg := newRegistry(t, blob)
		tokenServer(t, reg)
		host := reg.host(t)
		host.Authorizer = docker.NewDockerAuthorizer(docker.WithAuthCreds(func(string) (string, string, error) { return "ann", password, nil }))
		r := open(t, blob, patient, fixed(host))
		if password == "hunter2" {
			want(t, r, blob, 0, 10)
			want(t, r, blob, 10, 10)
			continue
		}
		err := fails(t, r, 0, 10)
		contains(t, err, reg.host(t).Host, "authorize", "401")
		if strings.Contains(err.Error(), password) {
			t.Errorf("password in %q", err)
		}
	}
}

// store is an object store which takes only its newest signature.
type store struct {
	*registry
	signature atomic.Int64
}

func newStore(t *testing.T, blob []byte) *store {
	s := &store{registry: newRegistry(t, blob)}
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.FormValue("X-Signature") != fmt.Sprintf("s3cret-%d", s.signature.Load()) {
			s.mu.Lock()
			s.seen = append(s.seen, seen{authorization: req.Header.Get("Authorization"), custom: "expired"})
			s.mu.Unlock()
			status(http.StatusForbidden)(w, req)
			return
		}
		s.registry.ServeHTTP(w, req)
	})
	return s
}

func (s *store) redirect(w http.ResponseWriter, req *http.Request) {
	http.Redirect(w, req, fmt.Sprintf("%s/bucket/data?X-Signature=s3cret-%d", s.URL, s.signature.Load()), http.StatusTemporaryRedirect)
}

func TestRedirect(t *testing.T) {
	blob := randomBlob(1000)
	st := newStore(t, blob)
	reg := newRegistry(t, blob)
	asked := 0
	reg.Config.Handler = demand(func(w http.ResponseWriter, req *http.Request) {
		asked++
		st.redirect(w, req)
	})
	host := reg.host(t)
	host.Authorizer = &authorizer{}
	host.Header = http.Header{"X-Test": {"for the registry only"}}
	r := open(t, blob, quick, fixed(host))

	want(t, r, blob, 0, 10)
	want(t, r, blob, 10, 10)
	if asked != 1 {
		t.Errorf("registry redirected %d times: where to isn't remembered", asked)
	}
	st.signature.Add(1) // the URL expires
	want(t, r, blob, 20, 10)
	if asked != 2 {
		t.Errorf("registry redirected %d times, want a new one for the expired URL", asked)
	}
	if n := len(st.requests()); n != 4 {
		t.Errorf("%d requests to the store", n)
	}
	for _, q := range st.requests() {
		if q.authorization != "" || q.custom == "for the registry only" {
			t.Errorf("the store got the registry's Authorization %q, header %q", q.authorization, q.custom)
		}
	}
}

// A store that is remembered and has other bytes now, or ignores ranges, is no reason to fail as long as the registry knows a better one.
func TestRememberedRedirectIsForgotten(t *testing.T) {
	blob := randomBlob(1000)
	for name, answer := range map[string]http.HandlerFunc{
		"other offset": status(http.StatusPartialContent, "Content-Range", "bytes 0-9/1000"),
		"other blob":   status(http.StatusPartialContent, "Content-Range", "bytes 100-109/999"),
		"no range":     status(http.StatusOK),
		"gone":         status(http.StatusNotFound),
	} {
		t.Run(name, func(t *testing.T) {
			first, second := newStore(t, blob), newStore(t, blob)
			now := first
			reg := newRegistry(t, blob)
			reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { now.redirect(w, req) })
			r := open(t, blob, quick, fixed(reg.host(t)))
			want(t, r, blob, 0, 10)
			first.script, now = []http.HandlerFunc{answer}, second
			want(t, r, blob, 100, 10)
			if got := first.ranges() + ", " + second.ranges(); got != "0-9 100-109, 100-109" {
				t.Errorf("the stores were asked for %s", got)
			}
			// If the registry knows none, it's an error that says so.
			second.script = []http.HandlerFunc{answer, answer}
			contains(t, fails(t, r, 100, 10), strings.TrimPrefix(second.URL, "http://"))
		})
	}
}

// A redirect within the registry keeps its credentials, as for any HTTP client.
func TestRedirectWithinRegistry(t *testing.T) {
	blob := randomBlob(1000)
	reg := newRegistry(t, blob)
	reg.Config.Handler = demand(func(w http.ResponseWriter, req *http.Request) {
		if strings.HasPrefix(req.URL.Path, "/v2/") {
			http.Redirect(w, req, "/storage/blob", http.StatusFound)
			return
		}
		reg.ServeHTTP(w, req)
	})
	host := reg.host(t)
	host.Authorizer = &authorizer{}
	r := open(t, blob, quick, fixed(host))
	want(t, r, blob, 0, 10)
	want(t, r, blob, 10, 10)
	if got := reg.ranges(); got != "0-9 10-19" {
		t.Errorf("ranges %q", got)
	}
}

func TestRedirectLoop(t *testing.T) {
	reg := newRegistry(t, nil)
	n := 0
	reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n++
		http.Redirect(w, req, "/again", http.StatusFound)
	})
	contains(t, fails(t, open(t, nil, patient, fixed(reg.host(t))), 0, 1), reg.host(t).Host, "redirected more than")
	if n != maxRedirects {
		t.Errorf("%d requests", n)
	}
}

// failing is a transport that fails as http.Client's and proxies' do.
type failing struct{ err error }

func (f failing) RoundTrip(req *http.Request) (*http.Response, error) {
	return nil, &url.Error{Op: "Get", URL: req.URL.String(), Err: f.err}
}

func TestErrorsHideSecrets(t *testing.T) {
	blob := randomBlob(1000)
	secret := func(t *testing.T, err error) {
		t.Helper()
		for _, s := range []string{"s3cret", "X-Signature", "hunter2", "Authorization", "c2VjcmV0"} {
			if strings.Contains(err.Error(), s) {
				t.Errorf("%q in %q", s, err)
			}
		}
	}
	t.Run("store refuses", func(t *testing.T) {
		st, reg := newStore(t, blob), newRegistry(t, blob)
		reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			st.redirect(w, req)
		})
		st.Config.Handler = http.HandlerFunc(status(http.StatusForbidden))
		err := fails(t, open(t, blob, quick, fixed(reg.host(t))), 0, 1)
		contains(t, err, "403 Forbidden", strings.TrimPrefix(st.URL, "http://"))
		secret(t, err)
	})
	t.Run("store is gone", func(t *testing.T) {
		st, reg := newStore(t, blob), newRegistry(t, blob)
		reg.Config.Handler = http.HandlerFunc(st.redirect)
		st.Close()
		secret(t, fails(t, open(t, blob, quick, fixed(reg.host(t))), 0, 1))
	})
	t.Run("store is silent", func(t *testing.T) {
		st, reg := newStore(t, blob), newRegistry(t, blob)
		reg.Config.Handler = http.HandlerFunc(st.redirect)
		st.Config.Handler = http.HandlerFunc(silent)
		secret(t, fails(t, open(t, blob, quick, fixed(reg.host(t))), 0, 1))
	})
	t.Run("location can't be parsed", func(t *testing.T) {
		reg := newRegistry(t, blob, func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Location"] = []string{"http://store.test:bad port/?X-Signature=s3cret"}
			w.WriteHeader(http.StatusTemporaryRedirect)
		})
		secret(t, fails(t, open(t, blob, quick, fixed(reg.host(t))), 0, 1))
	})
	t.Run("location can't be used", func(t *testing.T) {
		reg := newRegistry(t, blob)
		reg.Config.Handler = http.HandlerFunc(status(http.StatusTemporaryRedirect, "Location", "gopher://ann:hunter2@store.test/?X-Signature=s3cret"))
		secret(t, fails(t, open(t, blob, quick, fixed(reg.host(t))), 0, 1))
	})
	t.Run("transport names its URL", func(t *testing.T) {
		host := docker.RegistryHost{
			Client: &http.Client{Transport: failing{errors.New("broken pipe")}},
			Scheme: "https", Host: "registry.test", Path: "/v2?X-Signature=s3cret",
		}
		err := fails(t, open(t, blob, quick, fixed(host)), 0, 1)
		contains(t, err, "broken pipe")
		err = hideQuery(fmt.Errorf("wrapped: %w", &url.Error{Op: "Get", URL: "https://ann:hunter2@store.test/x?X-Signature=s3cret", Err: errors.New("broken pipe")}))
		contains(t, err, "broken pipe", "store.test/x")
		secret(t, err)
		secret(t, hideQuery(&url.Error{Op: "parse", URL: "https://[s3cret", Err: errors.New("missing ]")}))
	})
}

// A certificate doesn't get better by asking again.
func TestUntrustedCertificate(t *testing.T) {
	blob := randomBlob(1000)
	srv := &registry{blob: blob}
	srv.Server = httptest.NewTLSServer(srv)
	defer srv.Close()
	host := srv.host(t)
	want(t, open(t, blob, quick, fixed(host)), blob, 0, 10)
	host.Client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}}
	err := fails(t, open(t, blob, Options{}, fixed(host)), 0, 10)
	contains(t, err, host.Host, "certificate")
}

// Bytes that were corrupt are asked for elsewhere: at the hosts that haven't sent them, or where the registry says now.
func TestRefetchGoesElsewhere(t *testing.T) {
	blob := randomBlob(1000)
	source := func(body io.ReadCloser, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		src, ok := body.(interface{ Source() string })
		if !ok {
			t.Fatalf("a body doesn't say who sends it")
		}
		return src.Source()
	}
	empty, corrupt, origin := newRegistry(t, blob, status(http.StatusNotFound), status(http.StatusNotFound)), newRegistry(t, blob), newRegistry(t, blob)
	r := open(t, blob, quick, fixed(empty.host(t), corrupt.host(t), origin.host(t)))
	from := source(r.Fetch(t.Context(), 5, 10))
	if from != corrupt.host(t).Host {
		t.Fatalf("%s answered first, want %s", from, corrupt.host(t).Host)
	}
	if from = source(r.Refetch(t.Context(), 5, 10, from)); from != origin.host(t).Host {
		t.Errorf("%s answered to Refetch, want %s", from, origin.host(t).Host)
	}
	// Without the others it's asked again.
	r.SetHosts(fixed(corrupt.host(t), empty.host(t)))
	empty.script = []http.HandlerFunc{status(http.StatusNotFound)}
	if from = source(r.Refetch(t.Context(), 5, 10, corrupt.host(t).Host)); from != corrupt.host(t).Host {
		t.Errorf("%s answered to Refetch, want %s", from, corrupt.host(t).Host)
	}
	// Nobody is to blame for what was kept.
	r.SetHosts(fixed(corrupt.host(t), origin.host(t)))
	if from = source(r.Refetch(t.Context(), 5, 10, "")); from != corrupt.host(t).Host {
		t.Errorf("%s answered to Refetch, want %s", from, corrupt.host(t).Host)
	}

	st, reg := newStore(t, blob), newRegistry(t, blob)
	asked := 0
	reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		asked++
		st.redirect(w, req)
	})
	r = open(t, blob, quick, fixed(reg.host(t)))
	want(t, r, blob, 0, 10)
	body, err := r.Refetch(t.Context(), 0, 10, reg.host(t).Host)
	if err != nil {
		t.Fatal(err)
	}
	body.Close()
	if asked != 2 {
		t.Errorf("the registry was asked %d times", asked)
	}
}

// A token that expires in a layer's life is replaced, whether the registry says that it was the token or not.
func TestExpiredTokenIsReplaced(t *testing.T) {
	for _, says := range []string{`,error="invalid_token"`, ""} {
		blob := randomBlob(1000)
		reg := newRegistry(t, blob)
		var token, fetched atomic.Int64
		auth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodPost {
				http.NotFound(w, req)
				return
			}
			fetched.Add(1)
			_ = json.NewEncoder(w).Encode(map[string]any{"token": fmt.Sprintf("t0ken-%d", token.Load())})
		}))
		t.Cleanup(auth.Close)
		reg.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			switch req.Header.Get("Authorization") {
			case fmt.Sprintf("Bearer t0ken-%d", token.Load()):
				reg.ServeHTTP(w, req)
			case "":
				status(http.StatusUnauthorized, "WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="test",scope="repository:team/image:pull"`, auth.URL))(w, req)
			default:
				status(http.StatusUnauthorized, "WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="test",scope="repository:team/image:pull"%s`, auth.URL, says))(w, req)
			}
		})
		host := reg.host(t)
		host.Authorizer = docker.NewDockerAuthorizer(docker.WithAuthCreds(func(string) (string, string, error) { return "ann", "hunter2", nil }))
		r := open(t, blob, patient, fixed(host))
		for range 4 {
			want(t, r, blob, 0, 10)
			want(t, r, blob, 10, 10)
			token.Add(1)
		}
		if n := fetched.Load(); n != 4 {
			t.Errorf("%d tokens fetched", n)
		}
	}
}
