package main

import (
	"context"
	"errors"
	"expvar"
	"fmt"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/bklog"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/trace"
)

// debugServer serves pprof, metrics, and looks into the build cache and lazy layers. It is off unless an address is configured, and
// whoever reaches the address may use it.
type debugServer struct {
	server *http.Server
	done   chan struct{}
	cache  atomic.Pointer[solver.CacheKeyStorage] // nil until the cache is open
	lazy   atomic.Pointer[lazyStats]              // nil until the worker is there
}

func (d *debugServer) setCache(cache solver.CacheKeyStorage) { d.cache.Store(&cache) }

func (d *debugServer) handler() http.Handler {
	m := http.NewServeMux()
	m.Handle("/debug/vars", expvar.Handler())
	m.HandleFunc("/debug/pprof/", pprof.Index)
	m.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	m.HandleFunc("/debug/pprof/profile", pprof.Profile)
	m.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	m.HandleFunc("/debug/pprof/trace", pprof.Trace)
	m.HandleFunc("/debug/requests", trace.Traces)
	m.HandleFunc("/debug/events", trace.Events)
	m.HandleFunc("/debug/gc", func(_ http.ResponseWriter, r *http.Request) {
		runtime.GC()
		bklog.G(r.Context()).Debug("garbage collected on request of the debug endpoint")
	})
	m.Handle("/metrics", promhttp.Handler())
	d.handleCache(m)
	m.HandleFunc("/debug/lazy", d.serveLazy)
	new(flightRecorder).handle(m)
	return m
}

// start serves on addr, which is tcp unless it names a protocol.
func (d *debugServer) start(ctx context.Context, addr string) error {
	// x/net/trace lets only localhost in by itself; here the address decides.
	trace.AuthRequest = func(*http.Request) (bool, bool) { return true, true }

	if !strings.Contains(addr, "://") {
		addr = "tcp://" + addr
	}
	l, err := listenOn(ctx, addr, os.Getuid(), os.Getgid(), nil)
	if err != nil {
		return fmt.Errorf("debug address (--debugaddr) %s: %w", addr, err)
	}
	d.server = &http.Server{Handler: d.handler(), ReadHeaderTimeout: time.Minute}
	d.done = make(chan struct{})
	bklog.G(ctx).WithField("addr", addr).Debug("serving debug handlers")
	go func() {
		defer close(d.done)
		if err := d.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			bklog.G(ctx).WithError(err).Error("debug handlers are not served any more")
		}
	}()
	return nil
}

// Close breaks off what is being served.
func (d *debugServer) Close() error {
	if d.server == nil {
		return nil
	}
	err := d.server.Close()
	<-d.done
	return err
}
