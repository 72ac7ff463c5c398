package integration

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/pki"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// privateRegistry serves a registry with credentials and returns the environment of a client that has them.
func privateRegistry(t *testing.T, auth registry.Auth) (*registry.Registry, []string) {
	t.Helper()
	reg := startRegistry(t, registry.Options{Auth: auth, Username: "ada", Password: "lovelace, 1815"})
	dir := t.TempDir()
	if err := reg.DockerConfig(dir); err != nil {
		t.Fatal(err)
	}
	return reg, []string{"DOCKER_CONFIG=" + dir}
}

// TestPrivateRegistry resolves and reads lazily with credentials of the build's session, pushes with them, and
// keeps others out.
func TestPrivateRegistry(t *testing.T) {
	for name, auth := range map[string]registry.Auth{"basic": registry.Basic, "token": registry.Token} {
		t.Run(name, func(t *testing.T) {
			reg, env := privateRegistry(t, auth)
			img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
			reg.Log.Reset()
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			from := "FROM " + reg.Ref("base:1") + "\n"
			res := build(t, d, client.Solve{Dockerfile: from + "RUN sha256sum /big/1\n", Env: env})
			wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
			if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
				t.Errorf("%d lazy layers, want 2", rep.Images[0].Lazy)
			}
			if read, size := blobsRead(t, reg, img), imageSize(t, img); read > size/2 {
				t.Errorf("%d bytes of %d were fetched", read, size)
			}
			for _, e := range reg.Log.Entries(registry.Entry.Blob) {
				if e.Status < 300 && !e.Authorized {
					t.Errorf("the registry gave %s to somebody without credentials", e.Path)
				}
			}

			// Another session, after the first has ended, reads what is missing.
			res = build(t, d, client.Solve{Dockerfile: from + "RUN sha256sum /big/9\n", Env: env,
				Outputs: []string{"type=image,name=" + reg.Ref("app:1") + ",push=true,compression=estargz"}})
			wantContains(t, "output", res.Output(), digest.FromString(noise(9, 1<<20)).Encoded())

			none := []string{"DOCKER_CONFIG=" + t.TempDir()}
			msg := buildFails(t, d, client.Solve{Dockerfile: from + "RUN echo not for you\n", Env: none})
			wantContains(t, "error", strings.ToLower(msg), "401 unauthorized", reg.Ref("base:1"))

			logs := d.Logs()
			if strings.Contains(logs, "lovelace") || strings.Contains(msg, "lovelace") {
				t.Error("the password is in the daemon's log or the client's error")
			}
		})
	}
}

// TestTokenExpiresDuringRUN makes the registry forget its tokens between two reads of one step. The second one goes on with another token.
func TestTokenExpiresDuringRUN(t *testing.T) { eachDoor(t, testTokenExpiresDuringRUN) }

