package zstdchunked

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/vbatts/tar-split/tar/storage"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

// A Tar is the tar that a layer in Podman's dialect was made of, put together again: headers and padding from where Podman keeps those, the content of
// files chunk by chunk from whoever has it. Nothing says of the headers that they are right before the DiffID does.
type Tar struct {
	layer   *layer.Layer
	chunk   func(i int) ([]byte, error)
	split   *limited      // to what an entry may take
	entries *json.Decoder // storage.Unpacker would keep all names
	packed  io.Closer

	at        []byte // what is read next
	next, end uint32 // chunks behind it, of the file at hand
	err       error
}

// maxSplitEntry bounds an entry of the headers, in bytes of JSON, as it is in memory as a whole. Those of this package's writer take 6 MiB at most.
const maxSplitEntry = 16 << 20

// OpenTar returns the tar of a layer whose headers are split, the compressed bytes that [TarSplitAnnotation] says where to find. chunk returns a chunk
// of the layer, in bytes that it may use again for the next one.
func OpenTar(split io.Reader, l *layer.Layer, chunk func(i int) ([]byte, error)) (*Tar, error) {
	zr, err := Codec{}.Decompress(split)
	if err != nil {
		return nil, fmt.Errorf("headers of the tar: %w", err)
	}
	bounded := &limited{r: &limited{r: zr, max: toc.MaxSize}, max: maxSplitEntry}
	return &Tar{layer: l, chunk: chunk, split: bounded, entries: json.NewDecoder(bounded), packed: zr}, nil
}

// Read implements io.Reader.
func (t *Tar) Read(p []byte) (int, error) {
	for len(t.at) == 0 && t.err == nil {
		t.err = t.more()
	}
	if t.err != nil {
		return 0, t.err
	}
	n := copy(p, t.at)
	t.at = t.at[n:]
	return n, nil
}

// more finds what is read next.
func (t *Tar) more() (err error) {
	if t.next < t.end {
		t.at, err = t.chunk(int(t.next))
		t.next++
		return err
	}
	var e storage.Entry
	t.split.n = 0
	if err := t.entries.Decode(&e); errors.Is(err, io.EOF) {
		return io.EOF
	} else if err != nil {
		return fmt.Errorf("headers of the tar: %w", err)
	}
	switch {
	case e.Type == storage.SegmentType:
		t.at = e.Payload
	case e.Type == storage.FileType && e.Size > 0:
		return t.file(e.GetName(), e.Size)
	}
	return nil
}

// file goes on with the content of a file.
func (t *Tar) file(name string, size int64) error {
	inode, err := t.layer.Lookup(strings.TrimPrefix(path.Clean("/"+name), "/"))
	if err != nil {
		return fmt.Errorf("headers of the tar: %w", err)
	}
	in := t.layer.Inode(inode)
	if !in.IsRegular() || in.Size != size {
		return fmt.Errorf("headers of the tar have a file %q of %d bytes, the table of contents doesn't", name, size)
	}
	t.next, t.end = in.FirstChunk, in.FirstChunk+in.NumChunks
	return nil
}

// Close implements io.Closer.
func (t *Tar) Close() error { return t.packed.Close() }
