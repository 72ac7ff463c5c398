package store

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A sealed file ends with this line: the length of its content in bytes and the CRC-32C of label and content, which
// torn and flipped bytes don't survive. It is no protection against an adversary: the root is closed to others.
const (
	sealFormat = "\nsealed %016x %08x\n"
	sealSize   = 8 + 16 + 1 + 8 + 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum returns the CRC-32C of label, a zero byte, and the next n bytes of r.
func sum(label string, r io.Reader, n int64) (uint32, error) {
	h := crc32.New(castagnoli)
	h.Write(append([]byte(label), 0))
	if m, err := io.CopyN(h, r, n); err != nil {
		return 0, fmt.Errorf("after %d bytes of %d: %w", m, n, err)
	}
	return h.Sum32(), nil
}

// createSealed makes a file in the directory tmp of what write writes, and seals it. The caller renames it or removes
// it.
func createSealed(tmp, label string, sync bool, write func(*os.File) error) (path string, err error) {
	f, err := os.CreateTemp(tmp, "new-")
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return "", err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "", err
	}
	crc, err := sum(label, io.NewSectionReader(f, 0, size), size)
	if err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(f, sealFormat, size, crc); err != nil {
		return "", err
	}
	if sync {
		if err := f.Sync(); err != nil {
			return "", err
		}
	}
	return f.Name(), nil
}

// replaceSealed puts a sealed file at path.
func replaceSealed(tmp, path, label string, sync bool, write func(*os.File) error) error {
	name, err := createSealed(tmp, label, sync, write)
	if err != nil {
		return err
	}
	if err := os.Rename(name, path); err != nil {
		os.Remove(name)
		return err
	}
	return nil
}

// openSealed returns a sealed file, to be closed by the caller, and the size of its content, whose checksum is right.
// If it isn't, the error is ErrDamaged.
func openSealed(path, label string) (_ *os.File, size int64, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	size = fi.Size() - sealSize
	if !fi.Mode().IsRegular() || size < 0 {
		return nil, 0, fmt.Errorf("%s: no seal: %w", path, ErrDamaged)
	}
	got, err := sum(label, f, size)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w: %w", path, ErrDamaged, cause(err))
	}
	seal := make([]byte, sealSize)
	if _, err := f.ReadAt(seal, size); err != nil {
		return nil, 0, fmt.Errorf("%s: %w: %w", path, ErrDamaged, cause(err))
	}
	if string(seal) != fmt.Sprintf(sealFormat, size, got) {
		return nil, 0, fmt.Errorf("%s: seal broken: %w", path, ErrDamaged)
	}
	return f, size, nil
}

// readSealed returns the content of a sealed file.
func readSealed(path, label string) ([]byte, error) {
	f, size, err := openSealed(path, label)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil {
		return nil, err
	}
	return p, nil
}

// syncFile writes a file or directory back to the disk.
func syncFile(path string) error {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
