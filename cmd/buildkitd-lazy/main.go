// Command buildkitd-lazy is a BuildKit daemon that starts a build's first step before its base image has arrived.
//
// It takes the flags, the environment variables and the buildkitd.toml of stock buildkitd's OCI worker, with the same
// meaning, and serves the same API. What it adds: the [lazy] table (package config), the flag --lazy-mount, and commands that
// need no daemon: `check` says what the host offers, `inspect` which layers of an image are lazy, and `convert` makes lazy images of others.
//
// # Life of the process
//
// Start: configuration, then the lock on the state directory, then the listeners (a client that connects from now on
// waits instead of being refused), then the worker, then the API. Whatever fails on the way is one line on stderr
// and exit status 1; with --debug the stack traces follow.
//
// Stop: SIGTERM or SIGINT closes the listeners and lets running builds end; a second one breaks them off. Either way
// the worker is closed, so that no mount stays behind, and the exit status is 0 unless builds were broken off.
//
// This is the only package that prints: answers on stdout, logs on stderr.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/moby/buildkit/util/apicaps"
	_ "github.com/moby/buildkit/util/grpcutil/encoding/proto" // the codec that BuildKit's clients expect
	"github.com/moby/buildkit/util/stack"
	_ "github.com/moby/buildkit/util/tracing/childprocess" // takes the trace context out of the environment
	"github.com/moby/buildkit/util/tracing/detect"
	_ "github.com/moby/buildkit/util/tracing/detect/jaeger" // OTEL_TRACES_EXPORTER=jaeger
	bkversion "github.com/moby/buildkit/version"
	"github.com/sirupsen/logrus"
	fscopy "github.com/tonistiigi/fsutil/copy"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/sha256s"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

func main() {
	if erofs.GuardianMain(os.Args) || fuse.GuardianMain(os.Args) {
		return
	}
	sha256s.Register()
	// Modes in images are what the Dockerfile says, not what the daemon's umask makes of them; fsutil skips a chmod
	// for every file when it may rely on that.
	syscall.Umask(0)
	fscopy.UmaskIsZero = true

	reportBuildKitVersion()
	stack.SetVersionInfo(bkversion.Version, bkversion.Revision)
	apicaps.ExportedProduct = "buildkit" // as stock: frontends ask for it by this name
	detect.Recorder = detect.NewTraceRecorder()

	os.Exit(run(os.Args, os.Stdout, os.Stderr))
}

// run returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	app := newApp(stdout, stderr)
	err := app.Run(context.Background(), args)
	if err == nil {
		return 0
	}
	if app.Bool("debug") || logrus.IsLevelEnabled(logrus.DebugLevel) {
		fmt.Fprintf(stderr, "%s: %+v\n", app.Name, stack.Formatter(err))
	} else {
		// Joined errors stand on a line each; one that fails is one line.
		fmt.Fprintf(stderr, "%s: %s\n", app.Name, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return exitStatus(err)
}

var flagStringer = cli.FlagStringer

func newApp(stdout, stderr io.Writer) *cli.Command {
	cli.VersionPrinter = func(c *cli.Command) {
		fmt.Fprintln(c.Root().Writer, versionLine())
	}
	cli.FlagStringer = shortSlices(flagStringer)
	def := builtinDefaults()
	app := &cli.Command{
		Name:                          "buildkitd-lazy",
		Usage:                         "a BuildKit daemon whose base images arrive while they are used",
		UsageText:                     "buildkitd-lazy [flags]\nbuildkitd-lazy COMMAND [flags]",
		Version:                       cliVersion(),
		Flags:                         append(daemonFlags(&def), ignoredContainerdFlags()...),
		Commands:                      []*cli.Command{checkCommand(&def), convertCommand(), inspectCommand()},
		Action:                        daemon,
		OnUsageError:                  usageError,
		CustomRootCommandHelpTemplate: helpTemplate,
		DisableSliceFlagSeparator:     true,
		Writer:                        stdout,
		ErrWriter:                     stderr,
		// The library exits on its own, silently, where an error has an exit code - as every failed exec.Cmd has.
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
	}
	attachProfiler(app)
	return app
}
