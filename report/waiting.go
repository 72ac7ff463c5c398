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
	mu    sync.Mutex
	all   []*watcher
	waits map[digest.Digest]*wait
}

// watcher is a step that runs, or FROM of a build that does.
type watcher struct {
	show   func(since time.Time) Line
	key    any // what it stands for, if that's FROM; nil for a step
	since  time.Time
	layers map[digest.Digest]bool
	lines  map[*wait]Line
}

// wait is a layer that somebody waits for.
type wait struct {
	layer digest.Digest
	since time.Time
	text  func() string
	reads int // that wait
	timer *time.Timer
}

// Waiting notes that a read of a layer has waited since then and still does, for what is. It is shown to the steps that
// run and have the layer, each of which may be who reads; where none has, it isn't a step that reads, and it is shown below
// FROM of the builds that use the layer. That's repeated until over has been called for all reads of the layer. One that begins
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
	var to []*watcher
	step := false
	for _, v := range w.all {
		if v.layers[a.layer] {
			to = append(to, v)
			step = step || v.key == nil
		}
	}
	to = slices.DeleteFunc(to, func(v *watcher) bool {
		if v.lines[a] != nil {
			return !repeat
		}
		return step && v.key != nil
	})
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
			v.lines[a] = v.show(from)
		}
		v.lines[a].Set(text)
	}
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

// uses notes that a watcher has a layer.
func (w *watchers) uses(v *watcher, layer digest.Digest) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v.layers[layer] = true
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

// Follow has the builds of these sessions shown, below FROM, that reads of an image's layers wait, until they end. key is
// what shows it: once for each.
func (r *Reporter) Follow(sessions []string, key any, layers []Descriptor, show func(since time.Time) Line) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range sessions {
		for _, a := range r.builds[s] {
			if slices.ContainsFunc(a.watchers, func(v *watcher) bool { return v.key == key }) {
				continue
			}
			v := &watcher{show: show, key: key, layers: map[digest.Digest]bool{}}
			for _, d := range layers {
				v.layers[d.Digest] = true
			}
			a.watchers = append(a.watchers, v)
			r.watchers.add(v)
		}
	}
}

// WaitLine is what users read of a wait, in front of how long it has lasted.
func WaitLine(repository string, layer digest.Digest, why string) string {
	return fmt.Sprintf("waiting for %s layer %s (%s)", repository, layer, why)
}
