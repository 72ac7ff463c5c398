package registry

import (
	"io"
	"net/http"
	"strings"
	"sync"
)

// signalPath is where signals are.
const signalPath = "/lab/"

// signals are what steps tell tests.
type signals struct {
	mu sync.Mutex
	by map[string]func(*http.Request) string // name
}

func (s *signals) add(name string, f func(*http.Request) string) (path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by == nil {
		s.by = map[string]func(*http.Request) string{}
	}
	s.by[name] = f
	return signalPath + name
}

func (s *signals) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, signalPath)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		s.mu.Lock()
		f := s.by[name]
		s.mu.Unlock()
		if f == nil {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, f(r)) // else the step has gone
	})
}
