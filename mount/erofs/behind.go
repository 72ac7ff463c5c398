package erofs

import (
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// What is read of a complete layer is in the page cache twice: as pages of the mount, and as pages of the data file, which the kernel copied
// them from. Nobody reads the latter again while it has the former, and so they go soon: half the memory is enough to keep a layer in
// it, and a walk through all of one reuses the pages, rather than have the kernel find others. The option directio of EROFS would keep none, and reads
// each small file by itself, where readahead in the data file reads many at once.

const (
	// behindBlock is the number of bytes of a data file that are looked at together.
	behindBlock = 4 << 20
	// behindKeep is how many blocks of a layer keep their pages, of those that were read from the disk last. What the kernel has
	// read ahead in them is about to be wanted. It reads up to 8 MiB ahead on some disks, and there may be several readers.
	behindKeep = 8
	// behindBusy and behindIdle are the time between two looks, if the last has found something and if not.
	behindBusy = 250 * time.Millisecond
	behindIdle = time.Second
)

// dropBehind drops pages behind the readers of complete layers until the Door is closed.
func (d *Door) dropBehind() {
	for wait := behindIdle; ; {
		select {
		case <-time.After(wait):
		case <-d.lifetime.Done():
			return
		}
		wait = behindIdle
		for _, m := range d.snapshot() {
			if m.look() {
				wait = behindBusy
			}
		}
	}
}

// look reports whether anything was read from the disk since the last look, if the layer is complete. Only one goroutine calls it.
func (m *Mount) look() bool {
	m.d.mu.Lock()
	b := m.behind
	on := b != nil && m.mounted
	if on {
		m.calls.Add(1) // Unmount may come, and closes the files
	}
	m.d.mu.Unlock()
	if !on {
		return false
	}
	defer m.calls.Done()
	return b.look()
}

// behind is what is known of a data file's pages in the page cache.
type behind struct {
	file   *os.File
	pages  uint64   // of all blocks
	blocks []uint64 // pages of each
	recent []int    // blocks of which pages came from the disk, and haven't been dropped; the latest last
}

// openBehind takes what is there for something that was written: it's the only copy. It returns nil if the file can't be opened.
func openBehind(data *os.File) *behind {
	f, err := os.Open(procPath(data)) // raises no events: the mark has gone
	if err != nil {
		return nil
	}
	_, size, err := identify(int(f.Fd()))
	if err != nil {
		f.Close()
		return nil
	}
	b := &behind{file: f, blocks: make([]uint64, (size+behindBlock-1)/behindBlock)}
	for i := range b.blocks {
		b.blocks[i] = b.cached(i)
		b.pages += b.blocks[i]
	}
	return b
}

func (b *behind) close() {
	if b != nil {
		b.file.Close()
	}
}

// look drops the pages of what was read longest ago.
func (b *behind) look() (grown bool) {
	if pagesOf(b.file, 0, 0) == b.pages {
		return false
	}
	for i, before := range b.blocks {
		b.blocks[i] = b.cached(i)
		if b.blocks[i] > before {
			b.recent = append(slices.DeleteFunc(b.recent, func(k int) bool { return k == i }), i)
			grown = true
		}
	}
	for ; len(b.recent) > behindKeep; b.recent = b.recent[1:] {
		i := b.recent[0]
		_ = unix.Fadvise(int(b.file.Fd()), int64(i)*behindBlock, behindBlock, unix.FADV_DONTNEED) // what fails costs memory only
		b.blocks[i] = b.cached(i)
	}
	b.pages = 0
	for _, n := range b.blocks {
		b.pages += n
	}
	return grown
}

// cached returns how many pages of a block are in the page cache.
func (b *behind) cached(block int) uint64 {
	return pagesOf(b.file, uint64(block)*behindBlock, behindBlock)
}

// pagesOf returns how many pages of n bytes at off, or of all that is behind if n is 0, are in the page cache; none where the kernel doesn't say.
func pagesOf(f *os.File, off, n uint64) uint64 {
	var is unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: off, Len: n}, &is, 0); err != nil {
		return 0
	}
	return is.Cache
}
