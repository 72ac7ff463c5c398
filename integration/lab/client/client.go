// Package client runs builds through the clients people use, buildctl and
// docker buildx, as processes, and reads from their raw progress when things
// happened.
//
// A failed build is not an error of [Buildctl.Build] or [Buildx.Build] but a [Result] with Err set: tests
// look at what was said. An error means that the client could not be run.
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
)

// A Solve is a build. Context is required for Dockerfiles that copy from it.
type Solve struct {
	// Dockerfile is the content of the Dockerfile; empty takes Context's.
	Dockerfile string
	// File is the name of the Dockerfile in Context, if it is not Dockerfile.
	File string
	// Context is the directory of the build context; empty is an empty one.
	Context string
	Target  string
	// BuildArgs are NAME=VALUE.
	BuildArgs []string
	// Outputs are as for --output; none keeps the result in the cache.
	Outputs []string
	// CacheTo and CacheFrom are as for --export-cache and --import-cache of buildctl.
	CacheTo, CacheFrom []string
	NoCache            bool
	// OCILayouts are NAME=DIR for FROM references oci-layout://NAME…
	OCILayouts []string
	// Plain asks for --progress=plain, kept in Result.Plain, in place of raw
	// progress: the result then has no vertices.
	Plain bool
	// Args are more arguments for the client.
	Args []string
	// Env is added to the client's environment, for example DOCKER_CONFIG.
	Env []string
}

// A Result is what came of a build.
type Result struct {
	// Err is what the client said if the build failed, else empty.
	Err string
	// Start and Total are when the client was started and how long it ran.
	Start time.Time
	Total time.Duration
	// Vertices are in the order of their appearance, with what they said.
	Vertices []*Vertex
	// Plain is the progress as text if it was asked for.
	Plain string
	// Metadata is the metadata file.
	Metadata map[string]json.RawMessage
}

// A Vertex is a step of a build.
type Vertex struct {
	Digest    string     `json:"digest"`
	Name      string     `json:"name"`
	Started   *time.Time `json:"started"`
	Completed *time.Time `json:"completed"`
	Cached    bool       `json:"cached"`
	Error     string     `json:"error"`

	Statuses []*Status `json:"-"`
	Logs     []Log     `json:"-"`
	Warnings []string  `json:"-"`
}

// A Status is a line below a step.
type Status struct {
	Vertex    string     `json:"vertex"`
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Total     int64      `json:"total"`
	Current   int64      `json:"current"`
	Timestamp time.Time  `json:"timestamp"`
	Started   *time.Time `json:"started"`
	Completed *time.Time `json:"completed"`
}

// A Log is output of a step.
type Log struct {
	Vertex    string    `json:"vertex"`
	Stream    int       `json:"stream"`
	Data      []byte    `json:"data"`
	Timestamp time.Time `json:"timestamp"`
}

// A Buildctl runs builds by buildctl.
type Buildctl struct {
	Addr string
	// Args come before the command, for example --tlscacert.
	Args []string
}

// Build runs a build.
func (c Buildctl) Build(ctx context.Context, s Solve) (*Result, error) {
	bin, err := daemon.Bin(daemon.BuildctlBinary)
	if err != nil {
		return nil, err
	}
	return run(s, func(s Solve, dockerfiles, file, metadata string) *exec.Cmd {
		args := append([]string{"--addr", c.Addr}, c.Args...)
		args = append(args, "build", "--frontend=dockerfile.v0", "--progress="+s.progress(),
			"--local=context="+s.Context, "--local=dockerfile="+dockerfiles,
			"--opt=filename="+file, "--metadata-file="+metadata)
		if s.Target != "" {
			args = append(args, "--opt=target="+s.Target)
		}
		for _, a := range s.BuildArgs {
			args = append(args, "--opt=build-arg:"+a)
		}
		for _, o := range s.Outputs {
			args = append(args, "--output="+o)
		}
		for _, o := range s.CacheTo {
			args = append(args, "--export-cache="+o)
		}
		for _, o := range s.CacheFrom {
			args = append(args, "--import-cache="+o)
		}
		for _, o := range s.OCILayouts {
			args = append(args, "--oci-layout="+o)
		}
		if s.NoCache {
			args = append(args, "--no-cache")
		}
		return exec.CommandContext(ctx, bin, append(args, s.Args...)...)
	})
}

