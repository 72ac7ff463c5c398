package report

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// again is how often a line about a wait is shown anew. Clients don't print what comes within 5 s.
const again = 10 * time.Second

// watchers are those who are shown that reads wait, and what they are shown.
type watchers struct {
	mu     sync.Mutex
	all    []*watcher
	waits  map[digest.Digest]*wait
	mounts map[digest.Digest]*mounts
}

// watcher is a step that runs, or FROM of builds that do.
type watcher struct {
	show   func(since time.Time) Line // nil for a step that has no place in a build's progress
	key    any                        // what it stands for, if that's FROM; nil for a step
	base   Base
	builds int // that share this FROM; guarded by Reporter.mu
	since  time.Time
	layers map[digest.Digest]bool
	lines  map[*wait]Line
}

// mounts are how often a layer is mounted to be read.
type mounts struct {
	all   int
	steps int       // of these, those of steps that show it themselves
	since time.Time // when one has begun that is no step's, if there are some
}

func (m *mounts) others() bool { return m != nil && m.all > m.steps }

// wait is a layer that somebody waits for.
type wait struct {
	layer digest.Digest
	since time.Time
	text  func() string
	reads int // that wait
	timer *time.Timer
}

// Waiting notes that a read of a layer has waited since then and still does, for what is. It is shown to the steps that
// run and have the layer, each of which may be who reads. Where none has, or somebody else has the layer mounted too (see Mounts), it is shown below FROM of
// the builds that use the layer. That's repeated until over has been called for all reads of the layer. One that begins
// to wait while others do is shown to those who have begun since.
func (r *Reporter) Waiting(layer digest.Digest, since time.Time, what func() string) (over func()) {
	w := &r.watchers
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.waits[layer]
	if a == nil {
		a = &wait{layer: layer, since: since, text: what}
		if w.waits == nil {
			w.waits = map[digest.Digest]*wait{}
		}
		w.waits[layer] = a
		w.show(a, since, true)
		a.timer = time.AfterFunc(again, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.waits[layer] == a {
				// Also to those who have begun since: of a page that another step waits for, theirs tells nobody.
				w.show(a, a.since, true)
				a.timer.Reset(again)
			}
		})
	} else {
		w.show(a, since, false)
	}
	a.reads++
	return sync.OnceFunc(func() { w.over(a) })
}

// show shows a wait to those whom it concerns: again to those who know of it, if it's to be repeated, and to the others as one
// that has lasted since then, or since they have begun.
func (w *watchers) show(a *wait, since time.Time, repeat bool) {
	to := slices.DeleteFunc(slices.Clone(w.all), func(v *watcher) bool { return !w.concerns(a, v) || v.lines[a] != nil && !repeat })
	if len(to) == 0 && !repeat {
		return
	}
	text := a.text()
	for _, v := range to {
		if v.lines[a] == nil {
			from := since
			if from.Before(v.since) {
				from = v.since
			}
			if m := w.mounts[a.layer]; v.key != nil && m.others() && from.Before(m.since) {
				from = m.since
			}
			v.lines[a] = v.show(from)
		}
		v.lines[a].Set(text)
	}
}

// concerns reports whether a watcher is to be shown a wait.
func (w *watchers) concerns(a *wait, v *watcher) bool {
	if v.show == nil || !v.layers[a.layer] {
		return false
	}
	return v.key == nil || w.mounts[a.layer].others() || !slices.ContainsFunc(w.all, func(o *watcher) bool {
		return o.key == nil && o.show != nil && o.layers[a.layer]
	})
}

func (w *watchers) over(a *wait) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if a.reads--; a.reads > 0 {
		return
	}
	a.timer.Stop()
	delete(w.waits, a.layer)
	for _, v := range w.all {
		if l := v.lines[a]; l != nil {
			l.Close()
			delete(v.lines, a)
		}
	}
}

func (w *watchers) add(v *watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v.lines, v.since = map[*wait]Line{}, time.Now()
	w.all = append(w.all, v)
}

func (w *watchers) remove(v *watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = slices.DeleteFunc(w.all, func(o *watcher) bool { return o == v })
	for _, l := range v.lines {
		l.Close()
	}
	clear(v.lines)
}

