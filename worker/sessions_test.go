package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/session/testutil"
	"github.com/moby/buildkit/util/resolver"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
)

// tokenRegistry serves one blob to those who have its newest token. Ann gets one with her password, and others if it's public.
type tokenRegistry struct {
	*httptest.Server
	blob     []byte
	public   bool
	open     string       // a repository that is public, if the others aren't
	life     int          // of tokens, in seconds
	epoch    atomic.Int64 // tokens of an earlier one have expired
	requests atomic.Int64
}

func newTokenRegistry(t *testing.T, public bool, life int) *tokenRegistry {
	t.Helper()
	r := &tokenRegistry{blob: []byte(strings.Repeat("0123456789", 100)), public: public, life: life}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func (r *tokenRegistry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.requests.Add(1)
	if req.URL.Path == "/token" {
		if req.Method != http.MethodGet {
			http.NotFound(w, req)
			return
		}
		user, password, _ := req.BasicAuth()
		if user == "" && !r.public && req.FormValue("scope") != "repository:"+r.open+":pull" || user != "" && (user != "ann" || password != "hunter2") {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"token": r.token(), "expires_in": r.life})
		return
	}
	if req.Header.Get("Authorization") != "Bearer "+r.token() {
		repository, _, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v2/"), "/blobs/")
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test",scope="repository:%s:pull"`, r.URL, repository))
		http.Error(w, "no", http.StatusUnauthorized)
		return
	}
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(r.blob))
}

func (r *tokenRegistry) token() string { return fmt.Sprintf("t0ken-%d", r.epoch.Load()) }

// credentials are what a client answers who asks its session: tokens, of itself, or a password, as older ones do.
type credentials struct {
	auth.UnimplementedAuthServer
	reg       *tokenRegistry
	passwords bool
}

func (c *credentials) Register(s *grpc.Server) { auth.RegisterAuthServer(s, c) }

func (c *credentials) GetTokenAuthority(context.Context, *auth.GetTokenAuthorityRequest) (*auth.GetTokenAuthorityResponse, error) {
	if c.passwords {
		return nil, status.Error(codes.Unavailable, "client side tokens disabled")
	}
	return &auth.GetTokenAuthorityResponse{PublicKey: make([]byte, 32)}, nil
}

func (c *credentials) FetchToken(context.Context, *auth.FetchTokenRequest) (*auth.FetchTokenResponse, error) {
	return &auth.FetchTokenResponse{Token: c.reg.token(), ExpiresIn: int64(c.reg.life)}, nil
}

func (c *credentials) Credentials(context.Context, *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	return &auth.CredentialsResponse{Username: "ann", Secret: "hunter2"}, nil
}

// openSession opens a client's session, and returns its name and how to end it.
func openSession(t *testing.T, sm *session.Manager, c *credentials) (id string, end func()) {
	t.Helper()
	s, err := session.NewSession(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	s.Allow(c)
	served, hangUp := context.WithCancelCause(t.Context())
	dial := testutil.TestStream(func(_ context.Context, conn net.Conn, meta map[string][]string) error {
		return sm.HandleConn(served, conn, meta)
	})
	var run sync.WaitGroup
	run.Go(func() {
		if err := s.Run(t.Context(), session.Dialer(dial)); err != nil {
			t.Error(err)
		}
	})
	if _, err := sm.Get(t.Context(), s.ID(), false); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		hangUp(errors.New("the client has gone"))
		s.Close()
		run.Wait()
		for len(alive(sm, []string{s.ID()})) > 0 {
			time.Sleep(time.Millisecond)
		}
	})
	t.Cleanup(end)
	return s.ID(), end
}

// A layer is read on when the session that brought credentials has ended and its token has expired, by who has a password, and by everybody
// if everybody may read it.
func TestReadsOutliveTheSession(t *testing.T) {
	for name, c := range map[string]struct {
		public, passwords bool
		refused           bool // before the token expires
		live, fails       bool
	}{
		"a password, and a token that is refused":     {passwords: true, refused: true},
		"a public image, and a token that is refused": {public: true, refused: true},
		"a token that is refused":                     {refused: true, fails: true},
		"a session that lives":                        {live: true},
		"a password":                                  {passwords: true},
		"a public image":                              {public: true},
		"a public image, and a password":              {public: true, passwords: true},
		"a private image":                             {fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			life := 2 // of which clients trust 90 %, in whole seconds
			if c.refused {
				life = 300
			}
			reg := newTokenRegistry(t, c.public, life)
			sm, err := session.NewManager()
			if err != nil {
				t.Fatal(err)
			}
			id, end := openSession(t, sm, &credentials{reg: reg, passwords: c.passwords})
			host := strings.TrimPrefix(reg.URL, "http://")
			ref, err := reference.Parse(host + "/team/image:v1")
			if err != nil {
				t.Fatal(err)
			}
			kept := newPasswords(sm)
			t.Cleanup(func() { kept.Close() })
			hosts := readHosts(Options{Config: &bkconfig.Config{}, SessionManager: sm}, resolver.NewRegistryConfig(nil), kept)
			b := blob.New(ref, digest.FromBytes(reg.blob), int64(len(reg.blob)),
				func() ([]docker.RegistryHost, error) { return hosts(ref, []string{"another", id}) }, blob.Options{RetryFor: 20 * time.Second})
			read := func() error {
				body, err := b.Fetch(t.Context(), 10, 10)
				if err != nil {
					return err
				}
				defer body.Close()
				if got, err := io.ReadAll(body); err != nil || string(got) != "0123456789" {
					return fmt.Errorf("read %q, %w", got, err)
				}
				return nil
			}
			if err := read(); err != nil {
				t.Fatal(err)
			}
			if !c.live {
				kept.asking.Wait()
				end()
				if err := read(); err != nil {
					t.Fatalf("with a token that is good: %v", err)
				}
			}
			if !c.refused {
				time.Sleep(1200 * time.Millisecond)
			}
			reg.epoch.Add(1)
			start := time.Now()
			err = read()
			if took := time.Since(start); took > sessionPatience+5*time.Second || c.live && took > sessionPatience/2 {
				t.Errorf("took %s", took)
			}
			if !c.fails {
				if err != nil {
					t.Fatalf("with a token that has expired: %v", err)
				}
			} else if err == nil || !strings.Contains(err.Error(), "the builds that had credentials have ended") || !errors.Is(err, docker.ErrInvalidAuthorization) {
				t.Fatalf("with a token that has expired: %v", err)
			}

			// Nobody waits a second time, nor asks for what is refused.
			reg.epoch.Add(1)
			requests := reg.requests.Load()
			time.Sleep(1200 * time.Millisecond)
			start = time.Now()
			if err := read(); (err != nil) != c.fails {
				t.Errorf("the next time: %v", err)
			}
			if took := time.Since(start); took > sessionPatience/2 {
				t.Errorf("the next time took %s", took)
			}
			if n := reg.requests.Load() - requests; c.fails && n > 0 {
				t.Errorf("%d requests for what is refused", n)
			}
		})
	}
}