func testTokenExpiresDuringRUN(t *testing.T) {
	reg, env := privateRegistry(t, registry.Token)
	img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	top := layerDigests(t, img)[1]
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	var revoked time.Time
	revoke := reg.OnSignal("revoke", func(*http.Request) string {
		reg.RevokeTokens()
		revoked = time.Now()
		return ""
	})
	res := build(t, d, client.Solve{Env: env,
		Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/0 && wget -q -O /dev/null " + revoke + " && sha256sum /big/12\n"})
	if revoked.IsZero() {
		t.Fatal("the step never revoked the tokens")
	}
	wantContains(t, "output", res.Output(), digest.FromString(noise(0, 1<<20)).Encoded(), digest.FromString(noise(12, 1<<20)).Encoded())
	later := map[int]int{} // what was answered since
	for _, e := range reg.Log.Entries(registry.Entry.Blob) {
		if e.Digest() == top && e.Time.After(revoked) {
			later[e.Status]++
		}
	}
	if later[http.StatusUnauthorized] == 0 || later[http.StatusPartialContent] == 0 {
		t.Errorf("after the tokens were revoked the registry answered %v, want 401 to the old one, and ranges", later)
	}
}

// TestAnotherBuildEnds has a build that is FROM the same layers begin and end in the middle of another one's step, which reads on with its own session when
// the tokens have expired, and from its own registry when the other build's is gone.
func TestAnotherBuildEnds(t *testing.T) {
	for _, name := range []string{"same registry", "another registry"} {
		t.Run(name, func(t *testing.T) {
			reg, env := privateRegistry(t, registry.Token)
			big := bigLayer(t, 16<<20)
			push(t, reg, "base:1", busybox(t, big), baseimage.EStargz)
			second, opt := reg, daemon.Options{Config: plainHTTP(reg)}
			if name != "same registry" {
				second = startRegistry(t, registry.Options{})
				opt.Config += plainHTTP(second)
			}
			// Of the same image, BuildKit would take the two FROM for one.
			push(t, second, "other:1", busybox(t, big, layer(t, "top", baseimage.File("top", "t"))), baseimage.EStargz)
			opt.Config += "[lazy]\nfetch-timeout = \"6s\"\n"
			d := startDaemon(t, opt)
			other := reg.OnSignal("other", func(*http.Request) string {
				s := client.Solve{Dockerfile: "FROM " + second.Ref("other:1") + "\nRUN sha256sum /big/7\n", Env: env}
				if res, err := (client.Buildctl{Addr: d.Addr}).Build(t.Context(), s); err != nil || res.Err != "" {
					t.Errorf("the other build: %v, %+v", err, res)
				}
				if second == reg {
					reg.RevokeTokens()
				} else if err := second.Close(); err != nil {
					t.Error(err)
				}
				return ""
			})
			res := build(t, d, client.Solve{Env: env,
				Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/0 && wget -q -O /dev/null " + other + " && sha256sum /big/12\n"})
			wantContains(t, "output", res.Output(), digest.FromString(noise(0, 1<<20)).Encoded(), digest.FromString(noise(12, 1<<20)).Encoded())
		})
	}
}

// TestMirror reads lazily from a mirror.
func TestMirror(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "library/labbase:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	reg.Log.Reset()
	d := startDaemon(t, daemon.Options{Config: fmt.Sprintf("[registry.\"docker.io\"]\nmirrors = [%q]\n", reg.Host) + plainHTTP(reg)})
	res := build(t, d, client.Solve{Dockerfile: "FROM labbase:1\nRUN sha256sum /big/1\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
	if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
		t.Errorf("%d lazy layers, want 2", rep.Images[0].Lazy)
	}
	if read, size := blobsRead(t, reg, img), imageSize(t, img); read == 0 || read > size/2 {
		t.Errorf("%d bytes of %d were fetched from the mirror", read, size)
	}
}

// TestMirrorWithPath reads lazily from a mirror that keeps images below a path, and falls back from one that is gone.
func TestMirrorWithPath(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "hub/library/labbase:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	dead := startRegistry(t, registry.Options{})
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, daemon.Options{Config: fmt.Sprintf("[registry.\"docker.io\"]\nmirrors = [%q, %q]\n", dead.Host, reg.Host+"/hub") + plainHTTP(reg) + plainHTTP(dead)})
	res := build(t, d, client.Solve{Dockerfile: "FROM labbase:1\nRUN sha256sum /big/1\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
	if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
		t.Errorf("%d lazy layers, want 2", rep.Images[0].Lazy)
	}
}

// TestRegistryTLS reads lazily over TLS: with the authority's certificate, without, and with verification off.
func TestRegistryTLS(t *testing.T) {
	ca, err := pki.NewCA(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	reg := startRegistry(t, registry.Options{Dir: dir, CA: ca})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/1\n"}
	for name, config := range map[string]string{
		// BuildKit takes registries on loopback for plain HTTP unless told otherwise.
		"ca":       fmt.Sprintf("[registry.%q]\nhttp = false\nca = [%q]\n", reg.Host, ca.File),
		"insecure": fmt.Sprintf("[registry.%q]\ninsecure = true\n", reg.Host),
	} {
		t.Run(name, func(t *testing.T) {
			d := startDaemon(t, daemon.Options{Config: config})
			res := build(t, d, s)
			wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
			if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
				t.Errorf("%d lazy layers, want 2", rep.Images[0].Lazy)
			}
		})
	}
	t.Run("HTTP/2", func(t *testing.T) {
		reg := startRegistry(t, registry.Options{Dir: dir, CA: ca, HTTP2: true})
		// Each answer to a range is cut off once, which over HTTP/2 ends a stream, and no connection.
		reg.Faults.Add(registry.Fault{Kind: registry.ShortBody, Match: func(r *http.Request) bool { return r.Header.Get("Range") != "" }, Skip: 2, Count: 2})
		d := startDaemon(t, daemon.Options{Config: fmt.Sprintf("[registry.%q]\nhttp = false\nca = [%q]\n", reg.Host, ca.File)})
		res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/1\n"})
		wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
		if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
			t.Errorf("%d lazy layers, want 2", rep.Images[0].Lazy)
		}
		ranges := reg.Log.Entries(func(e registry.Entry) bool { return e.Range != "" })
		for _, e := range ranges {
			if e.Proto != "HTTP/2.0" {
				t.Errorf("a range was read over %s", e.Proto)
			}
		}
		if len(ranges) < 4 || reg.Faults.Hits() != 2 {
			t.Errorf("%d ranges were read, of which %d failed, want more, and 2", len(ranges), reg.Faults.Hits())
		}
	})
	t.Run("unknown authority", func(t *testing.T) {
		d := startDaemon(t, daemon.Options{Config: fmt.Sprintf("[registry.%q]\nhttp = false\n", reg.Host)})
		wantContains(t, "error", buildFails(t, d, s), "certificate", reg.Ref("base:1"))
	})
}
