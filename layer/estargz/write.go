package estargz

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	gohash "hash"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
)

// WriteOptions of [Write]. The zero value makes what BuildKit and stargz-snapshotter's readers take for usual.
type WriteOptions struct {
	// Level is gzip's: 1 to 9, 0 for none, -2 for Huffman coding only. Nil and -1 are 6 for most frames, and 7 where that is worth it.
	Level *int
	// ChunkSize is how many bytes of a file are a chunk, up to [MaxChunkSize]. 0 is [DefaultChunkSize].
	ChunkSize int64
	// MinChunkSize is how many bytes of the tar a frame has at least, if files are small: it is filled up with those that follow,
	// as long as that doesn't make it larger than twice the size. 0 is [DefaultMinChunkSize]; with 1, each chunk has a frame of its
	// own. Stargz-snapshotter's readers know shared frames since v0.13.0, of November 2022; estargz.Reader.VerifyTOC of its library, which
	// these don't call, takes them for a mistake. It's at most MaxChunkSize.
	MinChunkSize int64
	// Pool is what is shared with other writers. Nil is one for all CPUs.
	Pool *Pool
}

const (
	// DefaultChunkSize is that of stargz-snapshotter.
	DefaultChunkSize = 4 << 20
	// DefaultMinChunkSize has a reader that wants one small file fetch some 40 KB of a Debian system, or 2 ms of a link of 200 Mbit/s:
	// a tenth of a round trip of 20 ms. Four times as much would make layers a quarter of a percent smaller.
	DefaultMinChunkSize = 64 << 10
	// MaxChunkSize bounds how much of a tar must be in memory at once.
	MaxChunkSize = 64 << 20

	defaultLevel = -1 // see levelFor
	minLevel     = -2
	maxLevel     = 9
)

// Written is what [Write] has found out on the way.
type Written struct {
	// Digest and Size are the blob's.
	Digest digest.Digest
	Size   int64
	// DiffID and TarSize are those of what the blob decompresses to: the tar, and behind it the TOC.
	DiffID  digest.Digest
	TarSize int64
	// TOCDigest is what readers verify the TOC by.
	TOCDigest digest.Digest
	// Lossy is the first entry, if there is one, that has a name, a target or an xattr's name that isn't UTF-8. The
	// TOC can't say what it is: such a layer is good for being pulled as a whole only.
	Lossy string
}

// Write makes an eStargz layer of a tar, and writes it to w.
//
// The blob decompresses to the tar, byte by byte, and a second tar with the TOC, as with AppendTarLossLess in stargz-snapshotter. What it
// is depends on the tar and the options alone. The frames are compressed on all CPUs of the pool; what is in memory is bounded by
// it, but for the TOC, some 300 bytes for each entry and chunk.
//
// A tar that can't be a layer without loss is an [layer.EntryError]: one that has a file of the names that the format needs
// ([ErrReserved]), sparse files or unknown types. What a tar says of itself is not believed: one that ends early is an error that
// wraps [io.ErrUnexpectedEOF].
//
// When Write returns, nothing of it runs any more. It does so when ctx ends, or w fails, as soon as a Read of
// the tar returns that waits.
func Write(ctx context.Context, w io.Writer, tar io.Reader, opt WriteOptions) (Written, error) {
	if err := opt.complete(); err != nil {
		return Written{}, err
	}
	defer opt.Pool.begin()()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	j := &job{
		ctx: ctx, fail: fail, level: *opt.Level, pool: opt.Pool, w: w,
		toHash: make(chan *frame, maxQueue), toWrite: make(chan *frame, maxQueue),
		tar: sha256.New(), blob: sha256.New(), toc: newIndex(),
	}
	var stages sync.WaitGroup
	stages.Go(j.hash)
	stages.Go(j.write)
	s := newSplitter(ctx, tar, opt, j.send)
	if err := s.run(); err != nil {
		fail(err)
	}
	close(j.toHash)
	close(j.toWrite)
	stages.Wait() // and so, as they wait for every frame, all that compresses
	if err := context.Cause(ctx); err != nil {
		return Written{}, err
	}
	tocDigest, err := j.finish()
	if err != nil {
		return Written{}, err
	}
	return Written{
		Digest: sumOf(j.blob), Size: j.written, DiffID: sumOf(j.tar), TarSize: j.tarSize,
		TOCDigest: tocDigest, Lossy: s.lossy,
	}, nil
}

