package worker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/moby/buildkit/session"
)

// Layers are read when the builds that had credentials for them have ended: in the background. BuildKit keeps of a session what it has been
// given, a user name with its password, from which it makes tokens by itself (see passwords), or a token until that expires, since most clients
// make tokens only themselves, also those of nobody. Then it waits for each session that has ended, for 5 s, while all that has to do with the
// repository waits for it, FROM in the next build too; and fails, which for an image that everybody may read needn't be.

// sessionPatience is how long sessions that have ended are waited for, once.
const sessionPatience = 5 * time.Second

// maxEnded bounds what is remembered of sessions.
const maxEnded = 4096

// errRefused wraps what makes package blob give up at once.
var errRefused = fmt.Errorf("the builds that had credentials have ended, and who has none is refused: %w", docker.ErrInvalidAuthorization)

// left is what is left of the credentials of sessions that have ended.
type left int8

const (
	kept    left = iota // what BuildKit has kept
	none                // nothing: nobody's will have to do
	refused             // nobody's don't do
)

// endedSessions remembers what is left, by host, repository and sessions: what one repository refuses, another one of the same host may give to everybody.
type endedSessions struct {
	patience time.Duration

	mu sync.Mutex
	of map[string]left
}

func newEndedSessions() *endedSessions {
	return &endedSessions{patience: sessionPatience, of: map[string]left{}}
}

func (e *endedSessions) left(key string) left {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.of[key]
}

func (e *endedSessions) set(key string, l left) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.of) >= maxEnded {
		clear(e.of) // it is found out again
	}
	e.of[key] = l
}

// authorizer returns who authorizes for sessions that have ended, at a host, for a repository: with their credentials, as long as BuildKit has some
// of them, and then with nobody's.
func (e *endedSessions) authorizer(host, repository string, sessions []string, theirs, nobodys docker.Authorizer) docker.Authorizer {
	return &endedAuthorizer{e, strings.Join(append([]string{host, repository}, sessions...), " "), theirs, nobodys}
}

// alive returns those of the sessions that haven't ended.
func alive(sm *session.Manager, sessions []string) (those []string) {
	for _, id := range sessions {
		if c, err := sm.Get(context.Background(), id, true); err == nil && c != nil {
			those = append(those, id)
		}
	}
	return those
}

type endedAuthorizer struct {
	ended           *endedSessions
	key             string
	theirs, nobodys docker.Authorizer
}

// Authorize implements docker.Authorizer.
func (a *endedAuthorizer) Authorize(ctx context.Context, req *http.Request) error {
	switch a.ended.left(a.key) {
	case refused:
		return errRefused
	case kept:
		over, err := a.try(ctx, func(ctx context.Context) error { return a.theirs.Authorize(ctx, req) })
		if !over {
			return err
		}
	}
	err := a.nobodys.Authorize(ctx, req)
	if denied(err) {
		return a.refuse()
	}
	return err
}

// denied reports whether no token is to be had.
func denied(err error) bool {
	answer, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	return errors.Is(err, errRefused) || ok && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden)
}

// AddResponses implements docker.Authorizer.
func (a *endedAuthorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	if a.ended.left(a.key) == kept {
		over, err := a.try(ctx, func(ctx context.Context) error { return a.theirs.AddResponses(ctx, responses) })
		if !over {
			return err
		}
		responses = responses[len(responses)-1:] // what it was refused before wasn't nobody's
	}
	err := a.nobodys.AddResponses(ctx, responses)
	if context.Cause(ctx) != nil {
		return context.Cause(ctx)
	}
	if err != nil || len(responses) > 2 { // of which two were to nobody
		return a.refuse()
	}
	return nil
}

// refuse has nobody asked any more for what nobody gets.
func (a *endedAuthorizer) refuse() error {
	a.ended.set(a.key, refused)
	return errRefused
}

// try asks for what needs a session, unless BuildKit has kept enough. It reports whether there is nothing left of the sessions.
func (a *endedAuthorizer) try(ctx context.Context, ask func(context.Context) error) (over bool, err error) {
	limited, cancel := context.WithTimeoutCause(ctx, a.ended.patience, session.ErrNoActiveSessions)
	defer cancel()
	err = ask(limited)
	if context.Cause(ctx) != nil {
		return false, context.Cause(ctx)
	}
	// It is not always an error that a session was waited for in vain.
	over = context.Cause(limited) != nil || errors.Is(err, session.ErrNoActiveSessions) || errors.Is(err, context.DeadlineExceeded) || denied(err)
	if over {
		a.ended.set(a.key, none)
	}
	return over, err
}
