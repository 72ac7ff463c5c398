package snapshot

import (
	"fmt"
	"sync/atomic"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// room returns what [fill.SchedulerOptions.Room] wants to know of the disk that dir is on. That layers stay unfilled for want of room is said
// once, and again when there was room in between.
func room(dir string, say func(error)) func(bytes int64) bool {
	var short atomic.Bool
	none := func(why error) {
		if !short.Swap(true) && say != nil {
			say(why)
		}
	}
	return func(bytes int64) bool {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			none(fmt.Errorf("how full the disk of %s is can't be told: %w", dir, err))
			return false
		}
		free, left := spare(&st)
		if free-left >= bytes {
			short.Store(false)
			return true
		}
		none(fmt.Errorf("%s of %s are free, and %s, a tenth of the disk, are left to builds",
			units.HumanSize(float64(free)), dir, units.HumanSize(float64(left))))
		return false
	}
}

// spare returns how many bytes of a disk are free, and how many of them are left to builds: a tenth of the disk. Blocks that the file
// system holds back, as ext4 does for root, are no part of it: df(1) computes its percentage without them, too.
func spare(st *unix.Statfs_t) (free, left int64) {
	total := int64(st.Blocks) - int64(st.Bfree) + int64(st.Bavail)
	return int64(st.Bavail) * st.Bsize, total / 10 * st.Bsize
}