// Run runs buildctl with args and returns its standard output. The error
// holds its standard error.
func (c Buildctl) Run(ctx context.Context, args ...string) ([]byte, error) {
	bin, err := daemon.Bin(daemon.BuildctlBinary)
	if err != nil {
		return nil, err
	}
	return output(exec.CommandContext(ctx, bin, append(append([]string{"--addr", c.Addr}, c.Args...), args...)...))
}

// A Buildx runs builds by docker-buildx as a standalone command. Its
// configuration is in Config, which is also DOCKER_CONFIG.
type Buildx struct {
	Config  string
	Builder string
}

func (b Buildx) command(ctx context.Context, args ...string) (*exec.Cmd, error) {
	bin, err := daemon.Bin(daemon.BuildxBinary)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+b.Config, "BUILDX_CONFIG="+filepath.Join(b.Config, "buildx"))
	if b.Builder != "" {
		cmd.Env = append(cmd.Env, "BUILDX_BUILDER="+b.Builder)
	}
	return cmd, nil
}

// Run runs docker-buildx with args and returns its standard output. The error holds its
// standard error.
func (b Buildx) Run(ctx context.Context, args ...string) ([]byte, error) {
	cmd, err := b.command(ctx, args...)
	if err != nil {
		return nil, err
	}
	return output(cmd)
}

// Build runs a build. CacheTo and CacheFrom are as for --cache-to and --cache-from;
// OCILayouts are NAME=DIR for --build-context NAME=oci-layout://DIR.
func (b Buildx) Build(ctx context.Context, s Solve) (*Result, error) {
	var cmdErr error
	res, err := run(s, func(s Solve, dockerfiles, file, metadata string) *exec.Cmd {
		args := []string{"build", "--progress=" + s.progress(), "--metadata-file=" + metadata,
			"--provenance=false", "--file=" + filepath.Join(dockerfiles, file)}
		if s.Target != "" {
			args = append(args, "--target="+s.Target)
		}
		for _, a := range s.BuildArgs {
			args = append(args, "--build-arg="+a)
		}
		for _, o := range s.Outputs {
			args = append(args, "--output="+o)
		}
		for _, o := range s.CacheTo {
			args = append(args, "--cache-to="+o)
		}
		for _, o := range s.CacheFrom {
			args = append(args, "--cache-from="+o)
		}
		for _, o := range s.OCILayouts {
			name, dir, _ := strings.Cut(o, "=")
			args = append(args, "--build-context="+name+"=oci-layout://"+dir)
		}
		if s.NoCache {
			args = append(args, "--no-cache")
		}
		args = append(append(args, s.Args...), s.Context)
		cmd, err := b.command(ctx, args...)
		if err != nil {
			cmdErr = err
			return exec.CommandContext(ctx, "false")
		}
		return cmd
	})
	return res, errors.Join(cmdErr, err)
}

func output(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, bytes.TrimSpace(exit.Stderr))
	}
	return out, err
}

func (s Solve) progress() string {
	if s.Plain {
		return "plain"
	}
	return "rawjson"
}

func run(s Solve, command func(s Solve, dockerfiles, file, metadata string) *exec.Cmd) (*Result, error) {
	tmp, err := os.MkdirTemp("", "lab-client-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	if s.Context == "" {
		s.Context = filepath.Join(tmp, "context")
		if err := os.Mkdir(s.Context, 0o755); err != nil {
			return nil, err
		}
	}
	dockerfiles, file := s.Context, s.File
	if file == "" {
		file = "Dockerfile"
	}
	if s.Dockerfile != "" {
		dockerfiles = filepath.Join(tmp, "dockerfile")
		if err := os.Mkdir(dockerfiles, 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dockerfiles, file), []byte(s.Dockerfile), 0o644); err != nil {
			return nil, err
		}
	}
	metadata := filepath.Join(tmp, "metadata.json")
	cmd := command(s, dockerfiles, file, metadata)
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, s.Env...)
	// SIGINT lets a client tell the daemon that its build is cancelled.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	res := &Result{Start: time.Now()}
	runErr := cmd.Run()
	res.Total = time.Since(res.Start)
	if exit := (*exec.ExitError)(nil); runErr != nil && !errors.As(runErr, &exit) {
		return nil, fmt.Errorf("run %s: %w", filepath.Base(cmd.Path), runErr)
	}
	said := stderr.String()
	if s.Plain {
		res.Plain = said
	} else {
		said = res.parse(&stderr)
	}
	if runErr != nil {
		res.Err = strings.TrimSpace(said)
		if res.Err == "" {
			res.Err = runErr.Error()
		}
	}
	if raw, err := os.ReadFile(metadata); err == nil {
		if err := json.Unmarshal(raw, &res.Metadata); err != nil {
			return nil, fmt.Errorf("read the metadata file: %w", err)
		}
	}
	return res, nil
}

