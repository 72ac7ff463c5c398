package source

import (
	"context"
	"fmt"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/report"
)

// status shows a line below the FROM step until done is called.
func (p *plan) status(ctx context.Context, id string) (done func(error)) {
	if p.progress == nil {
		return func(error) {}
	}
	_, stop := p.progress.Start(ctx)
	end := p.progress.Status(id, "")
	return func(error) {
		end()
		// The step's own error is BuildKit's to show.
		stop(nil)
	}
}

// explain tells user and report, once each, why the layer is pulled.
func (s *Snapshotter) explain(ctx context.Context, p *plan, i int) (done func(error)) {
	l := &p.layers[i]
	reason := l.eager()
	if err := l.refused(); err != nil {
		reason = err.Error()
	}
	s.opt.Reporter.Pulled(l.desc.Digest, reason)
	if !l.tell() {
		return func(error) {}
	}
	return p.status(ctx, fmt.Sprintf("pulling layer %s : %s", l.desc.Digest, reason))
}

// summarize shows, once for a plan, how much of the image is lazy and how much of
// it has been fetched so far.
func (s *Snapshotter) summarize(ctx context.Context, p *plan) {
	p.mu.Lock()
	announced := p.announced
	p.announced = true
	p.mu.Unlock()
	if announced {
		return
	}
	img := s.opt.Reporter.Image(p.base())
	fetched := img.Fetched
	pulled := map[digest.Digest]bool{}
	for _, l := range img.Layers {
		if l.Mode == report.Eager && !pulled[l.Digest] {
			// BuildKit pulls it while this line is being read, perhaps not for the first time.
			pulled[l.Digest] = true
			fetched += l.Size - l.Fetched
		}
	}
	p.status(ctx, fmt.Sprintf("lazy %d of %d layers, %s of %s fetched", img.Lazy, len(img.Layers),
		size(fetched), size(img.Size)))(nil)
}

// size is n bytes in words, e.g. "1.9 MB".
func size(n int64) string {
	return units.CustomSize("%.3g %s", float64(n), 1000, []string{"B", "kB", "MB", "GB", "TB", "PB"})
}

// announceKnown shows the summary of an image whose layers are all there from
// earlier builds; for others it comes when they have been mounted or pulled.
func (s *Snapshotter) announceKnown(ctx context.Context, p *plan) {
	if len(p.layers) == 0 {
		return
	}
	for _, l := range s.opt.Reporter.Image(p.base()).Layers {
		if l.Mode == report.Unused {
			return
		}
	}
	s.summarize(ctx, p)
}
