// Package behind keeps in memory once what is read of complete layers.
//
// What is read through a door is in the page cache twice, as pages of the mount and as pages of the data file, which the kernel copied
// them from. Nobody reads the latter again while it has the former. They go behind the readers, and soon: half the memory is enough to keep a layer in
// it, and a walk through all of one reuses the pages, rather than have the kernel find others. What was written stays, as nobody may have read
// it yet: then it's the only copy.
//
// Who has read what, cachestat(2) tells, of blocks of a data file. On a kernel that doesn't say, before Linux 6.5, nothing is dropped.
package behind

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Block is the number of bytes of a data file that are looked at together.
	Block = 4 << 20
	// Keep is how many blocks of a layer keep their pages, of those that were read from the disk last. What the kernel has
	// read ahead in them is about to be wanted. It reads up to 8 MiB ahead on some disks, and there may be several readers.
	Keep = 8
	// Busy is the time between two looks of which the first has found something.
	Busy = 250 * time.Millisecond
	// Idle is the time between two looks of which the first has found nothing.
	Idle = time.Second
)

// Drop calls look until ctx ends, and again soon if that reports that something was read. It's to look at all layers.
func Drop(ctx context.Context, look func() (grown bool)) {
	for wait := Idle; ; {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = Idle
		if look() {
			wait = Busy
		}
	}
}

// A File is what is known of a data file's pages in the page cache. It's for one goroutine at a time. A nil File drops nothing.
type File struct {
	file   *os.File
	pages  uint64   // of all blocks
	blocks []uint64 // pages of each
	recent []int    // blocks of which pages came from the disk, and haven't been dropped; the latest last
	late   []int    // blocks that had pages left when they were dropped, as these were still being read: there's a second try
}

// Open takes a descriptor of a data file, and what is there of it for something that was written. It returns nil if the file can't be opened a second
// time. No pre-content events may come of reading it any more. The caller closes it.
func Open(data int) *File {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", data))
	if err != nil {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil
	}
	b := &File{file: f, blocks: make([]uint64, (info.Size()+Block-1)/Block)}
	for i := range b.blocks {
		b.blocks[i] = b.cached(i)
		b.pages += b.blocks[i]
	}
	return b
}

// Close closes the File.
func (b *File) Close() {
	if b != nil {
		b.file.Close()
	}
}

// Look drops the pages of what was read longest ago. It reports whether anything was read from the disk since the last look.
func (b *File) Look() (grown bool) {
	if b == nil || len(b.late) == 0 && pagesOf(b.file, 0, 0) == b.pages {
		return false
	}
	for i, before := range b.blocks {
		b.blocks[i] = b.cached(i)
		if b.blocks[i] > before {
			b.recent = append(slices.DeleteFunc(b.recent, func(k int) bool { return k == i }), i)
			grown = true
		}
	}
	for _, i := range b.late {
		if !slices.Contains(b.recent, i) {
			b.drop(i)
		}
	}
	b.late = nil
	for ; len(b.recent) > Keep; b.recent = b.recent[1:] {
		if i := b.recent[0]; b.drop(i) > 0 {
			b.late = append(b.late, i)
		}
	}
	b.pages = 0
	for _, n := range b.blocks {
		b.pages += n
	}
	return grown
}

// drop drops a block's pages, and returns how many are left.
func (b *File) drop(block int) uint64 {
	_ = unix.Fadvise(int(b.file.Fd()), int64(block)*Block, Block, unix.FADV_DONTNEED) // what fails costs memory only
	b.blocks[block] = b.cached(block)
	return b.blocks[block]
}

// cached returns how many pages of a block are in the page cache.
func (b *File) cached(block int) uint64 {
	return pagesOf(b.file, uint64(block)*Block, Block)
}

// pagesOf returns how many pages of n bytes at off, or of all that is behind if n is 0, are in the page cache; none where the kernel doesn't say.
func pagesOf(f *os.File, off, n uint64) uint64 {
	var is unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: off, Len: n}, &is, 0); err != nil {
		return 0
	}
	return is.Cache
}
