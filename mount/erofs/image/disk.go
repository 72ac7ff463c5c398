package image

import "golang.org/x/sys/unix"

// Numbers of the format, as fs/erofs/erofs_fs.h has them.
const (
	superOffset = 1024
	superSize   = 128
	deviceSize  = 128
	firstInode  = superOffset + superSize + deviceSize
	slotSize    = 32 // the unit in which inodes are counted

	featureChecksum = 0x1 // compatible: SB_CHKSUM
	featureMtime    = 0x2 // compatible: MTIME
	featureChunked  = 0x4 // incompatible: CHUNKED_FILE
	featureDevices  = 0x8 // incompatible: DEVICE_TABLE

	compactSize  = 32
	extendedSize = 64

	extended    = 1 // i_format: a 64-byte inode
	flatPlain   = 0 << 1
	flatInline  = 2 << 1
	chunkBased  = 4 << 1
	withIndexes = 0x20 // chunk format: 8-byte indexes behind the inode
	indexSize   = 8

	direntSize = 12
	maxName    = 255
	maxTarget  = unix.PathMax - 1

	xattrHeader     = 12
	xattrEntry      = 4
	maxXattrCount   = 0xffff // of i_xattr_icount
	maxXattrsShared = 0xff

	// maxTail is how much of a directory's or symlink's end is stored behind its inode, in bytes. What is
	// longer gets a block of its own, as a tail must not cross blocks and would leave large gaps.
	maxTail = BlockSize / 2
)

// fileType returns the type of a directory entry: enum EROFS_FT_*.
func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}
