package image

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

var le = binary.LittleEndian

// superblock writes the superblock and the table of its one device.
func (p *plan) superblock(w *writer) {
	w.padTo(superOffset)
	var sb [superSize]byte
	le.PutUint32(sb[0:], unix.EROFS_SUPER_MAGIC_V1)
	// sb[4:8] is the checksum: writer.flush.
	le.PutUint32(sb[8:], featureChecksum|featureMtime)
	sb[12] = byte(bits.TrailingZeros(BlockSize))
	le.PutUint16(sb[14:], uint16(p.nids[layer.Root]))
	le.PutUint64(sb[16:], uint64(len(p.l.Inodes)))
	le.PutUint64(sb[24:], uint64(p.epoch))
	le.PutUint32(sb[32:], p.epochNsec)
	le.PutUint32(sb[36:], uint32(p.blocks))
	// sb[40:44] is where inodes are counted from: block 0.
	if p.shared.size > 0 {
		le.PutUint32(sb[44:], uint32(p.xattrBlock))
	}
	copy(sb[48:64], p.opt.UUID[:])
	le.PutUint32(sb[80:], featureChunked|featureDevices)
	le.PutUint16(sb[86:], 1) // devices
	le.PutUint16(sb[88:], (superOffset+superSize)/deviceSize)
	w.buf = append(w.buf, sb[:]...)

	// Without a tag: mount's first device option is meant.
	var dev [deviceSize]byte
	le.PutUint32(dev[64:], uint32(p.l.DataSize/BlockSize))
	w.buf = append(w.buf, dev[:]...)
}

// inodes writes every inode with what stands behind it.
func (p *plan) inodes(w *writer) {
	dirs, blocks := p.dirs, uint32(0) // blocks counts those of directories and long symlinks
	for i, in := range p.l.All() {
		w.padTo(int64(p.nids[i]) * slotSize)
		format, size, where := uint16(flatPlain), in.Size, uint32(0)
		var d dir
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			if chunked(in) {
				format, where = chunkBased, withIndexes|chunkBits(in.Size)
			}
		case unix.S_IFDIR:
			d, dirs = dirs[0], dirs[1:]
			size, where = d.size, uint32(p.dirBlock)+d.block
			blocks += d.blocks
			if d.tail > 0 {
				format = flatInline
			}
		case unix.S_IFLNK:
			size = int64(len(in.Target))
			if size <= maxTail {
				format = flatInline
			} else {
				where = uint32(p.dirBlock) + blocks
				blocks++
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			where = in.Minor&0xff | in.Major<<8 | (in.Minor&^0xff)<<12
		}
		w.buf = p.appendInode(w.buf, i, format, size, where)
		w.buf = p.appendXattrs(w.buf, i)
		switch {
		case chunked(in):
			w.padTo(align(w.pos(), indexSize))
			w.buf = append(w.buf, 0, 0, 1, 0) // of device 1
			w.buf = le.AppendUint32(w.buf, uint32(in.Data/BlockSize))
		case d.tail > 0:
			c := p.cursor(i)
			for range d.blocks {
				c.block()
			}
			w.buf = p.appendBlock(w.buf, c.block())
		case format == flatInline:
			w.buf = append(w.buf, in.Target...)
		}
		w.mayFlush()
	}
}

// appendInode appends the inode's own 32 or 64 bytes.
func (p *plan) appendInode(b []byte, i uint32, format uint16, size int64, where uint32) []byte {
	in := &p.l.Inodes[i]
	compact := p.compact(in, size)
	if !compact {
		format |= extended
	}
	xattrs, _ := p.xattrSize(i) // has been checked
	b = le.AppendUint16(b, format)
	b = le.AppendUint16(b, xattrCount(xattrs))
	b = le.AppendUint16(b, uint16(in.Mode))
	if compact {
		b = le.AppendUint16(b, uint16(in.Nlink))
		b = le.AppendUint32(b, uint32(size))
		b = le.AppendUint32(b, 0) // seconds since the epoch
		b = le.AppendUint32(b, where)
		b = le.AppendUint32(b, i+1)
		b = le.AppendUint16(b, uint16(in.UID))
		b = le.AppendUint16(b, uint16(in.GID))
		return le.AppendUint32(b, 0)
	}
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, uint64(size))
	b = le.AppendUint32(b, where)
	b = le.AppendUint32(b, i+1)
	b = le.AppendUint32(b, in.UID)
	b = le.AppendUint32(b, in.GID)
	b = le.AppendUint64(b, uint64(in.Mtime))
	b = le.AppendUint32(b, in.MtimeNsec)
	b = le.AppendUint32(b, in.Nlink)
	return append(b, zeros[:16]...)
}

// maxChunkBits is the widest field of a chunk format: chunks of 8 TiB.
const maxChunkBits = 31

// chunkBits returns the logarithm of the number of blocks of the smallest chunk that holds a file.
func chunkBits(size int64) uint32 { return uint32(bits.Len64(uint64(size-1) / BlockSize)) }
