package worker

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/util/resolver/config"
)

// tlsFiles are a host's certificates and keys.
type tlsFiles struct {
	config *tls.Config
	files  map[string]time.Time // and directories: when they were written
}

// loadTLS reads what BuildKit's loadTLSConfig does, in util/resolver.
func loadTLS(r config.RegistryConfig) (*tlsFiles, error) {
	f := &tlsFiles{config: &tls.Config{}, files: map[string]time.Time{}}
	cas, pairs := r.RootCAs, r.KeyPairs
	for _, dir := range r.TLSConfigDir {
		crts, certs, err := f.list(dir)
		if err != nil {
			return nil, err
		}
		cas = append(slices.Clip(cas), crts...)
		pairs = append(slices.Clip(pairs), certs...)
	}
	if len(cas) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("the system's certificate authorities: %w", err)
		}
		f.config.RootCAs = pool
	}
	for _, path := range cas {
		f.saw(path)
		pem, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		f.config.RootCAs.AppendCertsFromPEM(pem)
	}
	for _, p := range pairs {
		f.saw(p.Certificate)
		f.saw(p.Key)
		cert, err := tls.LoadX509KeyPair(p.Certificate, p.Key)
		if err != nil {
			return nil, fmt.Errorf("key pair %s: %w", p.Certificate, err)
		}
		f.config.Certificates = append(f.config.Certificates, cert)
	}
	return f, nil
}

// list returns the authorities (*.crt) and the key pairs (*.cert, *.key) in a directory, which need not be there.
func (f *tlsFiles) list(dir string) (cas []string, pairs []config.TLSKeyPair, err error) {
	f.saw(dir)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return nil, nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasSuffix(path, ".crt") {
			cas = append(cas, path)
		}
		if base, ok := strings.CutSuffix(path, ".cert"); ok {
			pairs = append(pairs, config.TLSKeyPair{Certificate: path, Key: base + ".key"})
		}
	}
	return cas, pairs, nil
}

// modified returns when a file was written, the zero time if there is none.
func modified(path string) time.Time {
	fi, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return fi.ModTime()
}

// saw is called before a file is read, so that one which is replaced meanwhile has changed.
func (f *tlsFiles) saw(path string) { f.files[path] = modified(path) }

// changed reports whether a file was replaced: certificates are, every few weeks, while the daemon runs.
func (f *tlsFiles) changed() bool {
	for path, at := range f.files {
		if !modified(path).Equal(at) {
			return true
		}
	}
	return false
}
