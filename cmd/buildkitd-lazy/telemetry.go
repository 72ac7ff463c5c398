package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/moby/buildkit/util/appcontext"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/tracing"
	"github.com/moby/buildkit/util/tracing/detect"
	"github.com/moby/buildkit/util/tracing/transform"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	tracev1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
)

// telemetryShutdown is how long the last spans and metrics may take on their way out.
const telemetryShutdown = 5 * time.Second

var errTelemetryShutdown = fmt.Errorf("traces and metrics took longer than %v to send", telemetryShutdown)

// telemetry holds the providers of traces and metrics. Both send to what the OTEL_* variables name; metrics go to
// /metrics besides.
type telemetry struct {
	tracer *sdktrace.TracerProvider
	meter  *sdkmetric.MeterProvider
}

func startTelemetry(ctx context.Context) (*telemetry, error) {
	traceOpts := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(detect.Resource()),
		sdktrace.WithSyncer(detect.Recorder),
	}
	spans, err := detect.NewSpanExporter(ctx)
	if err != nil {
		return nil, fmt.Errorf("OpenTelemetry traces: %w", err)
	}
	if !detect.IsNoneSpanExporter(spans) {
		traceOpts = append(traceOpts, sdktrace.WithBatcher(spans))
	}

	meterOpts := []sdkmetric.Option{
		sdkmetric.WithResource(detect.Resource()),
		sdkmetric.WithView(buildDurationView()),
	}
	if reader, err := prometheus.New(); err != nil {
		bklog.G(ctx).WithError(err).Error("no build metrics at /metrics")
	} else {
		meterOpts = append(meterOpts, sdkmetric.WithReader(reader))
	}
	metrics, err := detect.NewMetricExporter(ctx)
	if err != nil {
		return nil, fmt.Errorf("OpenTelemetry metrics: %w", err)
	}
	if !detect.IsNoneMetricExporter(metrics) {
		meterOpts = append(meterOpts, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metrics)))
	}
	return &telemetry{
		tracer: sdktrace.NewTracerProvider(traceOpts...),
		meter:  sdkmetric.NewMeterProvider(meterOpts...),
	}, nil
}

// Close sends what is left, and gives up after telemetryShutdown or at the second signal.
func (t *telemetry) Close() error {
	ctx, cancel := context.WithTimeoutCause(appcontext.Shutdown(), telemetryShutdown, errTelemetryShutdown)
	defer cancel()
	err := errors.Join(t.tracer.Shutdown(ctx), t.meter.Shutdown(ctx))
	if appcontext.Shutdown().Err() != nil {
		return nil // given up on request
	}
	return err
}

func (t *telemetry) statsHandler() grpc.ServerOption {
	return grpc.StatsHandler(tracing.ServerStatsHandler(
		otelgrpc.WithTracerProvider(t.tracer),
		otelgrpc.WithMeterProvider(t.meter),
		otelgrpc.WithPropagators(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})),
	))
}

// buildDurationView makes buildkit.build.duration a Prometheus native histogram. With fixed buckets, and whatever
// attributes a caller sets, it can grow to millions of series (moby/buildkit#5777).
func buildDurationView() sdkmetric.View {
	return sdkmetric.NewView(
		sdkmetric.Instrument{Name: "buildkit.build.duration", Kind: sdkmetric.InstrumentKindHistogram},
		sdkmetric.Stream{
			Aggregation:     sdkmetric.AggregationBase2ExponentialHistogram{MaxSize: 160, MaxScale: 20},
			AttributeFilter: attribute.NewAllowKeysFilter("status"),
		},
	)
}

// collector takes the traces that build steps send.
type collector struct {
	tracev1.UnimplementedTraceServiceServer

	to sdktrace.SpanExporter
}

func (c *collector) Export(ctx context.Context, req *tracev1.ExportTraceServiceRequest) (*tracev1.ExportTraceServiceResponse, error) {
	if err := c.to.ExportSpans(ctx, transform.Spans(req.GetResourceSpans())); err != nil {
		return nil, err
	}
	return &tracev1.ExportTraceServiceResponse{}, nil
}

// startCollector serves a collector on a unix socket, which is mounted into build steps. stop waits for it.
func startCollector(path string, to sdktrace.SpanExporter) (stop func(), err error) {
	l, err := listenForAll(path)
	if err != nil {
		return nil, fmt.Errorf("listen for traces of build steps on %s (--otel-socket-path): %w", path, err)
	}
	server := grpc.NewServer()
	tracev1.RegisterTraceServiceServer(server, &collector{to: to})
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, grpc.ErrServerStopped) {
			bklog.L.WithError(err).WithField("path", path).Error("traces of build steps are not received any more")
		}
	}()
	return func() {
		server.Stop()
		<-done
	}, nil
}

// spanExporters are the places that builds' traces go to: the recorder, from which clients fetch the traces of their
// builds, and what the OTEL_* variables name.
func spanExporters(ctx context.Context) (tracing.MultiSpanExporter, error) {
	var all tracing.MultiSpanExporter
	if detect.Recorder != nil {
		all = append(all, detect.Recorder)
	}
	exp, err := detect.NewSpanExporter(ctx)
	if err != nil {
		return nil, fmt.Errorf("OpenTelemetry traces: %w", err)
	}
	if !detect.IsNoneSpanExporter(exp) {
		all = append(all, exp)
	}
	return all, nil
}
