package report

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Mode is what became of a layer.
type Mode string

// The modes of a layer.
const (
	// Lazy layers are mounted; bytes arrive when they are read.
	Lazy Mode = "lazy"
	// Eager layers are pulled and unpacked; Layer.Reason says why.
	Eager Mode = "eager"
	// Unused layers are neither mounted nor pulled.
	Unused Mode = "unused"
)

// Layer is one layer of an image in a Report.
type Layer struct {
	Digest digest.Digest `json:"digest"`
	// Size is the compressed size in bytes.
	Size int64 `json:"size"`
	Mode Mode  `json:"mode"`
	// Format is the lazy format, e.g. "estargz".
	Format string `json:"format,omitempty"`
	// Reason says why the layer is eager.
	Reason string `json:"reason,omitempty"`
	// Fetched is the number of bytes received for this layer during the build.
	Fetched int64 `json:"fetched"`
	// WaitSeconds is the time that readers waited for those bytes, summed.
	WaitSeconds float64 `json:"waitSeconds"`
}

// Image is a base image in a Report.
type Image struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"`
	// Platform is e.g. "linux/arm64"; Digest may be an index that has several.
	Platform string `json:"platform,omitempty"`
	// Lazy is the number of layers whose mode is Lazy.
	Lazy int `json:"lazy"`
	// Size and Fetched are sums over the layers, in bytes.
	Size    int64   `json:"size"`
	Fetched int64   `json:"fetched"`
	Layers  []Layer `json:"layers"`
}

// Report says what one build read of its base images.
type Report struct {
	Images []Image `json:"images"`
	// Size and Fetched are sums over the distinct layers, in bytes.
	Size        int64   `json:"size"`
	Fetched     int64   `json:"fetched"`
	WaitSeconds float64 `json:"waitSeconds"`
}

// Reporter collects. The zero value works.
type Reporter struct {
	mu     sync.Mutex
	layers map[digest.Digest]*layer
	builds map[string][]*Account
	known  []Base  // which builds have used, oldest first
	steps  []*Step // that run

	watchers watchers
}

// Base is a base image as it was resolved.
type Base struct {
	Ref      string
	Digest   digest.Digest // of the manifest or index
	Platform string        // e.g. "linux/amd64"
	Layers   []Descriptor  // bottom first
}

// keepBases bounds the list of known images.
const keepBases = 512

func (b Base) is(ref, platform string) bool { return b.Ref == ref && b.Platform == platform }

type layer struct {
	mode    Mode
	format  string
	reason  string
	fetched int64
	gone    int64 // of what was fetched, what Forget has forgotten with the layer
	wait    time.Duration
}

// Account is the account of one build, from [Reporter.Begin] to [Reporter.End].
type Account struct {
	session string
	images  []Base
	wants   []Base                  // by ref and platform only
	base    map[digest.Digest]layer // counters when the build first met the layer

	watchers []*watcher
}

// has reports whether an image is one of these.
func has(images []Base, b Base) bool {
	return slices.ContainsFunc(images, func(i Base) bool { return i.is(b.Ref, b.Platform) && i.Digest == b.Digest })
}

// Descriptor is a layer as a manifest lists it.
type Descriptor struct {
	Digest digest.Digest
	Size   int64 // bytes
}

func (r *Reporter) layer(d digest.Digest) *layer {
	if r.layers == nil {
		r.layers = map[digest.Digest]*layer{}
	}
	l := r.layers[d]
	if l == nil {
		l = &layer{mode: Unused}
		r.layers[d] = l
	}
	return l
}

// Fetched adds n bytes which a reader of the layer waited for.
func (r *Reporter) Fetched(d digest.Digest, n int64, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.layer(d)
	l.fetched += n
	l.wait += wait
}

// Opened notes that the layer is mounted in a lazy format.
func (r *Reporter) Opened(d digest.Digest, format string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.layer(d)
	l.mode, l.format, l.reason = Lazy, format, ""
}

// Pulled notes that the layer is pulled as a whole, and why.
func (r *Reporter) Pulled(d digest.Digest, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.layer(d)
	l.mode, l.format, l.reason = Eager, "", reason
}

// Kept notes that the layer was pulled before the daemon started, and why. What is known of it already stays.
func (r *Reporter) Kept(d digest.Digest, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.layer(d); l.mode == Unused {
		l.mode, l.reason = Eager, reason
	}
}

// Forget notes that the layer is no longer held locally. Counters stay, so that
// the difference over a build stays right.
func (r *Reporter) Forget(d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.layers[d]; l != nil {
		l.mode, l.format, l.reason, l.gone = Unused, "", "", l.fetched
	}
}

