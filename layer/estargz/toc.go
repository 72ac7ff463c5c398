package estargz

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

const (
	// tocName is the TOC's own name in a tar, and in a layer that was converted twice.
	tocName = "stargz.index.json"
	// The landmarks stand in the root. They are hidden, like the TOC.
	prefetchLandmark   = ".prefetch.landmark"
	noPrefetchLandmark = ".no.prefetch.landmark"

	// MaxCompressedTOC bounds what is read of a TOC into memory, in bytes: twice what [layer.MaxEntries] files take, at 60 bytes each.
	MaxCompressedTOC = 64 << 20
	// maxTOC bounds what that is decompressed to, some at a time: as many files with two chunks each, at 400 and 250 bytes.
	maxTOC = 512 << 20
)

// Parse makes a Blob of a TOC, a gzip'ed tar, whose frames end at the latest at an offset of the blob.
func Parse(toc []byte, end int64, opt Options) (*Blob, error) {
	gz, err := Codec{}.Decompress(bytes.NewReader(toc))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTOC, err)
	}
	defer gz.Close()
	tr := tar.NewReader(gz)
	head, err := tr.Next()
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrTOC, err)
	case head.Name != tocName:
		return nil, fmt.Errorf("%w: it's called %q, want %q", ErrTOC, head.Name, tocName)
	case head.Size > maxTOC:
		return nil, fmt.Errorf("%w: of %d bytes: %w", ErrTOC, head.Size, layer.ErrLimit)
	}
	sum := sha256.New()
	json := io.TeeReader(tr, sum)
	t := newTree()
	err = t.read(json)
	if err != nil && opt.TOCDigest != "" {
		// A wrong TOC isn't to be blamed for what is in it.
		if _, cerr := io.Copy(io.Discard, json); cerr != nil {
			return nil, fmt.Errorf("%w: %w", ErrTOC, cerr)
		}
	}
	got := digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(sum.Sum(nil)))
	if opt.TOCDigest != "" && got != opt.TOCDigest {
		return nil, &DigestError{Want: opt.TOCDigest, Got: got}
	}
	if err != nil {
		return nil, err
	}
	l, err := t.builder.Build(end, Codec{})
	if err != nil {
		return nil, err
	}
	return &Blob{Layer: l, TOCDigest: got, TOC: toc, End: end, Prefetch: t.prefetch}, nil
}

// A tree feeds a Builder with the entries of a TOC.
type tree struct {
	builder  *layer.Builder
	prefetch int64

	// The regular file that chunks belong to, if there has been one.
	inFile bool
	name   string
	size   int64
	hidden bool
}

func newTree() *tree {
	return &tree{builder: layer.NewBuilder(layer.BuilderOptions{MaxRatio: maxRatio}), prefetch: NoLandmark}
}

// read reads the JSON of a TOC: {"version": 1, "entries": [...]}.
func (t *tree) read(r io.Reader) error {
	w := &window{r: r}
	version, seen := int64(1), false
	if err := w.value(func(c *cursor) error { return c.expect('{') }); err != nil {
		return fmt.Errorf("%w: %w", ErrTOC, err)
	}
	for first := true; ; first = false {
		var key string
		more := false
		err := w.value(func(c *cursor) (err error) {
			var k []byte
			k, more, err = c.key(first)
			key = string(k)
			return err
		})
		if err == nil && !more {
			break
		}
		switch {
		case err != nil:
		case key == "version":
			err = w.value(func(c *cursor) (err error) {
				version, err = c.int()
				return err
			})
		case key == "entries" && seen:
			err = fmt.Errorf("byte %d: entries, for a second time", w.base+int64(w.i))
		case key == "entries":
			seen = true
			if err = t.entries(w); err != nil {
				return err
			}
		default:
			err = w.value(func(c *cursor) error { return c.skip(0) })
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrTOC, err)
		}
	}
	if err := w.end(); err != nil {
		return fmt.Errorf("%w: %w", ErrTOC, err)
	}
	if version != 1 {
		return fmt.Errorf("%w: version %d, want 1", ErrTOC, version)
	}
	return nil
}

