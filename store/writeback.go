package store

import "golang.org/x/sys/unix"

// What arrives is written back while more arrives. The kernel would leave it in memory for half a minute, and then whoever makes it sync that
// filesystem waits for all of it at once: the end of every step does, as the unmounting of an overlay syncs the filesystem below.

const (
	// writeBackFrom is how many bytes of a layer may arrive until they are written back.
	writeBackFrom = 8 << 20
	// writeBacks is how many layers may wait for that; the others are noticed when more of them arrives.
	writeBacks = 16
)

// wrote takes note of n bytes of data that may be in memory only.
func (c *content) wrote(n int64) {
	if c.inMemory.Add(n) < writeBackFrom {
		return
	}
	select {
	case c.of.s.writeBack <- c:
		c.inMemory.Store(0)
	default:
	}
}

// keepWritingBack starts the writing of what has arrived, until the store is closed. It may wait for a slow disk, as whoever has chunks to write
// needn't before memory is full.
func (s *Store) keepWritingBack() {
	for {
		select {
		case <-s.stop:
			return
		case c := <-s.writeBack:
			c.startWriting()
		}
	}
}

// startWriting has the kernel write all of data that it hasn't. It waits for nothing to be written, and what fails is told to who syncs.
func (c *content) startWriting() {
	c.gate.RLock()
	f := c.file
	c.gate.RUnlock()
	if f == nil {
		return
	}
	if raw, err := f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), 0, 0, unix.SYNC_FILE_RANGE_WRITE) })
	}
}
