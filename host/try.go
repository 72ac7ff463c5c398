package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// tryEROFS mounts an empty EROFS image that is a regular file, without a loop device, and lists its root.
func tryEROFS(dir string) (err error) {
	image, target := filepath.Join(dir, "erofs.img"), filepath.Join(dir, "erofs")
	if err := os.WriteFile(image, emptyEROFS(), 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(image, target, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return fmt.Errorf("mount a file as erofs: %w", err)
	}
	defer func() {
		if uerr := unix.Unmount(target, unix.MNT_DETACH); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", target, uerr))
		}
	}()
	if _, err := os.ReadDir(target); err != nil {
		return fmt.Errorf("list a mounted erofs: %w", err)
	}
	return nil
}

// emptyEROFS returns an image of two 4 KiB blocks that holds an empty root directory. The layout is that of
// Linux's fs/erofs/erofs_fs.h: superblock at 1024, the root's compact inode behind it, its entries in block 1.
func emptyEROFS() []byte {
	const (
		block   = 4096
		super   = 1024
		inode   = super + 128
		rootNID = inode / 32 // inodes are counted in slots of 32 bytes
	)
	le := binary.LittleEndian
	img := make([]byte, 2*block)

	sb := img[super:]
	le.PutUint32(sb[0:], unix.EROFS_SUPER_MAGIC_V1)
	sb[12] = 12 // log2 of the block size
	le.PutUint16(sb[14:], rootNID)
	le.PutUint64(sb[16:], 1) // inodes
	le.PutUint32(sb[36:], 2) // blocks

	root := img[inode:] // i_format 0: compact, plain data
	le.PutUint16(root[4:], unix.S_IFDIR|0o555)
	le.PutUint16(root[6:], 2)                               // links
	le.PutUint32(root[8:], 2*12+uint32(len(".")+len(".."))) // size
	le.PutUint32(root[16:], 1)                              // first data block
	le.PutUint32(root[20:], 1)                              // inode number

	entries := img[block:]
	for i, nameOff := range []uint16{2 * 12, 2*12 + 1} {
		e := entries[i*12:]
		le.PutUint64(e[0:], rootNID)
		le.PutUint16(e[8:], nameOff)
		e[10] = 2 // a directory
	}
	copy(entries[2*12:], "...") // "." and "..", one behind the other
	return img
}
