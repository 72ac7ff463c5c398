package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
)

// pki is a CA with certificates signed by it, as files.
type pki struct {
	dir string
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	p := &pki{dir: t.TempDir()}
	p.ca, p.key = p.sign(t, "ca", nil, nil)
	return p
}

func (p *pki) file(name string) string { return filepath.Join(p.dir, name+".pem") }

func (p *pki) sign(t *testing.T, name string, by *x509.Certificate, with *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		IsCA:                  by == nil,
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if by == nil {
		by, with = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by, &key.PublicKey, with)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name:          {Type: "CERTIFICATE", Bytes: der},
		name + "-key": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(p.file(file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// client is the TLS configuration of a client that trusts the CA; with a name it shows that certificate.
func (p *pki) client(t *testing.T, name string) *tls.Config {
	t.Helper()
	conf := &tls.Config{RootCAs: x509.NewCertPool(), NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12}
	conf.RootCAs.AddCert(p.ca)
	if name != "" {
		pair, err := tls.LoadX509KeyPair(p.file(name), p.file(name+"-key"))
		if err != nil {
			t.Fatal(err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf
}

func grpcConfig(addrs ...string) bkconfig.GRPCConfig {
	return bkconfig.GRPCConfig{Address: addrs, UID: new(os.Getuid()), GID: new(os.Getgid())}
}

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "bk.sock")
	cfg := grpcConfig("unix://" + path)
	if os.Geteuid() == 0 {
		cfg.GID = new(12345)
	}
	for range 2 { // the second replaces the socket that the first, not closed, left
		ls, err := listen(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer closeAll(ls)
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o660 || fi.Mode().Type() != os.ModeSocket {
			t.Errorf("mode %v", fi.Mode())
		}
		if gid := int(fi.Sys().(*syscall.Stat_t).Gid); gid != *cfg.GID {
			t.Errorf("gid %d, want %d", gid, *cfg.GID)
		}
		var d net.Dialer
		c, err := d.DialContext(t.Context(), "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
}

func TestListenForAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "otel.sock")
	l, err := listenForAll(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", fi, err)
	}
}

// handshake connects to l over TLS and sends a byte there and back: with TLS 1.3 a client learns that its certificate
// was refused only when it reads.
func handshake(ctx context.Context, l net.Listener, conf *tls.Config) error {
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 1)
		if _, err := c.Read(b); err == nil {
			_, _ = c.Write(b)
		}
	}()
	d := tls.Dialer{Config: conf}
	c, err := d.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return err
	}
	if p := c.(*tls.Conn).ConnectionState().NegotiatedProtocol; p != "h2" {
		return fmt.Errorf("protocol %q", p)
	}
	return nil
}

func TestListenTLS(t *testing.T) {
	p, other := newPKI(t), newPKI(t)
	p.sign(t, "server", p.ca, p.key)
	p.sign(t, "client", p.ca, p.key)
	other.sign(t, "client", other.ca, other.key)

	for _, tt := range []struct {
		name   string
		ca     string
		client *tls.Config
		ok     bool
	}{
		{"mutual", p.file("ca"), p.client(t, "client"), true},
		{"mutual, no certificate", p.file("ca"), p.client(t, ""), false},
		{"mutual, certificate of another CA", p.file("ca"), func() *tls.Config {
			c := p.client(t, "")
			c.Certificates = other.client(t, "client").Certificates
			return c
		}(), false},
		{"server only", "", p.client(t, ""), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := grpcConfig("tcp://127.0.0.1:0")
			cfg.TLS = bkconfig.TLSConfig{Cert: p.file("server"), Key: p.file("server-key"), CA: tt.ca}
			ls, err := listen(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer closeAll(ls)
			if err := handshake(t.Context(), ls[0], tt.client); (err == nil) != tt.ok {
				t.Errorf("handshake: %v", err)
			}
		})
	}
}

func TestListenErrors(t *testing.T) {
	p := newPKI(t)
	p.sign(t, "server", p.ca, p.key)
	p.sign(t, "another", p.ca, p.key)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	var lc net.ListenConfig
	taken, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()

	for _, tt := range []struct {
		name, addr string
		tls        bkconfig.TLSConfig
		want       string
	}{
		{name: "no protocol", addr: "/run/x.sock", want: "listen on /run/x.sock: no protocol; did you mean unix:///run/x.sock?"},
		{name: "unknown protocol", addr: "http://x", want: `listen on http://x: unknown protocol "http"; want unix, tcp or fd`},
		{name: "below a file", addr: "unix://" + file + "/x.sock", want: "not a directory"},
		{name: "path too long", addr: "unix://" + dir + "/" + strings.Repeat("x", 120), want: "too long"},
		{name: "port in use", addr: "tcp://" + taken.Addr().String(), want: "address already in use"},
		{name: "no activation", addr: "fd://", want: "no socket passed on: start the daemon by a systemd socket unit"},
		{name: "activation by name", addr: "fd://name", want: `choosing the socket "name" by name is not supported`},
		{name: "key alone", addr: "tcp://127.0.0.1:0", tls: bkconfig.TLSConfig{Key: p.file("server-key")}, want: "TLS: a key without a certificate"},
		{name: "certificate alone", addr: "tcp://127.0.0.1:0", tls: bkconfig.TLSConfig{Cert: p.file("server")}, want: "TLS: a certificate without its key"},
		{name: "not a pair", addr: "tcp://127.0.0.1:0", tls: bkconfig.TLSConfig{Cert: p.file("server"), Key: p.file("another-key")}, want: "TLS: load certificate " + p.file("server")},
		{name: "no CA file", addr: "tcp://127.0.0.1:0", tls: bkconfig.TLSConfig{Cert: p.file("server"), Key: p.file("server-key"), CA: p.file("none")}, want: "TLS: read CA certificate"},
		{name: "CA is no PEM", addr: "tcp://127.0.0.1:0", tls: bkconfig.TLSConfig{Cert: p.file("server"), Key: p.file("server-key"), CA: file}, want: "holds no CA certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// The address before it is opened, and has to be closed again.
			first := filepath.Join(t.TempDir(), "first.sock")
			cfg := grpcConfig("unix://"+first, tt.addr)
			cfg.TLS = tt.tls
			ls, err := listen(t.Context(), cfg)
			if err == nil {
				closeAll(ls)
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
			if _, err := os.Stat(first); !os.IsNotExist(err) {
				t.Errorf("the first listener is left: %v", err)
			}
		})
	}
	if _, err := listen(t.Context(), grpcConfig()); err == nil || !strings.Contains(err.Error(), "no address to listen on") {
		t.Errorf("no address: %v", err)
	}
}
