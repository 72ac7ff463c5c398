package layer_test

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// Whatever a Builder is fed with, it makes a consistent layer or says what is wrong. The script has an entry in each
// line: a letter, and words.
func FuzzBuilder(f *testing.F) {
	for _, seed := range []string{
		"d a\nf a/b 3\nF a 9\nC 0 3 0\nC 3 6 3\nd a",
		"f a 0\nh b a\nh c d\nh d c",
		"f a/.wh.b 0\nf a/.wh..wh..opq 0\nd a/b",
		"F a 4\nB 100\nC 0 4 0\nF b 4\nC 0 4 600\nF a 4\nB 300\nC 0 4 0\nl a x",
		"h a b\nh b c\nf c/d 0\nf c 0\nx d\ns d t\nd .\nd ./a//b/",
		"F a 4\nB 100\nC 0 2 0\nB 50\nC 2 2 0",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, script string) {
		l, err := run(script)
		if err != nil {
			if _, ok := errors.AsType[*layer.EntryError](err); !ok || !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("not an EntryError that wraps ErrInvalid: %v", err)
			}
			return
		}
		layertest.Check(t, l)
	})
}

func run(script string) (*layer.Layer, error) {
	b := layer.NewBuilder(layer.BuilderOptions{MaxRatio: 1000})
	blob := int64(1)
	for line := range strings.Lines(script) {
		words := append(strings.Split(strings.TrimSuffix(line, "\n"), " "), "", "", "", "")
		name, target := words[1], words[2]
		n := func(i int) int64 {
			v := int64(0)
			for _, c := range words[i] {
				v = v*10 + int64(c-'0') // may overflow, and well it may
			}
			return v
		}
		var err error
		switch words[0] {
		case "d":
			err = b.Add(name, layer.Inode{Mode: unix.S_IFDIR | uint32(n(2))})
		case "f": // with its content
			err = b.Add(name, layer.Inode{Mode: unix.S_IFREG, Size: n(2)})
			if err == nil && n(2) > 0 {
				err = errors.Join(b.Frame(blob), b.Chunk(0, n(2), 0, [32]byte{}))
				blob++
			}
		case "F": // without
			err = b.Add(name, layer.Inode{Mode: unix.S_IFREG, Size: n(2)})
		case "l":
			err = b.Add(name, layer.Inode{Mode: unix.S_IFLNK, Target: target})
		case "x":
			err = b.Add(name, layer.Inode{Mode: unix.S_IFDIR, Xattrs: []layer.Xattr{{Name: words[2]}, {Name: words[3]}}})
		case "s":
			err = b.Add(name, layer.Inode{Mode: uint32(n(2)), Major: uint32(n(3)), Minor: uint32(n(4))})
		case "h":
			err = b.Link(name, target, layer.Inode{Mode: uint32(n(3))})
		case "B":
			blob = n(1)
			err = b.Frame(blob)
		case "C":
			err = b.Chunk(n(1), n(2), n(3), [32]byte{})
		}
		if err != nil {
			return nil, err
		}
	}
	return b.Build(blob+1, nil)
}
