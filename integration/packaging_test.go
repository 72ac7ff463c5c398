package integration

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/pki"
)

// unit reads a systemd unit into section/key and its values.
func unit(t *testing.T, path string) map[string][]string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	section := ""
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSpace(line)
		switch key, value, ok := strings.Cut(line, "="); {
		case line == "" || line[0] == '#':
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		case ok:
			out[section+"/"+key] = append(out[section+"/"+key], value)
		default:
			t.Errorf("%s: %q is neither section nor assignment", path, line)
		}
	}
	return out
}

// TestSystemdUnits starts the daemon as examples/systemd would: its arguments, the socket passed on, readiness told.
func TestSystemdUnits(t *testing.T) {
	const dir = examples + "/systemd/"
	socketUnit, service := unit(t, dir+"buildkitd-lazy.socket"), unit(t, dir+"buildkitd-lazy.service")
	if got := socketUnit["Socket/ListenStream"]; !slices.Equal(got, []string{"%t/buildkit/buildkitd.sock"}) {
		t.Errorf("the socket unit listens on %q", got)
	}
	if got := service["Service/Type"]; !slices.Equal(got, []string{"notify"}) {
		t.Fatalf("the service is of type %q", got)
	}
	bin, err := filepath.Abs("../bin/" + daemon.OursBinary)
	if err != nil {
		t.Fatal(err)
	}

	// systemd itself, where it is installed, knows every key.
	if analyze, err := exec.LookPath("systemd-analyze"); err == nil {
		tmp := t.TempDir()
		for _, u := range []string{"buildkitd-lazy.socket", "buildkitd-lazy.service"} {
			raw, err := os.ReadFile(dir + u)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, tmp, u, strings.ReplaceAll(string(raw), "/usr/local/bin/"+daemon.OursBinary, bin))
		}
		out, err := exec.CommandContext(t.Context(), analyze, "verify", tmp+"/buildkitd-lazy.socket", tmp+"/buildkitd-lazy.service").CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "buildkitd-lazy.") {
				t.Errorf("systemd-analyze verify: %v: %s", err, line)
			}
		}
	}

	// Sockets have short names: not below t.TempDir.
	tmp, err := os.MkdirTemp("", "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	path := filepath.Join(tmp, "buildkitd.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	passed, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(tmp, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()

	command := strings.Fields(service["Service/ExecStart"][0])
	if filepath.Base(command[0]) != daemon.OursBinary {
		t.Fatalf("the service runs %q", command)
	}
	args := slices.Concat([]string{"-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"`, "sh", bin}, command[1:],
		[]string{"--root", filepath.Join(tmp, "root"), "--config", writeFile(t, tmp, "buildkitd.toml", "")})
	cmd := exec.CommandContext(t.Context(), "sh", args...)
	cmd.ExtraFiles = []*os.File{passed}
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(tmp, "notify"))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	defer func() {
		if !ended {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if t.Failed() {
			t.Logf("log:\n%s", log.String())
		}
	}()

	buf := make([]byte, 4096)
	if err := notify.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for said := ""; !strings.Contains(said, "READY=1"); {
		n, err := notify.Read(buf)
		if err != nil {
			t.Fatalf("the daemon told systemd %q and then nothing: %v", said, err)
		}
		said += string(buf[:n]) + "\n"
	}
	if err := daemon.Answers(t.Context(), "unix://"+path); err != nil {
		t.Error(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ended = true
	if err := cmd.Wait(); err != nil {
		t.Errorf("stopped as systemd stops it, the daemon ended with %v", err)
	}
}

// TestGitHubWorkflow reads the workflow and starts a daemon with the configuration in it.
func TestGitHubWorkflow(t *testing.T) {
	raw, err := os.ReadFile(examples + "/github-actions/build.yml")
	if err != nil {
		t.Fatal(err)
	}
	var workflow struct {
		Name        string            `json:"name"`
		On          map[string]any    `json:"on"`
		Permissions map[string]string `json:"permissions"`
		Jobs        map[string]struct {
			RunsOn string `json:"runs-on"`
			If     string `json:"if"`
			Steps  []struct {
				ID   string            `json:"id"`
				Name string            `json:"name"`
				Uses string            `json:"uses"`
				Run  string            `json:"run"`
				Env  map[string]string `json:"env"`
				With map[string]string `json:"with"`
			} `json:"steps"`
		} `json:"jobs"`
	}
	// YAML 1.1 reads the key on as true; quoted it is what GitHub reads.
	raw = bytes.Replace(raw, []byte("\non:\n"), []byte("\n\"on\":\n"), 1)
	if err := yaml.UnmarshalStrict(raw, &workflow); err != nil {
		t.Fatal(err)
	}
	drivers, config := []string{}, ""
	for name, job := range workflow.Jobs {
		if job.RunsOn == "" || len(job.Steps) == 0 {
			t.Errorf("job %s has no machine or no steps", name)
		}
		for i, step := range job.Steps {
			if (step.Uses == "") == (step.Run == "") {
				t.Errorf("job %s, step %d: exactly one of uses and run", name, i)
			}
			if strings.HasPrefix(step.Uses, "docker/setup-buildx-action@") {
				drivers = append(drivers, step.With["driver"])
				config += step.With["buildkitd-config-inline"]
			}
		}
	}
	slices.Sort(drivers)
	if !slices.Equal(drivers, []string{"docker-container", "remote"}) {
		t.Errorf("the workflow uses the drivers %q", drivers)
	}
	wantContains(t, "the workflow's configuration", config, "[lazy]")
	startDaemon(t, daemon.Options{Config: config})
}

// TestKubernetes decodes the manifests with Kubernetes' own types, strictly, checks that they refer to each
// other, and starts daemons with the configurations in them.
func TestKubernetes(t *testing.T) {
	const dir = examples + "/kubernetes/"
	raw, err := os.ReadFile(dir + "statefulset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var (
		config  corev1.ConfigMap
		service corev1.Service
		set     appsv1.StatefulSet
	)
	into := map[string]any{"ConfigMap": &config, "Service": &service, "StatefulSet": &set}
	docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(raw)))
	for {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(doc, &kind); err != nil {
			t.Fatal(err)
		}
		if into[kind.Kind] == nil {
			t.Fatalf("unexpected or second %q", kind.Kind)
		}
		if err := yaml.UnmarshalStrict(doc, into[kind.Kind]); err != nil {
			t.Errorf("%s: %v", kind.Kind, err)
		}
		delete(into, kind.Kind)
	}
	if len(into) > 0 {
		t.Fatalf("missing: %v", slices.Collect(maps.Keys(into)))
	}

	pod := set.Spec.Template
	if set.Spec.ServiceName != service.Name {
		t.Errorf("the set's service is %q, not %q", set.Spec.ServiceName, service.Name)
	}
	for what, selector := range map[string]map[string]string{"set": set.Spec.Selector.MatchLabels, "service": service.Spec.Selector} {
		for k, v := range selector {
			if pod.Labels[k] != v {
				t.Errorf("the %s selects %s=%s, the pod has %q", what, k, v, pod.Labels[k])
			}
		}
	}
	c := pod.Spec.Containers[0]
	if c.SecurityContext == nil || c.SecurityContext.Privileged == nil || !*c.SecurityContext.Privileged {
		t.Error("the container is not privileged")
	}
	volumes := map[string]bool{}
	for _, v := range pod.Spec.Volumes {
		volumes[v.Name] = true
		if v.ConfigMap != nil && v.ConfigMap.Name != config.Name {
			t.Errorf("volume %s is of config map %q, not %q", v.Name, v.ConfigMap.Name, config.Name)
		}
	}
	for _, v := range set.Spec.VolumeClaimTemplates {
		volumes[v.Name] = true
	}
	mounted := map[string]bool{}
	for _, m := range c.VolumeMounts {
		mounted[m.MountPath] = true
		if !volumes[m.Name] {
			t.Errorf("%s is mounted from volume %q, which is not there", m.MountPath, m.Name)
		}
	}
	if !mounted["/var/lib/buildkit"] {
		t.Error("the state directory is not on a volume")
	}
	if got := service.Spec.Ports[0].TargetPort.StrVal; got != c.Ports[0].Name {
		t.Errorf("the service's target port is %q, the container's %q", got, c.Ports[0].Name)
	}

	// The daemon of the set, with places of this machine in place of the pod's.
	tmp, err := os.MkdirTemp("", "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	ca, err := pki.NewCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := ca.Issue("buildkitd", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	tcp, unix := "tcp://"+freePort(t), "unix://"+filepath.Join(tmp, "buildkitd.sock")
	toml := config.Data["buildkitd.toml"]
	for pods, ours := range map[string]string{
		"unix:///run/buildkit/buildkitd.sock": unix, fmt.Sprintf("tcp://0.0.0.0:%d", c.Ports[0].ContainerPort): tcp,
		"/certs/tls.crt": pair.CertFile, "/certs/tls.key": pair.KeyFile, "/certs/ca.crt": ca.File,
	} {
		if !strings.Contains(toml, pods) {
			t.Errorf("the configuration does not name %s", pods)
		}
		toml = strings.ReplaceAll(toml, pods, ours)
	}
	path := writeFile(t, tmp, "buildkitd.toml", toml)
	args := slices.Clone(c.Args)
	for i, a := range args {
		if a == "/etc/buildkit/buildkitd.toml" {
			args[i] = path
		}
	}
	bin, err := daemon.Bin(daemon.OursBinary)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, append(args, "--root", filepath.Join(tmp, "root"))...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the daemon ended with %v\n%s", err, log.String())
		}
	}()
	// As the readiness probe asks, then as a client would from outside.
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := daemon.Answers(t.Context(), unix)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	tls := []string{"--tlscacert", ca.File, "--tlscert", pair.CertFile, "--tlskey", pair.KeyFile}
	if _, err := (client.Buildctl{Addr: tcp, Args: tls}).Run(t.Context(), "debug", "workers"); err != nil {
		t.Error(err)
	}
	if _, err := (client.Buildctl{Addr: tcp, Args: tls[:2]}).Run(t.Context(), "--timeout=3", "debug", "workers"); err == nil {
		t.Error("a client without certificate was let in")
	}
}

// TestKubernetesDriver runs create-builder.sh with a docker that writes down what it is asked, and starts a daemon
// with the configuration that it hands over.
func TestKubernetesDriver(t *testing.T) {
	dir, err := filepath.Abs(examples + "/kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	docker := filepath.Join(bin, "docker")
	if err := os.WriteFile(docker, []byte("#!/bin/sh\nprintf '%s\\n' \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "create-builder.sh"), "registry.example.com/buildkitd-lazy:1")
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("create-builder.sh: %v\n%s", err, out)
	}
	args := strings.Split(strings.TrimSpace(string(out)), "\n")
	wantContains(t, "docker's arguments", string(out), "buildx\ncreate\n", "--driver\nkubernetes\n",
		"image=registry.example.com/buildkitd-lazy:1,namespace=buildkit,")
	i := slices.Index(args, "--buildkitd-config")
	if i < 0 || i+1 == len(args) {
		t.Fatalf("no --buildkitd-config in %q", args)
	}
	toml, err := os.ReadFile(args[i+1])
	if err != nil {
		t.Fatal(err)
	}
	startDaemon(t, daemon.Options{Config: string(toml)})
}
