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

// watcher is a step that runs, or FROM of builds that do.
type watcher struct {
	show   func(since time.Time) Line
	key    any // what it stands for, if that's FROM; nil for a step
	base   Base
	builds int // that share this FROM; guarded by Reporter.mu
	since  time.Time
	layers map[digest.Digest]bool
	lines  map[*wait]Line
	copies map[digest.Digest][]time.Time // FROM's: when the copies of its build have begun that read a layer
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
// FROM of the builds that use the layer. So it is of builds that copy from the layer, whoever reads: see Copies. That's repeated until over has been called for all reads of the layer. One that begins
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
		return step && v.key != nil && len(v.copies[a.layer]) == 0
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
			if begun := v.copies[a.layer]; step && v.key != nil && from.Before(begun[0]) {
				from = begun[0]
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
	v.lines, v.copies, v.since = map[*wait]Line{}, map[digest.Digest][]time.Time{}, time.Now()
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

// Copies notes that the builds of these sessions copy files out of layers, or make digests of them. That is the daemon's own doing, and
// no step that runs: while it lasts, their FROM is shown that reads of the layers wait, also those of another build's step, which the
// copy may share: of a page that somebody waits for already, the kernel tells nobody else's read.
func (r *Reporter) Copies(sessions []string, layers []digest.Digest) (over func()) {
	r.mu.Lock()
	var of []*watcher
	for _, s := range sessions {
		for _, a := range r.builds[s] {
			of = append(of, a.watchers...)
		}
	}
	r.mu.Unlock()
	begun := time.Now()
	w := &r.watchers
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, v := range of {
		for _, d := range layers {
			if v.layers[d] {
				v.copies[d] = append(v.copies[d], begun)
			}
		}
	}
	return sync.OnceFunc(func() { w.copied(of, layers, begun) })
}

// copied ends what Copies has begun. If what is shown concerns the build for another reason, that shows it anew.
func (w *watchers) copied(of []*watcher, layers []digest.Digest, begun time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, v := range of {
		for _, d := range layers {
			at := slices.Index(v.copies[d], begun)
			if at < 0 {
				continue
			}
			if v.copies[d] = slices.Delete(v.copies[d], at, at+1); len(v.copies[d]) > 0 {
				continue
			}
			delete(v.copies, d)
			if a := w.waits[d]; a != nil && v.lines[a] != nil {
				v.lines[a].Close()
				delete(v.lines, a)
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
	}
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
