package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/buildkit/cache/remotecache"
	"github.com/moby/buildkit/cache/remotecache/azblob"
	"github.com/moby/buildkit/cache/remotecache/gha"
	"github.com/moby/buildkit/cache/remotecache/inline"
	"github.com/moby/buildkit/cache/remotecache/local"
	"github.com/moby/buildkit/cache/remotecache/registry"
	"github.com/moby/buildkit/cache/remotecache/s3"
	"github.com/moby/buildkit/client"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/frontend"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	dockerfileversion "github.com/moby/buildkit/frontend/dockerfile/version"
	"github.com/moby/buildkit/frontend/gateway"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/util/appdefaults"
	"github.com/moby/buildkit/util/archutil"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/db/boltutil"
	bkversion "github.com/moby/buildkit/version"
	bkworker "github.com/moby/buildkit/worker"
	policy "github.com/moby/policy-helpers"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"

	"github.com/buildkitd-lazy/buildkitd-lazy/exporter"
	"github.com/buildkitd-lazy/buildkitd-lazy/worker"
)

// api is BuildKit's controller over our worker, and what has to be closed with it.
type api struct {
	controller *control.Controller
	worker     *worker.Worker
	cache      *bboltcachestorage.Store

	stopCollector func()
}

// newAPI opens the databases, builds the worker and puts the controller on top. On an error nothing stays open.
// ctx is the life of the builds; stopping says that the daemon was told to stop.
func newAPI(ctx context.Context, s settings, tel *telemetry, stopping <-chan struct{}) (_ *api, err error) {
	cfg := &s.buildkit
	var opened []func() error
	defer func() {
		if err != nil {
			for _, close := range slices.Backward(opened) {
				err = errors.Join(err, close())
			}
		}
	}()

	sessions, err := session.NewManager()
	if err != nil {
		return nil, err
	}
	a := &api{stopCollector: func() {}}
	spans, err := spanExporters(ctx)
	if err != nil {
		return nil, err
	}
	traceSocket := ""
	if len(spans) > 0 {
		traceSocket = cfg.OTEL.SocketPath
		if a.stopCollector, err = startCollector(traceSocket, spans); err != nil {
			return nil, err
		}
		opened = append(opened, func() error { a.stopCollector(); return nil })
	}

	if a.worker, err = worker.New(ctx, worker.Options{
		Config:         cfg,
		Lazy:           s.lazy,
		SessionManager: sessions,
		TraceSocket:    traceSocket,
		Version:        reportedVersion(),
		MeterProvider:  tel.meter,
	}); err != nil {
		return nil, fmt.Errorf("start OCI worker: %w", err)
	}
	opened = append(opened, a.worker.Close)
	workers := &bkworker.Controller{}
	if err := workers.Add(a.worker); err != nil {
		return nil, err
	}
	ps := a.worker.Platforms(false)
	bklog.G(ctx).WithFields(logrus.Fields{"worker": a.worker.ID(), "labels": a.worker.Labels(), "platforms": formatPlatforms(ps)}).Info("worker started")
	archutil.WarnIfUnsupported(ps)

	frontends, err := newFrontends(cfg, workers)
	if err != nil {
		return nil, err
	}
	if a.cache, err = bboltcachestorage.NewStore(filepath.Join(cfg.Root, "cache.db")); err != nil {
		return nil, fmt.Errorf("open build cache: %w", err)
	}
	opened = append(opened, a.cache.Close)
	history, err := boltutil.SafeOpen(filepath.Join(cfg.Root, "history.db"), 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, fmt.Errorf("open build history: %w", err)
	}
	opened = append(opened, history.Close)

	provenance, err := provenanceEnv(cfg.ProvenanceEnvDir)
	if err != nil {
		return nil, err
	}
	entitlements := cfg.Entitlements
	if cfg.CDI.Disabled == nil || !*cfg.CDI.Disabled {
		entitlements = append(slices.Clip(entitlements), "device")
	}
	exporters, importers := remoteCaches(cfg, sessions, a.worker)

	a.controller, err = control.NewController(control.Opt{
		SessionManager:            sessions,
		WorkerController:          workers,
		Frontends:                 frontends,
		ResolveCacheExporterFuncs: exporters,
		ResolveCacheImporterFuncs: importers,
		CacheManager:              solver.NewCacheManager(ctx, "local", a.cache, bkworker.NewCacheResultStorage(workers)),
		Entitlements:              entitlements,
		TraceCollector:            spans,
		MeterProvider:             tel.meter,
		HistoryDB:                 history,
		CacheStore:                a.cache,
		LeaseManager:              a.worker.LeaseManager(),
		ContentStore:              a.worker.ContentStore(),
		HistoryConfig:             cfg.History,
		ProxyNetwork:              cfg.ProxyNetwork,
		GarbageCollect:            a.worker.GarbageCollect,
		GracefulStop:              stopping,
		ProvenanceEnv:             provenance,
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Close closes the worker and the databases, which all are the controller's.
func (a *api) Close() error {
	defer a.stopCollector()
	return a.controller.Close()
}

func newFrontends(cfg *bkconfig.Config, workers *bkworker.Controller) (map[string]frontend.Frontend, error) {
	on := func(enabled *bool) bool { return enabled == nil || *enabled }
	frontends := map[string]frontend.Frontend{}
	if on(cfg.Frontends.Dockerfile.Enabled) {
		frontends["dockerfile.v0"] = forwarder.NewGatewayForwarder(workers.Infos(), dockerfile.Build)
	}
	if on(cfg.Frontends.Gateway.Enabled) {
		gw, err := gateway.NewGatewayFrontend(workers.Infos(), cfg.Frontends.Gateway.AllowedRepositories)
		if err != nil {
			return nil, fmt.Errorf("frontend gateway.v0: %w", err)
		}
		frontends["gateway.v0"] = gw
	}
	return frontends, nil
}

func remoteCaches(cfg *bkconfig.Config, sm *session.Manager, w *worker.Worker) (map[string]remotecache.ResolveCacheExporterFunc, map[string]remotecache.ResolveCacheImporterFunc) {
	hosts := worker.RegistryHosts(cfg.Registries)
	var verifier func() (*policy.Verifier, error)
	if cfg.Cache.GHA != nil && cfg.Cache.GHA.Verify.Required {
		verifier = sync.OnceValues(func() (*policy.Verifier, error) {
			return policy.NewVerifier(policy.Config{StateDir: filepath.Join(cfg.Root, "policy")})
		})
	}
	lists := &exporter.Lists{Sessions: sm, Dir: cfg.Root}
	return map[string]remotecache.ResolveCacheExporterFunc{
			"registry": exporter.Cache("registry", registry.ResolveCacheExporterFunc(sm, hosts), lists, w.Reporter().Bases),
			"local":    exporter.Cache("local", local.ResolveCacheExporterFunc(sm), lists, w.Reporter().Bases),
			"inline":   inline.ResolveCacheExporterFunc(),
			"gha":      exporter.Shared(gha.ResolveCacheExporterFunc(cfg.Cache.GHA, verifier)),
			"s3":       exporter.Shared(s3.ResolveCacheExporterFunc()),
			"azblob":   exporter.Shared(azblob.ResolveCacheExporterFunc()),
		}, map[string]remotecache.ResolveCacheImporterFunc{
			"registry": registry.ResolveCacheImporterFunc(sm, w.ContentStore(), hosts),
			"local":    local.ResolveCacheImporterFunc(sm),
			"gha":      gha.ResolveCacheImporterFunc(cfg.Cache.GHA, verifier),
			"s3":       s3.ResolveCacheImporterFunc(),
			"azblob":   azblob.ResolveCacheImporterFunc(),
		}
}

// reportedVersion is what ListWorkers says; see reportBuildKitVersion.
func reportedVersion() client.BuildkitVersion {
	return client.BuildkitVersion{
		Package:           bkversion.Package,
		Version:           bkversion.Version,
		Revision:          bkversion.Revision,
		DockerfileVersion: dockerfileversion.Version(),
	}
}

// provenanceEnv reads the *.json files in dir, or in the default directory, which builds' provenance is extended by.
// A later file overrides the keys of an earlier one.
func provenanceEnv(dir string) (map[string]any, error) {
	if dir == "" {
		dir = filepath.Join(appdefaults.ConfigDir, "provenance.d")
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read provenance directory: %w", err)
	}
	env := map[string]any{}
	for _, e := range entries {
		if e.IsDir() || !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read provenance: %w", err)
		}
		if err := json.Unmarshal(data, &env); err != nil {
			return nil, fmt.Errorf("read provenance %s: %w", path, err)
		}
	}
	return env, nil
}
