package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// TryFUSE mounts a FUSE filesystem in a directory of its own below dir, and unmounts it. The error says what keeps lazy
// layers from being mounted there.
func TryFUSE(dir string) error {
	dir, err := os.MkdirTemp(dir, TempPrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := tryFUSE(fuseDevice, dir); err != nil {
		return errors.New(scrub(err, dir))
	}
	return nil
}

// tryFUSE makes the mount that the FUSE door makes: through the device itself, without the fusermount3 helper. Nobody
// answers on the connection, so nothing may look inside: the mount is detached and the connection closed at once.
func tryFUSE(device, dir string) (err error) {
	target := filepath.Join(dir, "fuse")
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	dev, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d", dev.Fd(), os.Geteuid(), os.Getegid())
	if err := unix.Mount("buildkitd-lazy", target, "fuse", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, data); err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

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

// tryPreContent marks a file for FAN_PRE_ACCESS. Kernels before 6.14 refuse the mark, newer ones only on filesystems
// that cannot raise the event. No event is read, and closing the group removes the mark.
func tryPreContent(dir string) error {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_PRE_CONTENT|unix.FAN_CLOEXEC, unix.O_RDWR|unix.O_LARGEFILE)
	if err != nil {
		return fmt.Errorf("fanotify_init FAN_CLASS_PRE_CONTENT: %w", err)
	}
	defer unix.Close(fd)
	file := filepath.Join(dir, "pre-content")
	if err := os.WriteFile(file, make([]byte, 1), 0o600); err != nil {
		return err
	}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_PRE_ACCESS, unix.AT_FDCWD, file); err != nil {
		return fmt.Errorf("fanotify_mark FAN_PRE_ACCESS: %w", err)
	}
	return nil
}