func (t *tree) entries(w *window) error {
	null := false
	err := w.value(func(c *cursor) (err error) {
		if null, err = c.null(); null || err != nil {
			return err
		}
		return c.expect('[')
	})
	var e entry
	for first := true; err == nil && !null; first = false {
		more := false
		err = w.value(func(c *cursor) (err error) {
			if more, err = c.more(first, ']'); !more || err != nil {
				return err
			}
			return e.parse(c)
		})
		if err != nil || !more {
			break
		}
		if err := t.add(&e); err != nil {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrTOC, err)
	}
	return nil
}

func (t *tree) add(e *entry) error {
	if e.kind == chunk {
		if !t.inFile {
			return fmt.Errorf("%w: chunk before any file", ErrTOC)
		}
		return t.chunk(e)
	}
	name := string(e.name)
	if lossy(e.name) || lossy(e.linkName) {
		return &layer.EntryError{Name: name, Err: ErrLossy}
	}
	in, err := e.inode()
	if err != nil {
		return &layer.EntryError{Name: name, Err: err}
	}
	t.inFile, t.hidden = e.kind == reg, false
	switch e.kind {
	case hardlink:
		return t.builder.Link(name, string(e.linkName), in)
	case reg:
		t.name, t.size = name, e.size
		if t.hidden = t.landmark(e); !t.hidden {
			if err := t.builder.Add(name, in); err != nil {
				return err
			}
		}
		if e.size == 0 {
			return nil
		}
		return t.chunk(e)
	}
	return t.builder.Add(name, in)
}

// landmark reports whether a file isn't to be seen, after it has taken note of what it means.
func (t *tree) landmark(e *entry) bool {
	switch string(bytes.TrimLeft(bytes.TrimPrefix(e.name, []byte("./")), "/")) {
	case prefetchLandmark:
		t.prefetch = e.offset
	case noPrefetchLandmark:
		t.prefetch = 0
	case tocName:
	default:
		return false
	}
	return true
}

// chunk adds the chunk that an entry has, be it the first of a file or another.
func (t *tree) chunk(e *entry) error {
	if err := t.builder.Frame(e.offset); err != nil || t.hidden {
		return err
	}
	size := e.chunkSize
	if size == 0 {
		size = t.size - e.chunkOffset // up to the end; Chunk looks whether that makes sense
	}
	sum := e.chunkDigest
	if !sum.ok && size == t.size {
		sum = e.digest
	}
	if !sum.ok {
		return &layer.EntryError{Name: t.name, Err: fmt.Errorf("chunk at %d: %w", e.chunkOffset, ErrUnverifiable)}
	}
	return t.builder.Chunk(e.chunkOffset, size, e.innerOffset, sum.sum)
}

// lossy reports whether a name isn't UTF-8, or was made so by a writer that puts U+FFFD for what isn't, as
// encoding/json does.
func lossy(name []byte) bool {
	return !utf8.Valid(name) || bytes.Contains(name, []byte("\uFFFD"))
}

// inode returns what the entry says about its inode. A hardlink's has no type.
func (e *entry) inode() (layer.Inode, error) {
	for _, id := range []int64{e.uid, e.gid, e.devMajor, e.devMinor} {
		if id < 0 || id > math.MaxUint32 {
			return layer.Inode{}, fmt.Errorf("%w: %d", layer.ErrAttr, id)
		}
	}
	in := layer.Inode{
		Mode: uint32(e.mode) & 0o7777, UID: uint32(e.uid), GID: uint32(e.gid),
		Mtime: e.mtime, MtimeNsec: e.mtimeNsec,
		Major: uint32(e.devMajor), Minor: uint32(e.devMinor),
		Xattrs: e.xattrs,
	}
	switch e.kind {
	case hardlink:
		return in, nil
	case 0:
		return in, fmt.Errorf("%w: no type", layer.ErrAttr)
	case reg:
		in.Size = e.size
	case symlink:
		in.Target = string(e.linkName)
	}
	in.Mode |= uint32(e.kind)
	return in, nil
}
