package estargz

import (
	"sync"

	"github.com/klauspost/compress/gzip"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/deflate"
)

// tocLevel is what the default level is for the table of contents: there's one, and whoever mounts the layer waits for it.
const tocLevel = 7

// packFrame appends a gzip stream of a frame to a buffer.
func packFrame(to []byte, level int, p []byte) ([]byte, error) {
	if level == defaultLevel {
		return deflate.AppendGzip(to, p), nil
	}
	return gzipped(to, level, p)
}

// packTOC returns a gzip stream of the pieces of a table of contents.
func packTOC(level int, pieces ...[]byte) ([]byte, error) {
	if level == defaultLevel {
		level = tocLevel
	}
	return gzipped(nil, level, pieces...)
}

// gzipped appends a gzip stream of a level that was asked for. The same pieces make the same stream, whatever was compressed before.
func gzipped(to []byte, level int, pieces ...[]byte) (_ []byte, err error) {
	free := &deflaters[level-minLevel]
	d, _ := free.Get().(*deflater)
	if d == nil {
		d = &deflater{}
		if d.gz, err = gzip.NewWriterLevel(d, level); err != nil {
			return nil, err
		}
	}
	d.out = to
	d.gz.Reset(d)
	for _, p := range pieces {
		if _, err := d.gz.Write(p); err != nil {
			return nil, err
		}
	}
	if err := d.gz.Close(); err != nil {
		return nil, err
	}
	out := d.out
	d.out = nil
	free.Put(d)
	return out, nil
}

// deflaters holds those that nobody uses, by level: one takes a megabyte.
var deflaters [maxLevel - minLevel + 1]sync.Pool

// A deflater compresses into memory.
type deflater struct {
	gz  *gzip.Writer
	out []byte
}

func (d *deflater) Write(p []byte) (int, error) {
	d.out = append(d.out, p...)
	return len(p), nil
}