// Begin opens the account of a build, whose client session is the only name that
// sources know it by. Builds which share a session, as those of `buildx bake` do,
// share what is said of it.
func (r *Reporter) Begin(session string) *Account {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.builds == nil {
		r.builds = map[string][]*Account{}
	}
	a := &Account{session: session, base: map[digest.Digest]layer{}}
	r.builds[session] = append(r.builds[session], a)
	return a
}

// Use notes that the builds of these sessions use an image. Sessions that belong
// to no open account are ignored.
func (r *Reporter) Use(sessions []string, img Base) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known = slices.DeleteFunc(r.known, func(b Base) bool { return b.is(img.Ref, img.Platform) })
	if len(r.known) == keepBases {
		r.known = slices.Delete(r.known, 0, 1)
	}
	r.known = append(r.known, img)
	for _, s := range sessions {
		for _, a := range r.builds[s] {
			r.use(a, img)
		}
	}
}

func (r *Reporter) use(a *Account, img Base) {
	if has(a.images, img) {
		return
	}
	a.images = append(a.images, img)
	for _, d := range img.Layers {
		if _, ok := a.base[d.Digest]; !ok {
			a.base[d.Digest] = *r.layer(d.Digest)
		}
	}
}

// Expect notes that the builds of these sessions have asked what an image is. A
// build which shares its FROM step with one that came before says no more than
// that: the step resolves for both, and shows both what it shows.
func (r *Reporter) Expect(sessions []string, ref, platform string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	want := Base{Ref: ref, Platform: platform}
	for _, s := range sessions {
		for _, a := range r.builds[s] {
			a.wants = append(a.wants, want)
			if v := r.followed(func(v *watcher) bool { return v.base.is(ref, platform) }); v != nil {
				a.follow(v)
			}
			for _, b := range r.known {
				if !b.is(ref, platform) {
					continue
				}
				for _, d := range b.Layers {
					if _, ok := a.base[d.Digest]; !ok {
						a.base[d.Digest] = *r.layer(d.Digest)
					}
				}
			}
		}
	}
}

// Bases returns the layers of the images that the open builds of these sessions use.
func (r *Reporter) Bases(sessions []string) map[digest.Digest]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	layers := map[digest.Digest]bool{}
	for _, s := range sessions {
		for _, a := range r.builds[s] {
			for _, img := range r.imagesOf(a) {
				for _, l := range img.Layers {
					layers[l.Digest] = true
				}
			}
		}
	}
	return layers
}

// imagesOf returns the images of a build, those that it has only asked for as well, as far as they are known. The caller holds mu.
func (r *Reporter) imagesOf(a *Account) []Base {
	images := slices.Clone(a.images)
	for _, want := range a.wants {
		for _, img := range r.known {
			if img.is(want.Ref, want.Platform) && !has(images, img) {
				images = append(images, img)
			}
		}
	}
	return images
}

// End closes the account of a build and returns it; ok is false if the build
// used no image.
func (r *Reporter) End(b *Account) (rep Report, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	open := slices.DeleteFunc(r.builds[b.session], func(a *Account) bool { return a == b })
	if r.builds[b.session] = open; len(open) == 0 {
		delete(r.builds, b.session)
	}
	r.unfollow(b)
	images := r.imagesOf(b)
	if len(images) == 0 {
		return Report{}, false
	}
	seen := map[digest.Digest]bool{}
	for _, i := range images {
		img := r.image(i, b.base)
		rep.Images = append(rep.Images, img)
		for _, l := range img.Layers {
			if seen[l.Digest] {
				continue
			}
			seen[l.Digest] = true
			rep.Size += l.Size
			rep.Fetched += l.Fetched
			rep.WaitSeconds += l.WaitSeconds
		}
	}
	slices.SortFunc(rep.Images, func(a, b Image) int {
		return cmp.Or(cmp.Compare(a.Ref, b.Ref), cmp.Compare(a.Platform, b.Platform))
	})
	return rep, true
}

// Image returns the state of an image's layers, and all that was fetched of them
// since they were last forgotten.
func (r *Reporter) Image(b Base) Image {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.image(b, nil)
}

func (r *Reporter) image(b Base, base map[digest.Digest]layer) Image {
	img := Image{Ref: b.Ref, Digest: b.Digest, Platform: b.Platform}
	seen := map[digest.Digest]bool{}
	for _, d := range b.Layers {
		l, from := r.layer(d.Digest), base[d.Digest]
		if base == nil {
			from.fetched = l.gone
		}
		out := Layer{
			Digest: d.Digest, Size: d.Size, Mode: l.mode, Format: l.format, Reason: l.reason,
			Fetched: l.fetched - from.fetched, WaitSeconds: (l.wait - from.wait).Seconds(),
		}
		img.Layers = append(img.Layers, out)
		if l.mode == Lazy {
			img.Lazy++
		}
		if !seen[d.Digest] {
			seen[d.Digest] = true
			img.Size += out.Size
			img.Fetched += out.Fetched
		}
	}
	return img
}
