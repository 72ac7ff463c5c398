package worker

import (
	"sync/atomic"

	bksnapshot "github.com/moby/buildkit/snapshot"
)

// A linking snapshotter has BuildKit merge layers, as those of COPY --link, by hardlinks to their files. By the name of ours it would copy them, as
// that of stargz-snapshotter isn't among the two that it makes hardlinks for; but our own directories are overlayfs's here, too, and what is lazy
// is copied in any case: it's on a filesystem of its own, and BuildKit copies where a link can't be made.
type linking struct {
	bksnapshot.Snapshotter
	asked atomic.Bool
}

// Name implements snapshot.Snapshotter. BuildKit's cache manager asks at first how to merge, and only then for what else it goes by.
func (l *linking) Name() string {
	if !l.asked.Swap(true) {
		return "overlayfs"
	}
	return l.Snapshotter.Name()
}
