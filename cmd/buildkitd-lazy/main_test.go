package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

// Set in the environment, asDaemon makes the test binary the daemon: a second binary would be linked against all of
// BuildKit too. mountHere names what to mount on before, in the process's own mount namespace: a tmpfs with
// mountOptions, or, where these are "bind=FILE", that file.
const (
	asDaemon     = "BUILDKITD_LAZY_TEST_DAEMON"
	mountHere    = "BUILDKITD_LAZY_TEST_MOUNT"
	mountOptions = "BUILDKITD_LAZY_TEST_MOUNT_OPTIONS"
)

func TestMain(m *testing.M) {
	if erofs.GuardianMain(os.Args) || fuse.GuardianMain(os.Args) {
		return
	}
	if os.Getenv(asDaemon) == "" {
		os.Exit(m.Run())
	}
	if dir := os.Getenv(mountHere); dir != "" {
		if err := mountTest(dir, os.Getenv(mountOptions)); err != nil {
			println("mount:", err.Error())
			os.Exit(99)
		}
	}
	main()
}

func mountTest(dir, options string) error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if from, ok := strings.CutPrefix(options, "bind="); ok {
		return syscall.Mount(from, dir, "", syscall.MS_BIND, "")
	}
	var flags uintptr
	if rest, ok := strings.CutPrefix(options, "ro"); ok {
		flags, options = syscall.MS_RDONLY, rest
	}
	return syscall.Mount("tmpfs", dir, "tmpfs", flags, options)
}

// daemonCommand runs the daemon with args and an environment of its own.
func daemonCommand(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Env = append([]string{asDaemon + "=1", "PATH=" + os.Getenv("PATH"), "USER=root", "HOME=" + t.TempDir()}, env...)
	return cmd
}

// outcome of a command that has ended.
type outcome struct {
	status         int
	stdout, stderr string
}

func runDaemon(t *testing.T, cmd *exec.Cmd) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the status says it
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// lastLine is the error that the daemon ended with, after what it logged.
func (o outcome) lastLine() string {
	lines := strings.Split(strings.TrimSpace(o.stderr), "\n")
	return lines[len(lines)-1]
}

// inNamespaces gives the command its own mounts; an unprivileged user becomes root in a user namespace for that.
func inNamespaces(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
}

// needRoot fails a test that has to be root and isn't.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: run it as root")
	}
}
