package integration

import (
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/nektos/act/pkg/artifactcache"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestCacheInGHA exports a build's cache, lazy base included, to the GitHub Actions cache server of
// nektos/act, which speaks its first API, and imports it into a daemon that has nothing: the steps are
// not run again, and one on top of them reads what it needs of the base, which is as lazy as without a cache.
func TestCacheInGHA(t *testing.T) {
	gha, err := artifactcache.StartHandler(t.TempDir(), "", "127.0.0.1", 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := gha.Close(); err != nil {
			t.Error(err)
		}
	})
	// A runner's token says which scopes it may read (1) and write (2). BuildKit goes by that; nobody checks the signature.
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: make([]byte, 32)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"ac":  `[{"Scope":"refs/heads/main","Permission":3}]`,
		"nbf": time.Now().Add(-time.Minute).Unix(),
		"exp": time.Now().Add(time.Hour).Unix(),
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	cacheIn := "type=gha,scope=lazy,url=" + gha.ExternalURL() + ",token=" + token

	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	dockerfile := "FROM " + reg.Ref("base:estargz") + "\nRUN cat /proc/sys/kernel/random/uuid > /once\nRUN sha256sum /big/1 >> /once && cat /once\n"
	first := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	once := build(t, first, client.Solve{Dockerfile: dockerfile, CacheTo: []string{cacheIn + ",mode=max"}}).Output()
	stopDaemon(t, first)

	reg.Log.Reset()
	second := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, second, client.Solve{Dockerfile: dockerfile + "RUN cat /once && sha256sum /big/2\n", CacheFrom: []string{cacheIn}})
	wantContains(t, "output", res.Output(), once, digest.FromString(noise(2, 1<<20)).Encoded())
	// The cache has the whole base too, and not where its tables of contents are.
	if read, size := blobsRead(t, reg, img), imageSize(t, img); read < 1<<20 || read > size/2 {
		t.Errorf("%d of the base image's %d bytes came from its registry for a file of 1 MiB", read, size)
	}
	if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
		t.Errorf("%d layers of the base image are lazy, want 2", rep.Images[0].Lazy)
	}
	if logs := first.Logs() + second.Logs(); strings.Contains(logs, token) {
		t.Error("the token is in a daemon's log")
	}
}