// complete checks the options, and puts the defaults in.
func (o *WriteOptions) complete() error {
	level := defaultLevel
	switch {
	case o.Level == nil || *o.Level == -1:
		o.Level = &level
	case *o.Level < minLevel || *o.Level > maxLevel:
		return fmt.Errorf("compression level %d: there are levels %d to %d", *o.Level, minLevel, maxLevel)
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	if o.ChunkSize < 1 || o.ChunkSize > MaxChunkSize {
		return fmt.Errorf("chunk size of %d bytes: want 1 to %d", o.ChunkSize, MaxChunkSize)
	}
	if o.MinChunkSize == 0 {
		o.MinChunkSize = DefaultMinChunkSize
	}
	if o.MinChunkSize < 1 || o.MinChunkSize > MaxChunkSize {
		return fmt.Errorf("minimal chunk size of %d bytes: want 1 to %d", o.MinChunkSize, MaxChunkSize)
	}
	if o.Pool == nil {
		o.Pool = NewPool(0)
	}
	return nil
}

// maxQueue is how many frames may wait for their turn. The pool's room mostly allows fewer.
const maxQueue = 256

// A job is one call of Write: frames go from the splitter to a goroutine each, that compresses it, and in their order to the two
// stages hash and write. The stages see every frame, also when the job has failed, and it's write that lets go of it.
type job struct {
	ctx   context.Context
	fail  context.CancelCauseFunc
	level int
	pool  *Pool

	toHash, toWrite chan *frame

	// hash's
	tar     gohash.Hash
	tarSize int64
	sums    []digest.Digest // of the files with several chunks

	// write's
	w       io.Writer
	blob    gohash.Hash
	written int64
	toc     *index
}

// send takes a frame that is complete.
func (j *job) send(f *frame) {
	go func() {
		defer close(f.packed)
		if err := j.pool.cpus.Acquire(j.ctx, 1); err != nil {
			return // the job has failed
		}
		defer j.pool.cpus.Release(1)
		if err := f.pack(j.pool, j.level); err != nil {
			j.fail(fmt.Errorf("compress: %w", err))
		}
	}()
	j.toHash <- f
	j.toWrite <- f
}

// hash computes the digests that go through all of the tar or of a file.
func (j *job) hash() {
	file := sha256.New()
	for f := range j.toHash {
		if j.ctx.Err() == nil {
			j.tar.Write(f.tar)
			j.tarSize += int64(len(f.tar))
			for i := range f.records {
				r := &f.records[i]
				if r.part == whole {
					continue
				}
				file.Write(r.payload(f))
				if r.part == lastPart {
					j.sums = append(j.sums, sumOf(file))
					file.Reset()
				}
			}
		}
		close(f.hashed)
	}
}

// write writes the frames, and the TOC down.
func (j *job) write() {
	for f := range j.toWrite {
		<-f.packed
		if j.ctx.Err() == nil {
			if err := j.put(f); err != nil {
				j.fail(err)
			}
		}
		<-f.hashed
		j.pool.release(f)
	}
}

func (j *job) put(f *frame) error {
	for i := range f.records {
		r := &f.records[i]
		if r.size > 0 {
			r.toc.Offset, r.toc.InnerOffset = j.written, int64(r.start)
		}
		if err := j.toc.add(r); err != nil {
			return err
		}
	}
	return j.output(f.gz)
}

func (j *job) output(p []byte) error {
	j.blob.Write(p)
	j.written += int64(len(p))
	if _, err := j.w.Write(p); err != nil {
		return fmt.Errorf("write the layer at %d: %w", j.written-int64(len(p)), err)
	}
	return nil
}

// finish writes the TOC, and the footer that says where it is.
func (j *job) finish() (digest.Digest, error) {
	json := j.toc.finish(j.sums)
	head, tail, err := aroundTOC(len(json))
	if err != nil {
		return "", err
	}
	for _, p := range [][]byte{head, json, tail} {
		j.tar.Write(p)
		j.tarSize += int64(len(p))
	}
	gz, err := deflate(nil, j.level, head, json, tail)
	if err != nil {
		return "", fmt.Errorf("compress the table of contents: %w", err)
	}
	at := j.written
	if err := j.output(gz); err != nil {
		return "", err
	}
	return digest.FromBytes(json), j.output(footerOf(at))
}

func sumOf(h gohash.Hash) digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(h.Sum(nil)))
}
