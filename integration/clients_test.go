package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/pki"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// tlsDaemon runs a daemon on tcp with mutual TLS, next to its unix socket, and returns
// the tcp address and the client's certificate.
func tlsDaemon(t *testing.T, config string) (d *daemon.Daemon, addr string, ca *pki.CA, cl pki.Pair) {
	t.Helper()
	ca, err := pki.NewCA(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := ca.Issue("server", "127.0.0.1", "localhost")
	if err != nil {
		t.Fatal(err)
	}
	if cl, err = ca.Issue("client"); err != nil {
		t.Fatal(err)
	}
	addr = "tcp://" + freePort(t)
	d = startDaemon(t, daemon.Options{
		Config: config,
		Addrs:  []string{"unix://" + filepath.Join(t.TempDir(), "sock"), addr},
		Args:   []string{"--tlscacert", ca.File, "--tlscert", server.CertFile, "--tlskey", server.KeyFile},
	})
	return d, addr, ca, cl
}

// buildx makes a builder with the remote driver.
func buildx(t *testing.T, endpoint string, opts ...string) client.Buildx {
	t.Helper()
	b := client.Buildx{Config: t.TempDir()}
	args := []string{"create", "--name", "lazy", "--driver", "remote"}
	for _, o := range opts {
		args = append(args, "--driver-opt", o)
	}
	if _, err := b.Run(t.Context(), append(args, endpoint)...); err != nil {
		t.Fatal(err)
	}
	b.Builder = "lazy"
	return b
}

// TestBuildx builds by docker buildx with the remote driver, over a unix socket and over tcp with TLS:
// inspect, build, outputs, metadata, imagetools, du and prune.
func TestBuildx(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	d, addr, ca, cl := tlsDaemon(t, plainHTTP(reg))
	for name, b := range map[string]client.Buildx{
		"unix": buildx(t, d.Addr),
		"tcp":  buildx(t, addr, "cacert="+ca.File, "cert="+cl.CertFile, "key="+cl.KeyFile),
	} {
		t.Run(name, func(t *testing.T) {
			out, err := b.Run(t.Context(), "inspect", "--bootstrap")
			if err != nil {
				t.Fatal(err)
			}
			wantContains(t, "buildx inspect", string(out), "running", "linux/amd64")

			tag := reg.Ref("app:" + name)
			res, err := b.Build(t.Context(), client.Solve{
				Dockerfile: "FROM " + reg.Ref("base:1") + "\nARG WHO\nRUN echo for $WHO && sha256sum /big/1 && echo $WHO > /who\n",
				BuildArgs:  []string{"WHO=" + name},
				Outputs:    []string{"type=image,name=" + tag + ",push=true,compression=estargz,oci-mediatypes=true"},
			})
			if err != nil {
				t.Fatal(err)
			}
			if res.Err != "" {
				t.Fatalf("buildx: %s", res.Err)
			}
			wantContains(t, "output", res.Output(), "for "+name, digest.FromString(noise(1, 1<<20)).Encoded())
			if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
				t.Errorf("%d lazy layers, want 2", rep.Images[0].Lazy)
			}
			wantFile(t, wantEStargz(t, pull(t, reg, "app:"+name)), "who")

			dir := t.TempDir()
			for _, o := range []string{"type=local,dest=" + dir + "/local", "type=tar,dest=" + dir + "/tree.tar",
				"type=oci,dest=" + dir + "/oci.tar", "type=docker,dest=" + dir + "/docker.tar"} {
				res, err := b.Build(t.Context(), client.Solve{Dockerfile: "FROM " + tag + "\nRUN true\n", Outputs: []string{o}})
				if err != nil {
					t.Fatal(err)
				}
				if res.Err != "" {
					t.Errorf("%s: %s", o, res.Err)
				}
			}
			if got, err := os.ReadFile(filepath.Join(dir, "local/who")); err != nil || string(got) != name+"\n" {
				t.Errorf("local/who: %q, %v", got, err)
			}
			for _, f := range []string{"tree.tar", "oci.tar", "docker.tar"} {
				if st, err := os.Stat(filepath.Join(dir, f)); err != nil || st.Size() < 1<<20 {
					t.Errorf("%s: %v, %v", f, st, err)
				}
			}
			if out, err := b.Run(t.Context(), "du"); err != nil || !strings.Contains(string(out), "Total") {
				t.Errorf("buildx du: %v\n%s", err, out)
			}
			if out, err := b.Run(t.Context(), "history", "ls"); err != nil || !strings.Contains(string(out), "Completed") {
				t.Errorf("buildx history ls: %v\n%s", err, out)
			}
		})
	}
	if out, err := buildx(t, d.Addr).Run(t.Context(), "prune", "--all", "--force"); err != nil {
		t.Errorf("buildx prune: %v\n%s", err, out)
	}
}

// TestBuildxBake builds several targets at once, one from another, and an OCI layout as named context.
func TestBuildxBake(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	b := buildx(t, d.Addr)
	dir := t.TempDir()
	writeFile(t, dir, "lib/Dockerfile", "FROM "+reg.Ref("base:1")+"\nRUN sha256sum /big/1 > /sum\n")
	writeFile(t, dir, "app/Dockerfile", "FROM lib AS work\nRUN cat /sum > /out\nFROM scratch\nCOPY --from=work /out /\n")
	writeFile(t, dir, "docker-bake.hcl", fmt.Sprintf(`
group "default" { targets = ["app", "image"] }
target "lib" { context = %[1]q }
target "app" {
  context  = %[2]q
  contexts = { lib = "target:lib" }
  output   = ["type=local,dest=%[3]s"]
}
target "image" {
  inherits = ["lib"]
  tags     = [%[4]q]
  output   = ["type=image,push=true,compression=estargz"]
}
`, filepath.Join(dir, "lib"), filepath.Join(dir, "app"), filepath.Join(dir, "out"), reg.Ref("bake:1")))
	meta := filepath.Join(dir, "meta.json")
	out, err := b.Run(t.Context(), "bake", "--file", filepath.Join(dir, "docker-bake.hcl"), "--metadata-file", meta, "--allow=fs=*")
	if err != nil {
		t.Fatalf("buildx bake: %v\n%s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, "out/out"))
	if err != nil {
		t.Fatal(err)
	}
	wantContains(t, "out", string(got), digest.FromString(noise(1, 1<<20)).Encoded())
	raw, err := os.ReadFile(meta)
	if err != nil {
		t.Fatal(err)
	}
	wantContains(t, "metadata file of bake", string(raw), "lazy.report")
	wantFile(t, wantEStargz(t, pull(t, reg, "bake:1")), "sum")
}

// TestBuildctlTLS keeps clients without a certificate out.
func TestBuildctlTLS(t *testing.T) {
	_, addr, ca, cl := tlsDaemon(t, "")
	with := client.Buildctl{Addr: addr, Args: []string{"--tlscacert", ca.File, "--tlscert", cl.CertFile, "--tlskey", cl.KeyFile}}
	if out, err := with.Run(t.Context(), "debug", "workers"); err != nil || !strings.Contains(string(out), "linux/amd64") {
		t.Errorf("with a certificate: %v\n%s", err, out)
	}
	without := client.Buildctl{Addr: addr, Args: []string{"--tlscacert", ca.File, "--timeout", "3"}}
	if out, err := without.Run(t.Context(), "debug", "workers"); err == nil {
		t.Errorf("without a certificate the daemon answered:\n%s", out)
	}
}
