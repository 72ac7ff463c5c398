// Package store keeps what of lazy layers has arrived, on one local filesystem, through restarts and crashes.
//
// # Concept
//
// A [Store] is a root directory with a directory per layer. A layer is known by a [Key], the digest of its blob and
// that of its table of contents (TOC): the same blob with another TOC is another layer. What is kept of it:
//
//	layer   which layer this is; its modification time is when the layer was last used
//	toc     the TOC as it was fetched: mounting a known layer needs no network
//	origin  where the blob can be had, as the caller put it
//	image   the metadata image, as the caller made it; it can be made again
//	data    the data space of package layer: sparse, chunks where they belong, holes where nothing has arrived
//	map     which chunks are in data
//	order   the chunks in the order of their digests, to find layers that have some in common
//
// What is seldom needed of a bound layer's model is in a file without a name, mapped, that ends with the process.
//
// All but data are sealed: a line behind the content has its length and a CRC-32C over it, the name of the file, and
// the key of the layer. A file that is torn, damaged, of another layer, or of another version of its maker is as good
// as none. Sealed files are replaced by rename, so readers see the old or the new one.
//
// # Life of a layer
//
//	l, err := s.Acquire(key)                  // or, if it isn't there: fetch the TOC, then
//	l, err := s.Create(key, toc)
//	defer l.Release()
//	toc, err := l.TOC()                       // parse it, unless l.Model() has it already
//	model, err := l.Bind(parsed)              // opens data, says which chunks are there
//	path, err := l.Image(version)             // or l.WriteImage(version, ...)
//	l.Have(i) || l.Verify(i)                  // else fetch, decompress to r, and
//	v, err := model.ReadChunk(i, r, buf)      // hashes the chunk, once
//	err = l.WriteChunk(v)
//	<-l.Done()                                // the last chunk has arrived, and all are synced
//
// A layer that somebody holds is never removed. What nobody holds may be, least recently used first, to keep to
// [Options].MaxSize or because of [Store.Prune]. Who only copies chunks that another layer may have as well ([Layer.Alike]) borrows it
// ([Store.Borrow]), which is a use and keeps nobody from removing it.
//
// # Guarantees
//
//   - No byte is written to data but those of a chunk whose SHA-256 has been compared: WriteChunk takes a [layer.Verified] of
//     the bound model, which only that comparison makes. No chunk is there before all its bytes are written. Padding behind a file stays a hole.
//   - What is there stays there: a chunk that is there is never written again, so a map never claims too much because
//     of what came after it. It is written after an fsync of data, and only if no write came in between.
//   - A map says which data file it speaks of, by inode number, size, and times of last change and modification, and
//     by a digest of the table of chunks. If there is none, because the process was killed or the machine lost power
//     while the layer was being filled, or if anything of that differs, because somebody truncated, edited, restored
//     or copied data, or another version lays the layer out in another way, no chunk is trusted.
//   - Without a map, a chunk may be there where the filesystem has data. Have is false until the chunk has been read back
//     and its digest is right ([Layer.Verify]); bytes that prove wrong, such as zeros for what the machine had not
//     written when power failed, are punched out, and the chunk is missing. Nothing that proves right is fetched again. Of a copy of
//     data, which tar, rsync and others make without its holes if not told otherwise, only the chunks are kept that the map with it speaks of.
//
// Data is written back while more of it arrives, every 8 MB of a layer, so that little is left to be written by whoever syncs the filesystem, as
// the end of every step does.
//
// The map is written when a layer has been quiet for [Options].Quiet, when nobody holds it any more, and by
// [Store.Close]. So a SIGKILL costs a second reading of those layers that were being filled, and of no other. What
// isn't found out is a disk that returns other bytes than were written to it without the file's times changing: that
// is so for every local filesystem. [Options].Distrust reads everything again.
//
// # Doors
//
// A door that serves data through the kernel sets a fanotify FAN_PRE_ACCESS mark on [Layer.DataPath]. The kernel
// decides when a file is opened whether reads and writes through that descriptor raise such events (seen on Linux
// 6.18, ext4): a descriptor opened before there was a mark on the inode never raises any, nor does a duplicate of it;
// one opened later does, also with O_DIRECT and through /proc/self/fd. The store opens data once, in [Layer.Bind],
// and reads, writes, maps and punches through that descriptor, so it never waits for itself if
//
//  1. there is no mark before Bind, not even one that a former daemon or a detached mount has left, or
//     [Options].OpenData opens a descriptor that is silent all the same;
//  2. the mark comes before the mount, and is gone before the last Release.
//
// ftruncate raises an event whatever the descriptor; it happens in Bind alone, when data is new or has the wrong size.
//
// # Failures
//
// A full disk is an error of [Layer.WriteChunk] that wraps ENOSPC (or EDQUOT) and names layer and root; the chunk is
// missing, and can be written when there is space again. If data can't be synced, no chunk of the layer is there any more before it was
// read back from the disk, or fetched again, since Linux goes on to show what it couldn't write. What the
// store mends by itself, or fails to do in the background, is told to [Options].Notice. A layer directory that can't
// be made sense of is removed by [Open]: it is a cache.
//
// # Concurrency
//
// One process at a time has a root: [Open] takes a flock. All methods of Store and Layer are safe for concurrent use;
// those of a Layer need that it is held or borrowed. Have is one atomic load; writes of different chunks don't wait for each
// other.
//
// # Why files
//
// A TOC, an image and data must be files, of up to tens of megabytes and more, two of them known to the kernel by
// path. What remains are a few hundred bytes per layer, and the map. They could be in a bbolt database, which
// BuildKit uses; but then one damaged page loses all layers (or panics), a truncated file is a SIGBUS, and what a
// layer has is in two places that a crash can leave apart. A directory per layer appears and goes by one rename, and
// an operator can read, count and delete it. Formats are encoding/json's.
package store
