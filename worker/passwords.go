package worker

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
)

// keepPassword is how long a password is kept that nobody uses, as BuildKit keeps its own.
const keepPassword = 10 * time.Minute

// passwords are those that clients give away, which most don't: they make tokens. BuildKit forgets a password together with a token made
// with it that a registry refuses, for all it knows because the password is wrong; but tokens are refused before they expire
// by a registry that has a new key, say, and then the session which could be asked again may have ended.
type passwords struct {
	sessions *session.Manager
	lifetime context.Context //nolint:containedctx // of what sessions are asked
	end      context.CancelCauseFunc
	asking   sync.WaitGroup

	mu sync.Mutex
	of map[hostSession]*password
}

type hostSession struct{ host, session string }

// password is what the client of a session has for a host.
type password struct {
	user, secret string // empty until it's known, or if the client doesn't say
	used         time.Time

	mu   sync.Mutex
	by   docker.Authorizer // nil if it has to be made
	gave map[string]bool   // headers that it has given
}

// maxGave bounds what is remembered of an authorizer.
const maxGave = 256

// newPasswords returns none. The caller closes them.
func newPasswords(sessions *session.Manager) *passwords {
	p := &passwords{sessions: sessions, of: map[hostSession]*password{}}
	p.lifetime, p.end = context.WithCancelCause(context.Background())
	return p
}

// Close waits until no session is asked any more.
func (p *passwords) Close() error {
	p.mu.Lock()
	p.end(errors.New("the worker is closed"))
	p.mu.Unlock()
	p.asking.Wait()
	return nil
}

// learn asks a session for the password of a host, once, and without being waited for.
func (p *passwords) learn(host, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := hostSession{host, id}
	if known := p.of[key]; known != nil {
		known.used = time.Now()
		return
	}
	if p.lifetime.Err() != nil {
		return
	}
	p.forget()
	p.of[key] = &password{used: time.Now()}
	p.asking.Go(func() {
		user, secret := p.ask(host, id)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.of[key] = &password{user: user, secret: secret, used: time.Now()}
	})
}

// forget removes what nobody has used for long.
func (p *passwords) forget() {
	for key, old := range p.of {
		if time.Since(old.used) > keepPassword {
			delete(p.of, key)
		}
	}
}

// ask asks for a password as BuildKit does, of who doesn't make tokens.
func (p *passwords) ask(host, id string) (user, secret string) {
	of := session.NewGroup(id)
	if _, maker, err := auth.GetTokenAuthority(p.lifetime, host, p.sessions, of); err != nil || maker != nil {
		return "", ""
	}
	_, user, secret, err := auth.CredentialsFunc(p.lifetime, p.sessions, of)(host)
	if err != nil {
		return "", ""
	}
	return user, secret
}

// authorizer returns who authorizes with a password that one of the sessions had for a host, or nil.
func (p *passwords) authorizer(host docker.RegistryHost, sessions []string) docker.Authorizer {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range sessions {
		if known := p.of[hostSession{host.Host, id}]; known != nil && known.secret != "" {
			known.used = time.Now()
			return passwordAuthorizer{known, host.Client}
		}
	}
	return nil
}

type passwordAuthorizer struct {
	*password
	client *http.Client
}

// Authorize implements docker.Authorizer.
func (a passwordAuthorizer) Authorize(ctx context.Context, req *http.Request) error {
	a.mu.Lock()
	if a.by == nil || len(a.gave) >= maxGave {
		a.renew()
	}
	by := a.by
	a.mu.Unlock()
	err := by.Authorize(ctx, req)
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.by != by:
	case err != nil:
		a.by = nil // it would say the same again, without asking
	default:
		a.gave[req.Header.Get("Authorization")] = true
	}
	return err
}

// AddResponses implements docker.Authorizer. A token that is refused is replaced by another.
func (a passwordAuthorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	had := last.Request.Header.Get("Authorization")
	if had != "" && len(responses) > 2 {
		return errRefused
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.by == nil || had != "" && a.gave[had] {
		a.renew() // unless another read has seen to that
	}
	return a.by.AddResponses(ctx, []*http.Response{last})
}

// renew makes an authorizer that has no token.
func (a passwordAuthorizer) renew() {
	a.by = docker.NewDockerAuthorizer(docker.WithAuthClient(a.client), docker.WithAuthCreds(func(string) (string, string, error) {
		return a.user, a.secret, nil
	}))
	a.gave = map[string]bool{}
}

// learningAuthorizer has the password learned of sessions that live, when it turns out that a host wants one.
type learningAuthorizer struct {
	docker.Authorizer
	learn func()
}

// Authorize implements docker.Authorizer.
func (a learningAuthorizer) Authorize(ctx context.Context, req *http.Request) error {
	err := a.Authorizer.Authorize(ctx, req)
	if err == nil && req.Header.Get("Authorization") != "" {
		a.learn()
	}
	return err
}