// What a private image refuses to those who have no credentials any more, a public one of the same host doesn't.
func TestRefusalIsOfOneRepository(t *testing.T) {
	t.Parallel()
	reg := newTokenRegistry(t, false, 300)
	reg.open = "team/public"
	sm, err := session.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	id, end := openSession(t, sm, &credentials{reg: reg})
	kept := newPasswords(sm)
	t.Cleanup(func() { kept.Close() })
	hosts := readHosts(Options{Config: &bkconfig.Config{}, SessionManager: sm}, resolver.NewRegistryConfig(nil), kept)
	read := func(repository string) error {
		ref, err := reference.Parse(strings.TrimPrefix(reg.URL, "http://") + "/" + repository + ":v1")
		if err != nil {
			return err
		}
		b := blob.New(ref, digest.FromBytes(reg.blob), int64(len(reg.blob)),
			func() ([]docker.RegistryHost, error) { return hosts(ref, []string{id}) }, blob.Options{RetryFor: 20 * time.Second})
		body, err := b.Fetch(t.Context(), 10, 10)
		if err != nil {
			return err
		}
		defer body.Close()
		_, err = io.ReadAll(body)
		return err
	}
	for _, repository := range []string{"team/private", "team/public"} {
		if err := read(repository); err != nil {
			t.Fatal(err)
		}
	}
	kept.asking.Wait()
	end()
	reg.epoch.Add(1)
	if err := read("team/private"); !errors.Is(err, errRefused) {
		t.Errorf("of the private image: %v", err)
	}
	if err := read("team/public"); err != nil {
		t.Errorf("of the public image: %v", err)
	}
}

// A password that isn't good any more leaves what nobody's credentials allow.
func TestPasswordThatIsRefused(t *testing.T) {
	for name, public := range map[string]bool{"a public image": true, "a private image": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newTokenRegistry(t, public, 300)
			host := docker.RegistryHost{Host: strings.TrimPrefix(reg.URL, "http://"), Scheme: "http", Path: "/v2", Client: reg.Client()}
			kept := newPasswords(nil)
			kept.of[hostSession{host.Host, "s"}] = &password{user: "ann", secret: "changed", used: time.Now()}
			if kept.authorizer(host, []string{"another"}) != nil {
				t.Error("another session has it too")
			}
			ended := newEndedSessions()
			ref, err := reference.Parse(host.Host + "/team/image:v1")
			if err != nil {
				t.Fatal(err)
			}
			b := blob.New(ref, digest.FromBytes(reg.blob), int64(len(reg.blob)), func() ([]docker.RegistryHost, error) {
				h := host
				nobodys := docker.NewDockerAuthorizer(docker.WithAuthClient(h.Client))
				h.Authorizer = ended.authorizer(h.Host, ref.Locator, []string{"s"}, kept.authorizer(h, []string{"s"}), nobodys)
				return []docker.RegistryHost{h}, nil
			}, blob.Options{RetryFor: 20 * time.Second})
			body, err := b.Fetch(t.Context(), 10, 10)
			if err == nil {
				body.Close()
			}
			if (err == nil) != public || !public && !errors.Is(err, errRefused) {
				t.Errorf("read: %v", err)
			}
		})
	}
}

// Passwords that nobody has used for long are forgotten.
func TestPasswordsAreForgotten(t *testing.T) {
	kept := newPasswords(nil)
	kept.of[hostSession{"a", "s"}] = &password{used: time.Now().Add(-2 * keepPassword)}
	kept.of[hostSession{"b", "s"}] = &password{used: time.Now()}
	kept.forget()
	if _, ok := kept.of[hostSession{"b", "s"}]; !ok || len(kept.of) != 1 {
		t.Errorf("%v are kept", kept.of)
	}
	if err := kept.Close(); err != nil {
		t.Error(err)
	}
	if kept.learn("c", "s"); len(kept.of) != 1 {
		t.Error("who is closed asks")
	}
}

// What is remembered of sessions is bounded.
func TestEndedSessionsAreBounded(t *testing.T) {
	e := newEndedSessions()
	for i := range 3 * maxEnded {
		e.set(fmt.Sprint(i), none)
	}
	if n := len(e.of); n > maxEnded {
		t.Errorf("%d are remembered", n)
	}
	if e.left(fmt.Sprint(3*maxEnded-1)) != none {
		t.Error("the last is forgotten")
	}
}
