package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/defaults"
	sddaemon "github.com/coreos/go-systemd/v22/daemon"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/util/appcontext"
	"github.com/moby/buildkit/util/appdefaults"
	"github.com/moby/buildkit/util/archutil"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/cachedigest"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/buildkit/util/resolver/limited"
	"github.com/moby/buildkit/util/stack"
	bkversion "github.com/moby/buildkit/version"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
)

var (
	errStopped = errors.New("daemon stopped")
	errForced  = errors.New("stopped by a second signal: builds that were running were broken off")
)

// daemon is the action of the command itself: it serves until a signal comes.
func daemon(_ context.Context, c *cli.Command) (err error) {
	if c.Args().Present() {
		return fmt.Errorf("unknown command %q; the commands are %s, and the daemon takes flags alone", c.Args().First(), commandNames(c))
	}
	if os.Geteuid() > 0 {
		return errRootless
	}
	s, err := loadSettings(c)
	if err != nil {
		return err
	}
	if err := setupLogging(s.buildkit); err != nil {
		return err
	}
	cfg := &s.buildkit

	// signalled ends at the first SIGTERM or SIGINT; builds run on in lifetime, until the worker is closed.
	signalled := appcontext.Context()
	lifetime, end := context.WithCancelCause(context.WithoutCancel(signalled))
	defer end(errStopped)

	for _, w := range s.warnings {
		bklog.G(signalled).Warn(w)
	}
	if err := setupSystem(cfg.System); err != nil {
		return err
	}
	cleanup := func(what string, close func() error) {
		if cerr := close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", what, cerr))
		}
	}

	var debug debugServer
	if cfg.GRPC.DebugAddress != "" {
		if err := debug.start(signalled, cfg.GRPC.DebugAddress); err != nil {
			return err
		}
		defer cleanup("stop debug server", debug.Close)
	}
	tel, err := startTelemetry(lifetime)
	if err != nil {
		return err
	}
	defer cleanup("send telemetry", tel.Close)

	state, err := openStateDir(cfg.Root)
	if err != nil {
		return err
	}
	defer cleanup("release state directory", state.Close)
	cfg.Root = state.path

	if rootlessPaths() {
		if err := appdefaults.EnsureUserAddressDir(); err != nil {
			bklog.G(signalled).WithError(err).Warn("the directory of the default socket cannot be kept from being cleaned up")
		}
	}
	// The listeners come before the worker, which takes its time: clients wait in the queue of the socket
	// (moby/buildkit#4618).
	listeners, err := listen(signalled, cfg.GRPC)
	if err != nil {
		return err
	}
	defer closeAll(listeners)

	if c.Bool("save-cache-debug") {
		db, err := cachedigest.NewDB(filepath.Join(cfg.Root, "cache-debug.db"))
		if err != nil {
			return state.explain(fmt.Errorf("open cache debug database: %w", err))
		}
		cachedigest.SetDefaultDB(db)
		defer cleanup("close cache debug database", db.Close)
	}

	api, err := newAPI(lifetime, s, tel, signalled.Done())
	if err != nil {
		return state.explain(err)
	}
	defer cleanup("close", api.Close)
	debug.setCache(api.cache)
	debug.setLazy(api.worker)

	server := grpc.NewServer(
		tel.statsHandler(),
		grpc.ChainUnaryInterceptor(logErrors, grpcerrors.UnaryServerInterceptor, api.worker.Reporter().UnaryInterceptor()),
		grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
	)
	healthv1.RegisterHealthServer(server, health.NewServer())
	api.controller.Register(server)
	reflection.Register(server)

	bklog.G(signalled).WithFields(logrus.Fields{
		"version":  version,
		"revision": sourceRevision(),
		"buildkit": bkversion.Version,
		"root":     cfg.Root,
	}).Info("buildkitd-lazy is ready")
	return serve(signalled, server, listeners)
}

// serve answers on all listeners until ctx ends, or until one of them fails. It returns nil for a stop in good order.
func serve(ctx context.Context, server *grpc.Server, listeners []net.Listener) error {
	var eg errgroup.Group
	for _, l := range listeners {
		eg.Go(func() error {
			bklog.L.WithField("addr", l.Addr().String()).Infof("running server on %s", l.Addr())
			if err := server.Serve(l); err != nil {
				return fmt.Errorf("serve on %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	failed := make(chan error, 1)
	go func() { failed <- eg.Wait() }()
	notify(sddaemon.SdNotifyReady)

	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	bklog.G(ctx).Info("stopping server")
	notify(sddaemon.SdNotifyStopping)

	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		server.GracefulStop()
	}()
	select {
	case <-stopped:
		return err
	case <-appcontext.Shutdown().Done():
		server.Stop()
		<-stopped
		return errors.Join(err, errForced)
	}
}

// notify tells systemd, where there is one.
func notify(state string) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	sent, err := sddaemon.SdNotify(false, state)
	bklog.L.WithFields(logrus.Fields{"state": state, "sent": sent, logrus.ErrorKey: err}).Debug("told systemd")
}

func setupLogging(cfg bkconfig.Config) error {
	switch cfg.Log.Format {
	case "json":
		logrus.SetFormatter(&logrus.JSONFormatter{})
	case "text", "":
		logrus.SetFormatter(&logrus.TextFormatter{FullTimestamp: true})
	default:
		return fmt.Errorf("unknown log format %q; want json or text", cfg.Log.Format)
	}
	if cfg.Debug { //nolint:staticcheck // deprecated, but in people's files
		logrus.SetLevel(logrus.DebugLevel)
	}
	if cfg.Trace { //nolint:staticcheck // deprecated, but in people's files
		logrus.SetLevel(logrus.TraceLevel)
	}
	if cfg.Log.Level == "" {
		return nil
	}
	level, err := logrus.ParseLevel(cfg.Log.Level)
	if err != nil {
		return fmt.Errorf("unknown log level %q; want panic, fatal, error, warn, info, debug or trace", cfg.Log.Level)
	}
	logrus.SetLevel(level)
	return nil
}

func setupSystem(cfg *bkconfig.SystemConfig) error {
	if cfg == nil {
		return nil
	}
	if v := cfg.PlatformsCacheMaxAge; v != nil {
		archutil.CacheMaxAge = v.Duration
	}
	if v := cfg.MaxRegistryConcurrency; v != nil {
		if *v <= 0 {
			return fmt.Errorf("maxRegistryConcurrency in [system] is %d; it has to be greater than zero", *v)
		}
		limited.SetMaxConcurrency(int64(*v))
	}
	return nil
}

// logErrors logs what a client is answered with, with the stack traces where they are wanted.
func logErrors(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err == nil || strings.HasSuffix(info.FullMethod, "opentelemetry.proto.collector.trace.v1.TraceService/Export") {
		return resp, err
	}
	bklog.G(ctx).Errorf("%s returned error: %v", info.FullMethod, err)
	if logrus.IsLevelEnabled(logrus.DebugLevel) {
		fmt.Fprintf(os.Stderr, "%+v", stack.Formatter(grpcerrors.FromGRPC(err)))
	}
	return resp, err
}