// parse reads raw progress and returns the lines that are none.
func (r *Result) parse(raw *bytes.Buffer) (rest string) {
	byDigest := map[string]*Vertex{}
	vertex := func(d string) *Vertex {
		v := byDigest[d]
		if v == nil {
			v = &Vertex{Digest: d}
			byDigest[d] = v
			r.Vertices = append(r.Vertices, v)
		}
		return v
	}
	var other strings.Builder
	sc := bufio.NewScanner(raw)
	sc.Buffer(nil, 64<<20)
	for sc.Scan() {
		var line struct {
			Vertexes []*Vertex `json:"vertexes"`
			Statuses []*Status `json:"statuses"`
			Logs     []Log     `json:"logs"`
			Warnings []struct {
				Vertex string `json:"vertex"`
				Short  []byte `json:"short"`
			} `json:"warnings"`
		}
		if !bytes.HasPrefix(sc.Bytes(), []byte("{")) || json.Unmarshal(sc.Bytes(), &line) != nil {
			fmt.Fprintln(&other, sc.Text())
			continue
		}
		for _, n := range line.Vertexes {
			v := vertex(n.Digest)
			n.Statuses, n.Logs, n.Warnings = v.Statuses, v.Logs, v.Warnings
			if n.Started == nil {
				n.Started = v.Started
			}
			*v = *n
		}
	statuses:
		for _, st := range line.Statuses {
			v := vertex(st.Vertex)
			for i, old := range v.Statuses {
				if old.ID == st.ID {
					v.Statuses[i] = st
					continue statuses
				}
			}
			v.Statuses = append(v.Statuses, st)
		}
		for _, l := range line.Logs {
			v := vertex(l.Vertex)
			v.Logs = append(v.Logs, l)
		}
		for _, w := range line.Warnings {
			v := vertex(w.Vertex)
			v.Warnings = append(v.Warnings, string(w.Short))
		}
	}
	return other.String()
}

// Vertex returns the first vertex whose name contains part, or nil.
func (r *Result) Vertex(part string) *Vertex {
	for _, v := range r.Vertices {
		if strings.Contains(v.Name, part) {
			return v
		}
	}
	return nil
}

// Output returns what all steps have printed, one after the other.
func (r *Result) Output() string {
	var b strings.Builder
	for _, v := range r.Vertices {
		b.WriteString(v.Output())
	}
	return b.String()
}

// Output returns what the step has printed.
func (v *Vertex) Output() string {
	if v == nil {
		return ""
	}
	var b strings.Builder
	for _, l := range v.Logs {
		b.Write(l.Data)
	}
	return b.String()
}

// StatusIDs returns the lines below the step: what plain progress shows.
func (v *Vertex) StatusIDs() []string {
	if v == nil {
		return nil
	}
	var out []string
	for _, s := range v.Statuses {
		out = append(out, s.ID)
	}
	return out
}

// Said returns when a step first printed something that contains text, counted from
// the start of the client. The daemon's clock is this machine's.
func (r *Result) Said(text string) (time.Duration, bool) {
	var first time.Time
	for _, v := range r.Vertices {
		for _, l := range v.Logs {
			if strings.Contains(string(l.Data), text) && (first.IsZero() || l.Timestamp.Before(first)) {
				first = l.Timestamp
			}
		}
	}
	if first.IsZero() {
		return 0, false
	}
	return first.Sub(r.Start), true
}

// FirstOutput returns when the first step printed anything, counted from the start of the
// client. A RUN counts as running when its command does: the vertex itself starts earlier,
// with the wait for its base image.
func (r *Result) FirstOutput() (time.Duration, bool) { return r.Said("") }
