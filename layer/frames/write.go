// Package frames makes frames of a tar: pieces that are compressed by themselves, on all CPUs, and written in their order. It's what the
// writers of all formats have in common.
//
//	                 one goroutine for each
//	tar -> splitter -> frame -> Format.Pack -> Format.Put, write, digest of the blob
//	                     |                       ^
//	                     \----> digests of the tar, of chunks, of files    all in the order of the tar
//
// A frame begins with the content of a file, or with a chunk of one, and has in it what follows in the tar up to the next frame: padding,
// headers, and small files together until there are [Options.MinChunkSize] bytes. Where frames end is known before they are
// compressed; so the blob doesn't depend on the number of CPUs. What is in memory is bounded by a [Pool], which several writers may share.
package frames

import (
	"context"
	"crypto/sha256"
	"fmt"
	gohash "hash"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/sha256s"
)

const (
	// DefaultChunkSize is that of stargz-snapshotter.
	DefaultChunkSize = 4 << 20
	// MaxChunkSize bounds how much of a tar must be in memory at once.
	MaxChunkSize = 64 << 20
)

// Options of [Write].
type Options struct {
	// ChunkSize is how many bytes of a file are a chunk, 1 to MaxChunkSize.
	ChunkSize int64
	// MinChunkSize is how many bytes of the tar a frame has at least, if files are small: it is filled up with those that follow,
	// as long as that doesn't make it larger than twice the size. With 0, each chunk has a frame of its own.
	MinChunkSize int64
	// EStargz says that the TOC is eStargz's: some names of files in the root are reserved, and a link's target and a device's number
	// are those of links and devices. Without it the TOC has what the headers have, to the letter, as Podman compares them.
	EStargz bool
	// Pool is what is shared with other writers. Required.
	Pool *Pool
	// Blob and Tar say whether to compute the digests of the blob and of the tar.
	Blob, Tar bool
}

// A Format is what becomes of frames. Its methods get every frame, until one of them fails.
type Format interface {
	// Pack returns the compressed frame, in a buffer of the pool. It's called concurrently, also with what computes the digests of a frame's
	// chunks: of the records' TOC it leaves those alone.
	Pack(f *Frame) ([]byte, error)
	// Put takes note of a frame that is about to be written at an offset of the blob, where it takes size bytes. Its records have their
	// digests. It's called in the order of the tar.
	Put(f *Frame, at int64, size int) error
}

// Write writes the frames of a tar to w, as they have been made by format. When it returns, nothing of it runs any more. It does so
// when ctx ends, or w fails, as soon as a Read of the tar returns that waits.
//
// What a tar says of itself is not believed: one that ends early is an error that wraps [io.ErrUnexpectedEOF].
func Write(ctx context.Context, w io.Writer, tar io.Reader, format Format, opt Options) (*Output, error) {
	defer opt.Pool.begin()()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	j := &job{
		ctx: ctx, fail: fail, format: format, pool: opt.Pool,
		toHash: make(chan *Frame, maxQueue), toWrite: make(chan *Frame, maxQueue),
		out: &Output{w: w, digests: newDigests(opt.Tar)},
	}
	if opt.Blob {
		j.out.blob = sha256.New()
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
		return nil, err
	}
	j.out.Sums, j.out.Lossy, j.out.Untold = j.out.digests.sums, s.lossy, s.untold
	return j.out, nil
}

// An Output is what has been written.
type Output struct {
	// Sums are the digests of the files with several chunks, in their order.
	Sums []digest.Digest
	// Lossy is the first entry, if there is one, that the TOC can't have as it is.
	Lossy string
	// Untold is the first entry, if there is one, that a TOC has no place for: a sparse file, one of an unknown type, or one more than readers
	// take, see [layer.MaxEntries] and [layer.MaxChunks].
	Untold string

	w         io.Writer
	digests   *digests
	blob      gohash.Hash // nil if nobody wants to know
	blobBytes int64
}

// Append writes the end of the blob. The tar is what that decompresses to.
func (o *Output) Append(p []byte, tar ...[]byte) error {
	for _, t := range tar {
		o.digests.between(t)
	}
	if o.blob != nil {
		sha256s.Write(p, o.blob)
	}
	o.blobBytes += int64(len(p))
	if _, err := o.w.Write(p); err != nil {
		return fmt.Errorf("write the layer at %d: %w", o.blobBytes-int64(len(p)), err)
	}
	return nil
}

// Blob returns the digest, "" if nobody has asked for it, and the size of what has been written.
func (o *Output) Blob() (digest.Digest, int64) { return sumOf(o.blob), o.blobBytes }

// Tar returns the digest, "" if nobody has asked for it, and the size of what that decompresses to.
func (o *Output) Tar() (digest.Digest, int64) { return sumOf(o.digests.tar), o.digests.tarSize }

// maxQueue is how many frames may wait for their turn. The pool's room mostly allows fewer.
const maxQueue = 256

// A job is one call of Write: frames go from the splitter to a goroutine each, that compresses it, and in their order to the two
// stages hash and write. The stages see every frame, also when the job has failed, and it's write that lets go of it.
type job struct {
	ctx    context.Context
	fail   context.CancelCauseFunc
	format Format
	pool   *Pool

	toHash, toWrite chan *Frame
	out             *Output // its digests are hash's, the rest is write's
}

// send takes a frame that is complete.
func (j *job) send(f *Frame) {
	go func() {
		defer close(f.packed)
		if err := j.pool.cpus.Acquire(j.ctx, 1); err != nil {
			return // the job has failed
		}
		defer j.pool.cpus.Release(1)
		var err error
		if f.out, err = j.format.Pack(f); err != nil {
			j.fail(fmt.Errorf("compress: %w", err))
		}
	}()
	j.toHash <- f
	j.toWrite <- f
}

// hash computes the digests.
func (j *job) hash() {
	for f := range j.toHash {
		if j.ctx.Err() == nil {
			j.out.digests.add(f)
		}
		close(f.hashed)
	}
}

// write writes the frames, and has the format write down where they are.
func (j *job) write() {
	for f := range j.toWrite {
		<-f.packed
		<-f.hashed
		if j.ctx.Err() == nil {
			if err := j.put(f); err != nil {
				j.fail(err)
			}
		}
		j.pool.release(f)
	}
}

func (j *job) put(f *Frame) error {
	if err := j.format.Put(f, j.out.blobBytes, len(f.out)); err != nil {
		return err
	}
	return j.out.Append(f.out)
}
