package registry

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/registry/auth/token"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/crypto/bcrypt"

	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd" // Basic
)

const (
	tokenService = "lab-registry"
	tokenIssuer  = "lab-token-server"
	tokenKeyID   = "lab"
	tokenLife    = 5 * time.Minute
)

func writeHtpasswd(path, user, password string) error {
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		return fmt.Errorf("hash the registry's password: %w", err)
	}
	return os.WriteFile(path, fmt.Appendf(nil, "%s:%s\n", user, hash), 0o600)
}

func writeDockerConfig(dir, host, user, password string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	cfg := map[string]any{"auths": map[string]any{}}
	if user != "" {
		cfg["auths"] = map[string]any{host: map[string]string{
			"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password)),
		}}
	}
	b, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
}

// tokenServer issues the bearer tokens that distribution's token access
// controller accepts, in both dialects: GET with basic authentication
// (https://distribution.github.io/distribution/spec/auth/token/) and POST with
// an OAuth2 password grant (.../spec/auth/oauth/).
type tokenServer struct {
	username, password string
	signer             jose.Signer

	mu      sync.Mutex
	issued  map[string]bool // token: still good
	granted int
}

func newTokenServer(jwksFile, username, password string) (*tokenServer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: tokenKeyID, Algorithm: "ES256", Use: "sig"}}}
	b, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("encode the token server's key: %w", err)
	}
	if err := os.WriteFile(jwksFile, b, 0o600); err != nil {
		return nil, err
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: tokenKeyID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("make the token server's signer: %w", err)
	}
	return &tokenServer{username: username, password: password, signer: signer, issued: map[string]bool{}}, nil
}

// wrap serves /token and replaces revoked tokens by one that distribution
// does not take either, so that the challenge says invalid_token as for an expired one.
func (t *tokenServer) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			t.serveToken(w, r)
			return
		}
		if raw, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok && !t.good(raw) {
			r.Header.Set("Authorization", "Bearer expired")
		}
		next.ServeHTTP(w, r)
	})
}

func (t *tokenServer) good(raw string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.issued[raw]
}

func (t *tokenServer) revokeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.issued)
}

func (t *tokenServer) serveToken(w http.ResponseWriter, r *http.Request) {
	var user, password string
	var scopes []string
	switch r.Method {
	case http.MethodGet:
		user, password, _ = r.BasicAuth()
		scopes = r.URL.Query()["scope"]
	case http.MethodPost:
		if err := r.ParseForm(); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		user, password = r.PostForm.Get("username"), r.PostForm.Get("password")
		scopes = strings.Fields(r.PostForm.Get("scope"))
	default:
		http.Error(w, "GET or POST", http.StatusMethodNotAllowed)
		return
	}
	if user != t.username || password != t.password {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong user name or password"}]}`, http.StatusUnauthorized)
		return
	}
	var access []*token.ResourceActions
	for _, s := range scopes {
		for one := range strings.FieldsSeq(s) {
			// type:name:actions, where the name may hold colons.
			kind, rest, ok := strings.Cut(one, ":")
			i := strings.LastIndex(rest, ":")
			if !ok || i < 0 {
				continue
			}
			access = append(access, &token.ResourceActions{Type: kind, Name: rest[:i], Actions: strings.Split(rest[i+1:], ",")})
		}
	}
	now := time.Now()
	t.mu.Lock()
	t.granted++
	id := fmt.Sprint(t.granted)
	t.mu.Unlock()
	raw, err := jwt.Signed(t.signer).Claims(token.ClaimSet{
		Issuer:     tokenIssuer,
		Subject:    user,
		Audience:   token.AudienceList{tokenService},
		Expiration: now.Add(tokenLife).Unix(),
		NotBefore:  now.Add(-time.Minute).Unix(),
		IssuedAt:   now.Unix(),
		JWTID:      id,
		Access:     access,
	}).Serialize()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	t.mu.Lock()
	t.issued[raw] = true
	t.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	// An error here means that the client has gone.
	_ = json.NewEncoder(w).Encode(map[string]any{
		"token":        raw,
		"access_token": raw,
		"expires_in":   int(tokenLife.Seconds()),
		"issued_at":    now.UTC().Format(time.RFC3339),
	})
}
