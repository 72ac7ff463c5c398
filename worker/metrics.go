package worker

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// meterName is the scope of the metrics; their names and units are such that Prometheus, to which the exporter translates
// them, gets buildkitd_lazy_fetched_bytes_total and so on.
const meterName = "github.com/buildkitd-lazy/buildkitd-lazy"

func meterOf(p metric.MeterProvider) metric.Meter {
	if p == nil {
		p = noop.NewMeterProvider()
	}
	return p.Meter(meterName)
}

// waitHistogram is the time that reads waited for bytes. Its buckets go from a registry next door to the longest that
// reads are retried for by default.
func waitHistogram(meter metric.Meter) (metric.Float64Histogram, error) {
	h, err := meter.Float64Histogram("buildkitd_lazy.wait", metric.WithUnit("s"),
		metric.WithDescription("Time that reads of lazy layers waited for bytes to arrive."),
		metric.WithExplicitBucketBoundaries(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60))
	if err != nil {
		return nil, fmt.Errorf("metrics of lazy layers: %w", err)
	}
	return h, nil
}

// registerMetrics has the figures read when somebody asks for them: nothing is done for them before.
func registerMetrics(meter metric.Meter, summary func() snapshot.Summary) (unregister func() error, err error) {
	var all []metric.Observable
	keep := func(o metric.Observable, oerr error) {
		if oerr != nil && err == nil {
			err = fmt.Errorf("metrics of lazy layers: %w", oerr)
		}
		all = append(all, o)
	}
	counter := func(name, unit, help string) metric.Int64ObservableCounter {
		c, err := meter.Int64ObservableCounter("buildkitd_lazy."+name, metric.WithUnit(unit), metric.WithDescription(help))
		keep(c, err)
		return c
	}
	gauge := func(name, unit, help string) metric.Int64ObservableGauge {
		g, err := meter.Int64ObservableGauge("buildkitd_lazy."+name, metric.WithUnit(unit), metric.WithDescription(help))
		keep(g, err)
		return g
	}
	fetched := counter("fetched", "By", "Bytes received from registries for lazy layers, tables of contents included.")
	copied := counter("copied", "By", "Compressed bytes of lazy layers that were not fetched, as chunks with the same digests were there.")
	served := counter("served", "By", "Bytes of lazy layers that reads asked the daemon for and got. Reads that the kernel answers are not among them.")
	misses := counter("demand_misses", "", "Reads of lazy layers that waited for bytes to arrive.")
	failures := counter("read_errors", "", "Reads of lazy layers that failed.")
	retries := counter("retries", "", "Requests for bytes of lazy layers that were made again.")
	corrupt := counter("verification_failures", "", "Frames and tables of contents that were not what their digest says. None of their bytes reached a reader.")
	queue := gauge("queue", "By", "Compressed bytes of lazy layers that are to be fetched or on their way.")
	unswept := gauge("background_queue_frames", "", "Frames of lazy layers that background fetching has not come to yet.")
	mounted := gauge("mounted_layers", "", "Lazy layers that are mounted.")
	if err != nil {
		return nil, err
	}
	priority := func(name string) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(attribute.String("priority", name)))
	}
	reg, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		st := summary()
		if st.Door == "" {
			return nil
		}
		o.ObserveInt64(fetched, st.Totals.Fetched)
		o.ObserveInt64(copied, st.Totals.Copied)
		o.ObserveInt64(served, st.Totals.Served)
		o.ObserveInt64(misses, st.Totals.Misses)
		o.ObserveInt64(failures, st.Totals.Errors)
		o.ObserveInt64(retries, st.Totals.Retries)
		o.ObserveInt64(corrupt, st.Totals.Corrupt)
		o.ObserveInt64(queue, st.Queue.Demand, priority("demand"))
		o.ObserveInt64(queue, st.Queue.Ahead, priority("ahead"))
		o.ObserveInt64(queue, st.Queue.Profiled, priority("profiled"))
		o.ObserveInt64(queue, st.Queue.Background, priority("background"))
		o.ObserveInt64(unswept, st.Queue.Unswept)
		o.ObserveInt64(mounted, int64(st.Totals.Mounted), metric.WithAttributes(attribute.String("door", st.Door)))
		return nil
	}, all...)
	if err != nil {
		return nil, fmt.Errorf("metrics of lazy layers: %w", err)
	}
	return reg.Unregister, nil
}
