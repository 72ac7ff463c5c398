package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// Networks for the tests that set network modes, as BuildKit's own test image
// has them.
const (
	cniConfig = `{
	"cniVersion": "1.0.0", "name": "buildkit", "type": "bridge", "bridge": "buildkit0",
	"isDefaultGateway": true, "forceAddress": false, "ipMasq": true, "hairpinMode": true,
	"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.10.0.0/16"}]]}
}`
	cniDNSConfig = `{
	"cniVersion": "0.4.0", "name": "buildkitdns", "plugins": [
		{"type": "bridge", "bridge": "buildkitdns0", "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
		 "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.11.0.0/16"}]]}},
		{"type": "firewall"},
		{"type": "dnsname", "domainName": "dns.buildkit"}
	]
}`
)

var cniPlugins = []string{
	"github.com/containernetworking/plugins/plugins/ipam/host-local",
	"github.com/containernetworking/plugins/plugins/main/bridge",
	"github.com/containernetworking/plugins/plugins/main/loopback",
	"github.com/containernetworking/plugins/plugins/meta/firewall",
}

// buildTools compiles the tests and what they look for on PATH. It fills
// r.module with the directory of each test package's sources: tests run there.
func (r *runner) buildTools(ctx context.Context) error {
	tools := filepath.Join(r.work, "tools")
	for _, su := range suites {
		if err := r.goTool(ctx, "test", "-c", "-o", filepath.Join(tools, su.Name+".test"), su.Package); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "go", "list", "-f", "{{.Dir}}", su.Package)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("go list %s: %w", su.Package, err)
		}
		r.module[su.Name] = strings.TrimSpace(string(out))
	}
	for _, pkg := range append([]string{
		"github.com/moby/buildkit/cmd/buildctl",
		"github.com/distribution/distribution/v3/cmd/registry",
	}, cniPlugins...) {
		file := path.Base(pkg)
		if strings.Contains(pkg, "containernetworking") {
			file = "cni-" + file
		}
		if err := r.goTool(ctx, "build", "-o", filepath.Join(tools, file), pkg); err != nil {
			return err
		}
	}
	return nil
}

// buildStock compiles the stock daemon from the versions in go.mod.
func (r *runner) buildStock(ctx context.Context) (string, error) {
	file := filepath.Join(r.work, "stock", "buildkitd")
	return file, r.goTool(ctx, "build", "-o", file, "github.com/moby/buildkit/cmd/buildkitd")
}

func (r *runner) goTool(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// fixtures makes the keys that tests sign commits and files with, by the
// scripts that BuildKit uses for it. Without gpg and ssh-keygen those tests
// fail on both sides, which the report counts.
func (r *runner) fixtures(ctx context.Context) error {
	dir := filepath.Join(r.work, "fixtures")
	if _, err := os.Stat(filepath.Join(dir, "complete")); err == nil {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(r.work, "mirror"), 0o755); err != nil {
		return err
	}
	scripts := filepath.Join(r.module["client"], "..", "hack", "fixtures")
	for _, script := range []string{"gen_gpg_test_env.sh", "gen_ssh_test_env.sh"} {
		for _, user := range []string{"user1", "user2"} {
			sb, tmp, err := r.sandbox(side{}, false)
			if err == nil {
				sb.Foreign, sb.Leaks = "", ""
				sb.Dir = inside + "/fixtures"
				sb.Args = []string{"/bin/sh", filepath.Join(scripts, script), user}
				err = r.quiet(ctx, sb)
			}
			os.RemoveAll(tmp)
			if err != nil {
				fmt.Fprintf(r.progress, "no signing keys for the tests (%s: %v); tests that sign fail on every side\n", script, err)
			}
		}
	}
	return os.WriteFile(filepath.Join(dir, "complete"), nil, 0o600)
}

func (r *runner) quiet(ctx context.Context, sb sandbox) error {
	var out strings.Builder
	if err := sb.run(ctx, &out, &out); err != nil {
		return fmt.Errorf("%w: %s", err, tail(out.String(), 400))
	}
	return nil
}

func tail(s string, n int) string {
	s = strings.TrimSpace(s)
	if len(s) > n {
		s = "…" + s[len(s)-n:]
	}
	return s
}

// fileKey is a short digest of the contents of files.
func fileKey(files ...string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, imagesVersion)
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return "", err
		}
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", fmt.Errorf("read %s: %w", name, err)
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:12], nil
}

func writeJSON(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	tmp := name + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil { //nolint:gosec // a report
		return err
	}
	return os.Rename(tmp, name)
}
