package order

import (
	"path"
	"strconv"
	"strings"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

// A plan says in which order the entries of a tar come.
type plan struct {
	entries []entry
	byName  map[string][]int32 // entries of a name, in the order of the tar
	targets map[string]bool    // of hardlinks
	begun   map[string]bool    // names that were to be moved, and whether they are

	moved   []int32 // entries, in their new order
	isMoved []bool
}

func newPlan(entries []entry) *plan {
	p := &plan{
		entries: entries, byName: make(map[string][]int32, len(entries)), targets: map[string]bool{}, begun: map[string]bool{},
		isMoved: make([]bool, len(entries)),
	}
	for i, e := range entries {
		if e.global {
			continue
		}
		p.byName[e.name] = append(p.byName[e.name], int32(i))
		if e.hardlink {
			p.targets[e.link] = true
		}
	}
	return p
}

// move takes what a list names to the front. Whiteouts are no files that it could name.
func (p *plan) move(l *List) {
	for i := range l.items {
		it := &l.items[i]
		if len(p.byName[it.path]) > 0 {
			p.moveName(it.path, 0)
			continue
		}
		if it.glob == "" {
			continue
		}
		for _, e := range p.entries {
			if !e.global && it.matches(e.name) && !strings.HasPrefix(path.Base(e.name), whiteoutPrefix) {
				p.moveName(e.name, 0)
			}
		}
	}
}

// maxDepth is how many names moveName goes on by, to parents and from link to link: a name has 2,048 parents at most, and a link one target as a rule.
const maxDepth = 10_000

// moveName moves all entries of a name, and before them what they need. It reports whether it has, or could.
func (p *plan) moveName(name string, depth int) bool {
	if moved, begun := p.begun[name]; begun {
		return moved
	}
	if depth > maxDepth || len(p.begun) > layer.MaxEntries {
		return false // no reader takes so many, with those of parents
	}
	p.begun[name] = false
	is := p.byName[name]
	if name != "" {
		parent, base := path.Split(name)
		parent = strings.TrimSuffix(parent, "/")
		p.moveName(parent, depth+1)
		if len(is) > 0 {
			p.moveBefore(path.Join(parent, opaqueMarker), is[0])
			p.moveBefore(path.Join(parent, whiteoutPrefix+base), is[0])
		}
	}
	if len(is) > 1 && p.targets[name] {
		// A link between two of them is one to the first: it would become one to the last.
		return false
	}
	for _, i := range is {
		e := &p.entries[i]
		if !e.hardlink {
			continue
		}
		// What comes behind the link isn't what it means.
		if to := p.byName[e.link]; len(to) > 0 && to[0] < i && !p.moveName(e.link, depth+1) {
			return false
		}
	}
	for _, i := range is {
		p.take(i)
	}
	p.begun[name] = true
	return true
}

// moveBefore moves a whiteout if it stands in front of an entry: behind it, it may hide the entry.
func (p *plan) moveBefore(name string, entry int32) {
	for _, i := range p.byName[name] {
		if i < entry {
			p.take(i)
		}
	}
}

func (p *plan) take(i int32) {
	if !p.isMoved[i] {
		p.isMoved[i] = true
		p.moved = append(p.moved, i)
	}
}

// first is how many of the moved entries aren't directories.
func (p *plan) first() (n int) {
	for _, i := range p.moved {
		if !p.entries[i].directory {
			n++
		}
	}
	return n
}

// parts are the pieces of the tar up to its rest, which is behind all entries, and the landmark.
func (p *plan) parts(rest part) ([]part, error) {
	var parts []part
	add := func(e *entry) {
		if n := len(parts) - 1; n >= 0 && parts[n].bytes == nil && parts[n].end == e.start {
			parts[n].end = e.end
			return
		}
		parts = append(parts, part{off: e.start, end: e.end})
	}
	// A global header stays before all that it may hold for.
	first := 0
	for first < len(p.entries) && p.entries[first].global {
		add(&p.entries[first])
		first++
	}
	for _, i := range p.moved {
		add(&p.entries[i])
	}
	name := toc.NoPrefetchLandmark
	if len(p.moved) > 0 {
		name = toc.PrefetchLandmark
	}
	b, err := landmark(name, p.record())
	if err != nil {
		return nil, err
	}
	parts = append(parts, part{bytes: b})
	for i := first; i < len(p.entries); i++ {
		if !p.isMoved[i] {
			add(&p.entries[i])
		}
	}
	return append(parts, rest), nil
}

const (
	// orderRecord is where a landmark says at which places of the tar the entries in front of it were, but for global headers.
	orderRecord = "BUILDKITDLAZY.order"
	// maxRecord is how large that may be, in bytes: archive/tar reads headers of up to a megabyte.
	maxRecord = 512 << 10
)

// record says where the moved entries were.
func (p *plan) record() string {
	var b []byte
	for _, i := range p.moved {
		if len(b) > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, int64(i), 36)
	}
	if len(b) > maxRecord {
		return ""
	}
	return string(b)
}

// A record is what a landmark has said.
type record struct {
	text string
	at   int // how many entries were in front of it
}

// restore returns the entries of a tar in the order in which they were before it was put in order. What doesn't say so is no record.
func (r record) restore(entries []entry) []entry {
	if r.text == "" {
		return entries
	}
	first := 0
	for first < r.at && entries[first].global {
		first++
	}
	places := strings.Split(r.text, ",")
	if len(places) != r.at-first {
		return entries
	}
	before := make([]*entry, len(entries))
	for i := range first {
		before[i] = &entries[i]
	}
	for i, place := range places {
		n, err := strconv.ParseInt(place, 36, 32)
		if err != nil || n < 0 || int(n) >= len(entries) || before[n] != nil {
			return entries
		}
		before[n] = &entries[first+i]
	}
	restored := make([]entry, len(entries))
	rest := r.at
	for i, e := range before {
		if e == nil {
			e = &entries[rest]
			rest++
		}
		restored[i] = *e
	}
	return restored
}
