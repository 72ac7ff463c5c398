package fill

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// TestMain has garbage collected before there is as much of it as of the images of tests. The race detector takes two and a half times the
// memory on top, and gives none of it back.
func TestMain(m *testing.M) {
	debug.SetMemoryLimit(400 << 20)
	m.Run()
}

// gzipCodec is what eStargz layers use.
type gzipCodec struct{}

func (gzipCodec) Decompress(r io.Reader) (io.ReadCloser, error) {
	zr, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	zr.Multistream(false)
	return zr, nil
}

// image is a layer with its blob and what should come out of it.
type image struct {
	*layer.Layer
	blob []byte
	data []byte // the data space
}

// file is where a file is in the data space.
type file struct{ off, n int64 }

func (im *image) file(i int) file {
	in := &im.Inodes[i+1]
	return file{in.Data, in.Size}
}

// imageOf makes a layer of files of the given sizes in one directory, named 0, 1 and so on, of random bytes in chunks
// of at most chunk bytes, each in a frame of its own.
func imageOf(t testing.TB, chunk int64, sizes ...int64) *image {
	t.Helper()
	im := &image{Layer: &layer.Layer{Codec: gzipCodec{}}}
	root := layer.Inode{Mode: unix.S_IFDIR | 0o755, Nlink: 2}
	im.Inodes = append(im.Inodes, root)
	var total, chunks int64
	for _, size := range sizes {
		total += blocks(size)
		chunks += (size + chunk - 1) / chunk
	}
	im.data = make([]byte, total)
	var blob bytes.Buffer
	blob.Grow(int(total + total/4096 + 64*chunks)) // what grows is there twice
	rnd := rand.NewChaCha8([32]byte{7})
	zw, err := gzip.NewWriterLevel(&blob, gzip.NoCompression)
	if err != nil {
		t.Fatal(err)
	}
	for i, size := range sizes {
		in := layer.Inode{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: size, Data: im.DataSize, FirstChunk: uint32(len(im.Chunks))}
		content := im.data[im.DataSize:][:blocks(size)]
		_, _ = rnd.Read(content[:size])
		for at := int64(0); at < size; at += chunk {
			p := content[at:min(at+chunk, size)]
			off := int64(blob.Len())
			zw.Reset(&blob)
			if _, err := zw.Write(p); err != nil {
				t.Fatal(err)
			}
			if err := zw.Close(); err != nil {
				t.Fatal(err)
			}
			im.Frames = append(im.Frames, layer.Frame{
				Offset: off, Size: int64(blob.Len()) - off, FirstChunk: uint32(len(im.Chunks)), NumChunks: 1,
			})
			im.Chunks = append(im.Chunks, layer.Chunk{
				Data: in.Data + at, Size: int64(len(p)), Frame: uint32(len(im.Frames) - 1),
			})
			im.Digests = append(im.Digests, sha256.Sum256(p))
			in.NumChunks++
		}
		im.DataSize += int64(len(content))
		im.Inodes = append(im.Inodes, in)
		im.Inodes[layer.Root].Entries = append(im.Inodes[layer.Root].Entries, layer.Entry{Name: fmt.Sprint(i), Inode: uint32(i + 1)})
	}
	im.blob = blob.Bytes()
	return im
}

// blocks is what a file takes of the data space.
func blocks(size int64) int64 {
	return (size + layer.BlockSize - 1) / layer.BlockSize * layer.BlockSize
}

// many is n times the same size.
func many(n int, size int64) []int64 {
	s := make([]int64, n)
	for i := range s {
		s[i] = size
	}
	return s
}

// memory is a Sink that checks what it gets.
type memory struct {
	im   *image
	have bitmap

	mu     sync.Mutex
	fail   func(chunk int) error
	slow   func()
	writes map[int]int
}

func newMemory(im *image) *memory {
	return &memory{im: im, have: newBitmap(len(im.Chunks)), writes: map[int]int{}}
}

func (m *memory) Have(chunk int) bool { return m.have.has(chunk) }

func (m *memory) WriteChunk(v layer.Verified) error {
	chunk, p := v.Chunk(), v.Bytes()
	m.mu.Lock()
	fail, slow := m.fail, m.slow
	m.mu.Unlock()
	if slow != nil {
		slow()
	}
	if fail != nil {
		if err := fail(chunk); err != nil {
			return err
		}
	}
	c := &m.im.Chunks[chunk]
	if !bytes.Equal(p, m.im.data[c.Data:c.End()]) {
		panic(fmt.Sprintf("chunk %d: wrong bytes reached the sink", chunk))
	}
	m.mu.Lock()
	m.writes[chunk]++
	m.mu.Unlock()
	m.have.set(chunk)
	return nil
}

// once fails the test if a chunk was written twice.
func (m *memory) once(t *testing.T) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for c, n := range m.writes {
		if n > 1 {
			t.Errorf("chunk %d was written %d times", c, n)
		}
	}
}
