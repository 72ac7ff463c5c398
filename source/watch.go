package source

import (
	"context"
	"time"

	"github.com/moby/buildkit/util/tracing"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// follow has the builds of these sessions shown, below FROM, that reads of the image's layers wait, where it isn't a step
// that reads: COPY --from does, or an export.
func (p *plan) follow(r *report.Reporter, sessions []string) {
	if p.progress != nil {
		r.Follow(sessions, p, p.base(), p.line)
	}
}

// followWith has the builds that are FROM an image shown, below the step whose result the layers are, that reads of these wait. The lowest n
// are the image's own.
func (p *plan) followWith(r *report.Reporter, from *plan, n int) {
	if p.progress != nil && from != nil {
		r.FollowWith(from, p, p.descriptors()[n:], p.line)
	}
}

func (p *plan) line(since time.Time) report.Line {
	ctx, stop := p.progress.Start(context.Background())
	return fromLine{report.NewLine(ctx, since), stop}
}

// fromLine keeps FROM going as long as the line does.
type fromLine struct {
	report.Line
	stop func(error)
}

// Close implements report.Line.
func (l fromLine) Close() {
	l.Line.Close()
	l.stop(nil)
}

// spanResolve starts the span of finding out what the image is and which of its layers can be lazy.
func (i *instance) spanResolve(ctx context.Context) (_ context.Context, end func(*plan, error)) {
	span, ctx := tracing.StartSpan(ctx, "resolve lazy image", trace.WithAttributes(attribute.String("lazy.ref", i.ref)))
	return ctx, func(p *plan, err error) {
		if p != nil {
			lazy := 0
			for n := range p.layers {
				if p.layers[n].eager() == "" {
					lazy++
				}
			}
			span.SetAttributes(attribute.Int("lazy.layers", lazy), attribute.Int("layers", len(p.layers)))
		}
		tracing.FinishWithError(span, err)
	}
}
