package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// inside is where the working directory appears in a sandbox. It is short
// because tests make sockets below it, whose paths have at most 107 bytes.
const inside = "/run/u"

// sandboxArg is the hidden first argument with which this command starts
// itself as process 1 of a sandbox.
const sandboxArg = "_sandbox"

// A sandbox is a set of new namespaces (mount, process, network, IPC, UTS) to
// run one command in. It has a loopback interface and nothing else, a copy of
// /etc and /opt that may be written to, and an empty /run. When its process 1
// ends, and it ends when this command is killed, the kernel ends every other
// process and drops every mount: a failed test leaves nothing behind.
type sandbox struct {
	Work  string            // absolute; appears as inside
	Binds map[string]string // path in the sandbox, absolute or below inside: file or directory outside
	Files map[string]string // path in the sandbox below /etc or /opt: content
	Links map[string]string // path in the sandbox below /etc or /opt: target
	Env   []string
	Dir   string
	Args  []string
	Leaks string // file in the sandbox that receives leftovers as JSON

	Foreign string // file in the sandbox to serve on foreignPort
}

// leftovers is what a command left running or mounted when it ended.
type leftovers struct {
	Mounts    []string `json:"mounts,omitempty"`
	Processes []string `json:"processes,omitempty"`
}

// run starts the sandbox's command and waits for it. Cancelling ctx kills
// everything in the sandbox.
func (s sandbox) run(ctx context.Context, stdout, stderr io.Writer) error {
	spec, err := json.Marshal(s)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", sandboxArg, string(spec))
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Pdeathsig:  unix.SIGKILL,
		Setsid:     true,
	}
	return cmd.Run()
}

// sandboxMain is process 1 of a sandbox. It returns the exit status.
func sandboxMain(spec string) (int, error) {
	var s sandbox
	if err := json.Unmarshal([]byte(spec), &s); err != nil {
		return 0, err
	}
	if err := s.enter(); err != nil {
		return 0, fmt.Errorf("prepare sandbox: %w", err)
	}
	if s.Foreign != "" {
		if err := serveForeign(context.Background(), s.Foreign); err != nil {
			return 0, err
		}
	}
	if err := serveNoNames(context.Background()); err != nil {
		return 0, err
	}
	bin, err := lookPath(s.Args[0], s.Env)
	if err != nil {
		return 0, err
	}
	proc, err := os.StartProcess(bin, s.Args, &os.ProcAttr{
		Dir:   s.Dir,
		Env:   s.Env,
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", bin, err)
	}
	// Process 1 inherits orphans, so it waits for whatever ends.
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		if pid != proc.Pid {
			continue
		}
		if s.Leaks != "" {
			if err := writeJSON(s.Leaks, findLeftovers()); err != nil {
				return 0, err
			}
		}
		if status.Signaled() {
			return 128 + int(status.Signal()), nil
		}
		return status.ExitStatus(), nil
	}
}

func (s sandbox) enter() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}

	// What is bound may lie below /run, which disappears: hold it open.
	held := map[string]*os.File{}
	defer func() {
		for _, f := range held {
			f.Close()
		}
	}()
	for dst, src := range s.Binds {
		f, err := openPath(src)
		if err != nil {
			return err
		}
		if !filepath.IsAbs(dst) {
			dst = filepath.Join(inside, dst)
		}
		held[dst] = f
	}
	work, err := openPath(s.Work)
	if err != nil {
		return err
	}
	defer work.Close()

	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := bind(work, inside); err != nil {
		return err
	}
	for _, dst := range slices.Sorted(maps.Keys(held)) {
		if err := bind(held[dst], dst); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/etc", "/opt"} {
		if err := writable(dir); err != nil {
			return err
		}
	}
	for name, content := range s.Files {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil { //nolint:gosec // configuration that daemons read
			return err
		}
	}
	for name, target := range s.Links {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, name); err != nil {
			return err
		}
	}
	return nil
}

// writable mounts an overlay on dir that keeps what is written to it in
// memory.
func writable(dir string) error {
	base := "/run/upper" + dir
	for _, sub := range []string{"", "/u", "/w"} {
		if err := os.MkdirAll(base+sub, 0o755); err != nil {
			return err
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/u,workdir=%s/w", dir, base, base)
	if err := unix.Mount("overlay", dir, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount a writable %s: %w", dir, err)
	}
	return nil
}

func openPath(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// bind mounts what src refers to on dst, which it makes.
func bind(src *os.File, dst string) error {
	fi, err := src.Stat()
	if err != nil {
		return err
	}
	if fi.IsDir() {
		err = os.MkdirAll(dst, 0o755)
	} else {
		err = os.MkdirAll(filepath.Dir(dst), 0o755)
		if err == nil {
			var f *os.File
			f, err = os.OpenFile(dst, os.O_CREATE, 0o755)
			if err == nil {
				f.Close()
			}
		}
	}
	if err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", src.Fd())
	if err := unix.Mount(from, dst, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", src.Name(), dst, err)
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// serveNoNames answers every DNS query with NXDOMAIN, so that whatever asks for
// a host outside learns at once that there is none.
func serveNoNames(ctx context.Context) error {
	conn, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp", "127.0.0.1:53")
	if err != nil {
		return err
	}
	go refuseNames(conn)
	return nil
}

// refuseNames answers queries until conn is closed.
func refuseNames(conn net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if n < 12 {
			continue
		}
		buf[2] = buf[2]&0x79 | 0x80 // RFC 1035, 4.1.1: an answer, keeping opcode and RD
		buf[3] = 0x83               // recursion available, name error
		clear(buf[6:12])            // no records; the question stays
		end := 12
		for end < n && buf[end] != 0 {
			end += int(buf[end]) + 1
		}
		if end += 5; end > n {
			continue
		}
		_, _ = conn.WriteTo(buf[:end], from)
	}
}

// findLeftovers lists the mounts below the sandbox's TMPDIR and the processes
// other than this one.
func findLeftovers() leftovers {
	var l leftovers
	info, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(info)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && strings.HasPrefix(fields[4], inside+"/tmp/") {
			_, kind, _ := strings.Cut(line, " - ")
			kind, _, _ = strings.Cut(kind, " ")
			l.Mounts = append(l.Mounts, kind+" on "+fields[4])
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == 1 {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(p, "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue
		}
		l.Processes = append(l.Processes, strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " ")))
	}
	return l
}

// lookPath is exec.LookPath with the PATH of env.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, kv := range slices.Backward(env) {
		path, ok := strings.CutPrefix(kv, "PATH=")
		if !ok {
			continue
		}
		for dir := range strings.SplitSeq(path, ":") {
			full := filepath.Join(dir, name)
			if fi, err := os.Stat(full); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
				return full, nil
			}
		}
		break
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}