// having returns those of the steps that have the layer.
func (w *watchers) having(layer digest.Digest, steps []*Step) []*Step {
	w.mu.Lock()
	defer w.mu.Unlock()
	var have []*Step
	for _, s := range steps {
		if s.watcher.layers[layer] {
			have = append(have, s)
		}
	}
	return have
}

// Mounts notes that layers are mounted to be read, until over is called: by a step, which says so itself with [Step.Mounts], or by
// somebody who has no place in a build's progress, the daemon itself for the most part, for a COPY, a digest, a frontend that asks for a file, or an export.
// While these last, FROM is shown that reads of the layers wait, also if a step has them: they may wait for the same bytes, and of a
// page that somebody waits for already, the kernel tells nobody else's read.
func (r *Reporter) Mounts(layers []digest.Digest) (over func()) {
	w := &r.watchers
	w.mounted(layers, func(m *mounts) { m.all++ })
	return sync.OnceFunc(func() { w.mounted(layers, func(m *mounts) { m.all-- }) })
}

// mounted changes how often layers are mounted. What is shown and concerns the watcher no more ends.
func (w *watchers) mounted(layers []digest.Digest, change func(*mounts)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range layers {
		m := w.mounts[d]
		if m == nil {
			m = &mounts{}
			if w.mounts == nil {
				w.mounts = map[digest.Digest]*mounts{}
			}
			w.mounts[d] = m
		}
		before := m.others()
		change(m)
		if !before && m.others() {
			m.since = time.Now()
		}
		if *m == (mounts{since: m.since}) {
			delete(w.mounts, d)
		}
		if a := w.waits[d]; a != nil {
			for _, v := range w.all {
				if l := v.lines[a]; l != nil && !w.concerns(a, v) {
					l.Close()
					delete(v.lines, a)
				}
			}
		}
	}
}

// Follow has the builds of these sessions shown, below FROM, that reads of an image's layers wait, until they end. key is
// what shows it: once for each, however many builds share it.
func (r *Reporter) Follow(sessions []string, key any, img Base, show func(since time.Time) Line) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range sessions {
		for _, a := range r.builds[s] {
			r.follow(a, key, img, show)
		}
	}
}

// FollowWith is Follow for the builds that with shows waits to, and for layers of something that they use beside that, such as an imported cache.
func (r *Reporter) FollowWith(with, key any, layers []Descriptor, show func(since time.Time) Line) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, accounts := range r.builds {
		for _, a := range accounts {
			if slices.ContainsFunc(a.watchers, func(v *watcher) bool { return v.key == with }) {
				r.follow(a, key, Base{Layers: layers}, show)
			}
		}
	}
}

func (r *Reporter) follow(a *Account, key any, img Base, show func(since time.Time) Line) {
	v := r.followed(func(v *watcher) bool { return v.key == key })
	if v == nil {
		v = &watcher{show: show, key: key, base: img, layers: map[digest.Digest]bool{}}
		for _, d := range img.Layers {
			v.layers[d.Digest] = true
		}
		r.watchers.add(v)
	}
	a.follow(v)
}

// followed returns the FROM of an open account that is, or nil.
func (r *Reporter) followed(is func(*watcher) bool) *watcher {
	for _, accounts := range r.builds {
		for _, a := range accounts {
			if i := slices.IndexFunc(a.watchers, is); i >= 0 {
				return a.watchers[i]
			}
		}
	}
	return nil
}

// follow has a build shown what FROM is, once.
func (a *Account) follow(v *watcher) {
	if !slices.Contains(a.watchers, v) {
		a.watchers = append(a.watchers, v)
		v.builds++
	}
}

// unfollow ends what Follow has begun for a build.
func (r *Reporter) unfollow(a *Account) {
	for _, v := range a.watchers {
		if v.builds--; v.builds == 0 {
			r.watchers.remove(v)
		}
	}
}

// WaitLine is what users read of a wait, in front of how long it has lasted.
func WaitLine(repository string, layer digest.Digest, why string) string {
	return fmt.Sprintf("waiting for %s layer %s (%s)", repository, layer, why)
}
