// Package selftest is the layer that doors try themselves with: one file whose bytes arrive when it is read, and one that is
// refused. A door's Probe mounts [Layer] with a [Filler] and calls [Read].
package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

const size = layer.BlockSize // of each file

// Layer has two files in its root.
func Layer() *layer.Layer {
	return &layer.Layer{
		DataSize: 2 * size,
		Inodes: []layer.Inode{
			{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Entries: []layer.Entry{{Name: "filled", Inode: 1}, {Name: "refused", Inode: 2}}},
			{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: size},
			{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: size, Data: size},
		},
	}
}

func content() []byte { return bytes.Repeat([]byte("lazy"), size/4) }

// Filler fills the first file of Layer and refuses the second.
type Filler struct {
	// Data is the data file, by a descriptor that may be written to while it's mounted.
	Data *os.File
}

// Fill implements what doors ask for.
func (f Filler) Fill(_ context.Context, off, n int64) error {
	if off+n > size {
		return errors.New("refused")
	}
	_, err := f.Data.WriteAt(content(), 0)
	return err
}

// Read reads both files of the layer that is mounted at target, and returns what is wrong with what it sees. It doesn't wait for an
// answer for more than 10 seconds; a read that waits goes on until the layer is unmounted.
func Read(target string) error {
	switch got, err := readSoon(filepath.Join(target, "filled")); {
	case err != nil:
		return fmt.Errorf("read: %w", err)
	case !bytes.Equal(got, content()):
		return errors.New("a read did not wait for its bytes")
	}
	if _, err := readSoon(filepath.Join(target, "refused")); !errors.Is(err, unix.EIO) {
		if err == nil {
			err = errors.New("success")
		}
		return fmt.Errorf("a read that was refused: %w, want EIO", err)
	}
	return nil
}

func readSoon(path string) ([]byte, error) {
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b, err := os.ReadFile(path)
		done <- result{b, err}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-time.After(10 * time.Second):
		return nil, fmt.Errorf("%s: no answer in 10 seconds", path)
	}
}
