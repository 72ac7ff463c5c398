package fill

import "slices"

// listing is a directory of an image.
type listing struct {
	entries []listed
	next    int
}

// listed is a regular file with content, or a directory: that of each layer that is seen of it, topmost first.
type listed struct {
	file place
	dirs []place
}

// listings are directories that have been listed, by their topmost place: who reads an image in several places comes back to them. Guarded by
// Scheduler.mu.
type listings struct {
	known map[place]known
	kept  int // entries in it
}

type known struct {
	dirs    []place
	entries []listed
}

const (
	// maxListed is the number of names in a directory from which it isn't walked through: nobody may ask for anything while it is listed.
	maxListed = 1 << 16
	// maxKept is how many entries of directories are kept, some 3 MB of them.
	maxKept = 1 << 16
)

// list returns what is in a directory, as overlayfs lists it. It isn't the caller's to change.
func (l *listings) list(dirs []place) []listed {
	k, ok := l.known[dirs[0]]
	if ok && slices.Equal(k.dirs, dirs) {
		return k.entries
	}
	entries := list(dirs)
	if l.kept += len(entries) + 1; l.kept > maxKept || l.known == nil {
		l.known, l.kept = map[place]known{}, len(entries)+1
	}
	l.known[dirs[0]] = known{dirs, entries}
	return entries
}

// forget lets go of what is known, as a layer is closed.
func (l *listings) forget() { *l = listings{} }

func list(dirs []place) (entries []listed) {
	type name struct {
		listed
		open bool // for the directories of layers below
		done bool
	}
	names := map[string]*name{}
	for _, d := range dirs {
		for n := 0; ; n++ {
			e, ok := d.f.layer.Entry(d.inode, n)
			if !ok {
				break
			}
			in := d.f.layer.Inode(e.Inode)
			at := place{d.f, e.Inode}
			old := names[e.Name]
			switch {
			case old == nil && len(names) == maxListed:
				return nil
			case old == nil:
				old = &name{open: in.IsDir() && !in.Opaque}
				names[e.Name] = old
				if in.IsDir() {
					old.dirs = []place{at}
				} else if hasContent(d.f.layer, e.Inode) {
					old.file = at
				}
			case old.open && in.IsDir():
				old.dirs = append(old.dirs, at)
				old.open = !in.Opaque
			default:
				old.open = false
			}
		}
	}
	for i := range dirs {
		d := dirs[(i+len(dirs)-1)%len(dirs)]
		for n := 0; ; n++ {
			e, ok := d.f.layer.Entry(d.inode, n)
			if !ok {
				break
			}
			// One that isn't among them couldn't be read before.
			if l := names[e.Name]; l != nil && !l.done && (l.dirs != nil || l.file.f != nil) {
				l.done = true
				entries = append(entries, l.listed)
			}
		}
	}
	return entries
}
