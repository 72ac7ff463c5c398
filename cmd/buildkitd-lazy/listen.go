package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/pkg/sys"
	"github.com/coreos/go-systemd/v22/activation"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/util/bklog"
)

// listen opens every address of cfg, or none. UID and GID have to be set.
func listen(ctx context.Context, cfg bkconfig.GRPCConfig) (_ []net.Listener, err error) {
	if len(cfg.Address) == 0 {
		return nil, errors.New("no address to listen on: --addr and address in [grpc] are empty")
	}
	tlsConfig, err := serverTLS(cfg.TLS)
	if err != nil {
		return nil, err
	}
	var listeners []net.Listener
	defer func() {
		if err != nil {
			closeAll(listeners)
		}
	}()
	for _, addr := range cfg.Address {
		if tlsConfig == nil && strings.HasPrefix(addr, "tcp://") {
			bklog.G(ctx).WithField("addr", addr).Warn("no TLS: whoever reaches this address is root here; set --tlscert, --tlskey and --tlscacert")
		}
		l, err := listenOn(ctx, addr, *cfg.UID, *cfg.GID, tlsConfig)
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		_ = l.Close() // it has served nothing, or is closed already
	}
}

// listenOn opens one address. uid and gid own a unix socket, which is readable and writable for both (mode 0660) and
// replaces one that is already there. A nil tlsConfig is plain text; a unix socket always is.
func listenOn(ctx context.Context, addr string, uid, gid int, tlsConfig *tls.Config) (net.Listener, error) {
	proto, at, ok := strings.Cut(addr, "://")
	if !ok {
		return nil, fmt.Errorf("no protocol; did you mean unix://%s?", addr)
	}
	switch proto {
	case "unix":
		if tlsConfig != nil {
			bklog.G(ctx).WithField("addr", addr).Warn("TLS is not used on unix sockets")
		}
		return sys.GetLocalListener(at, uid, gid)
	case "fd":
		return activated(at, tlsConfig)
	case "tcp":
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", at)
		if err != nil || tlsConfig == nil {
			return l, err
		}
		return tls.NewListener(l, tlsConfig), nil
	}
	return nil, fmt.Errorf("unknown protocol %q; want unix, tcp or fd", proto)
}

// activated returns the first socket that systemd passed on.
func activated(name string, tlsConfig *tls.Config) (net.Listener, error) {
	if name != "" {
		return nil, fmt.Errorf("choosing the socket %q by name is not supported; fd:// takes the first", name)
	}
	listeners, err := activation.Listeners()
	if err != nil {
		return nil, err
	}
	if len(listeners) == 0 || listeners[0] == nil {
		return nil, errors.New("no socket passed on: start the daemon by a systemd socket unit (LISTEN_PID, LISTEN_FDS)")
	}
	if tlsConfig != nil && listeners[0].Addr().Network() == "tcp" {
		return tls.NewListener(listeners[0], tlsConfig), nil
	}
	return listeners[0], nil
}

// listenForAll opens a unix socket that every user may connect to.
func listenForAll(path string) (net.Listener, error) {
	uid := os.Getuid()
	l, err := sys.GetLocalListener(path, uid, uid)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil { // build steps send their traces to it, as any uid
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// serverTLS is nil where neither certificate nor key is configured. With a CA, clients must show a certificate
// signed by it.
func serverTLS(cfg bkconfig.TLSConfig) (*tls.Config, error) {
	switch {
	case cfg.Cert == "" && cfg.Key == "":
		return nil, nil
	case cfg.Cert == "":
		return nil, errors.New("TLS: a key without a certificate; set --tlscert, or cert in [grpc.tls]")
	case cfg.Key == "":
		return nil, errors.New("TLS: a certificate without its key; set --tlskey, or key in [grpc.tls]")
	}
	pair, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("TLS: load certificate %s with key %s: %w", cfg.Cert, cfg.Key, err)
	}
	conf := &tls.Config{
		Certificates: []tls.Certificate{pair},
		NextProtos:   []string{"h2"},
		MinVersion:   tls.VersionTLS12,
	}
	if cfg.CA == "" {
		return conf, nil
	}
	pem, err := os.ReadFile(cfg.CA)
	if err != nil {
		return nil, fmt.Errorf("TLS: read CA certificate: %w", err)
	}
	conf.ClientCAs = x509.NewCertPool()
	if !conf.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("TLS: %s holds no CA certificate in PEM", cfg.CA)
	}
	conf.ClientAuth = tls.RequireAndVerifyClientCert
	return conf, nil
}
