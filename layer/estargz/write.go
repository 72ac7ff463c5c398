package estargz

import (
	"cmp"
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
)

// WriteOptions of [Write]. The zero value makes what BuildKit and stargz-snapshotter's readers take for usual.
type WriteOptions struct {
	// Level is gzip's: 1 to 9, 0 for none, -2 for Huffman coding only. Nil and -1 are what package deflate does, which is about as small as 7 in half
	// the time; the others are klauspost's.
	Level *int
	// ChunkSize is how many bytes of a file are a chunk, up to [MaxChunkSize]. 0 is [DefaultChunkSize].
	ChunkSize int64
	// MinChunkSize is how many bytes of the tar a frame has at least, if files are small: it is filled up with those that follow,
	// as long as that doesn't make it larger than twice the size. 0 is [DefaultMinChunkSize]; with 1, each chunk has a frame of its
	// own. Stargz-snapshotter's readers know shared frames since v0.13.0, of November 2022; estargz.Reader.VerifyTOC of its library, which
	// these don't call, takes them for a mistake. It's at most MaxChunkSize.
	MinChunkSize int64
	// ExternalTOC keeps the TOC out of the blob, which then decompresses to the tar and nothing else. Whoever reads it needs
	// [Written.TOC].
	ExternalTOC bool
	// Pool is what is shared with other writers. Nil is one for all CPUs.
	Pool *Pool
}

// A Pool is that of package frames.
type Pool = frames.Pool

// NewPool is that of package frames.
func NewPool(cpus int) *Pool { return frames.NewPool(cpus) }

// ErrReserved is what a tar may have that a layer can't.
var ErrReserved = frames.ErrReserved

const (
	// DefaultChunkSize is that of stargz-snapshotter.
	DefaultChunkSize = frames.DefaultChunkSize
	// DefaultMinChunkSize has a reader that wants one small file fetch some 40 KB of a Debian system, or 2 ms of a link of 200 Mbit/s:
	// a tenth of a round trip of 20 ms. Four times as much would make layers a quarter of a percent smaller.
	DefaultMinChunkSize = 64 << 10
	// MaxChunkSize bounds how much of a tar must be in memory at once.
	MaxChunkSize = frames.MaxChunkSize

	defaultLevel = -1
	minLevel     = -2
	maxLevel     = 9
)

// Written is what [Write] has found out on the way.
type Written struct {
	// Digest and Size are the blob's.
	Digest digest.Digest
	Size   int64
	// DiffID and TarSize are those of what the blob decompresses to: the tar, and behind it the TOC, unless that is external.
	DiffID  digest.Digest
	TarSize int64
	// TOCDigest is what readers verify the TOC by, "" if there is none.
	TOCDigest digest.Digest
	// Tar is the digest of the tar.
	Tar digest.Digest
	// TOC is that as a gzip'ed tar, be it in the blob or external, and End where the frames of the blob end: as [Blob] has them.
	TOC []byte
	End int64
	// Lossy is the first entry, if there is one, that the TOC can't say as the tar does: such a layer is good for being pulled as a whole only. One
	// that has a name, a target or an xattr's name which isn't UTF-8 has a TOC all the same; with a sparse file, or an entry of an unknown
	// type, it is the tar, gzip'ed, and nothing else. So it is with more entries or chunks than readers take.
	Lossy string
}

// Write makes an eStargz layer of a tar, and writes it to w.
//
// The blob decompresses to the tar, byte by byte, and a second tar with the TOC, as with AppendTarLossLess in stargz-snapshotter. What it
// is depends on the tar and the options alone. The frames are compressed on all CPUs of the pool; what is in memory is bounded by
// it, but for the TOC, some 300 bytes for each entry and chunk.
//
// A tar that has a file of the names that the format needs is an [layer.EntryError] that wraps [ErrReserved]. What a tar says of itself is not
// believed: one that ends early is an error that wraps [io.ErrUnexpectedEOF].
//
// When Write returns, nothing of it runs any more. It does so when ctx ends, or w fails, as soon as a Read of
// the tar returns that waits.
func Write(ctx context.Context, w io.Writer, tar io.Reader, opt WriteOptions) (Written, error) {
	if err := opt.complete(); err != nil {
		return Written{}, err
	}
	f := &format{level: *opt.Level, pool: opt.Pool, toc: frames.NewIndex()}
	out, err := frames.Write(ctx, w, tar, f, frames.Options{
		ChunkSize: opt.ChunkSize, MinChunkSize: opt.MinChunkSize, EStargz: true, Pool: opt.Pool, Blob: true, Tar: true,
	})
	if err != nil {
		return Written{}, err
	}
	written := Written{Lossy: cmp.Or(out.Untold, out.Lossy)}
	written.Tar, _ = out.Tar()
	if out.Untold == "" {
		_, written.End = out.Blob()
		if written.TOCDigest, written.TOC, err = f.finish(out, opt.ExternalTOC); err != nil {
			return Written{}, err
		}
	}
	written.Digest, written.Size = out.Blob()
	written.DiffID, written.TarSize = out.Tar()
	return written, nil
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

// A format makes eStargz of frames.
type format struct {
	level int
	pool  *Pool
	toc   *frames.Index
}

// Pack implements frames.Format.
func (f *format) Pack(fr *frames.Frame) ([]byte, error) {
	// What can't be compressed grows by 5 bytes in 64 KiB.
	return packFrame(f.pool.Buffer(len(fr.Tar)+len(fr.Tar)>>10+512), f.level, fr.Tar)
}

// Put implements frames.Format.
func (f *format) Put(fr *frames.Frame, at int64, _ int) error {
	if fr.Untold {
		f.toc = nil // there will be none
		return nil
	}
	for i := range fr.Records {
		r := &fr.Records[i]
		if r.Size > 0 {
			r.TOC.Offset, r.TOC.InnerOffset = at, int64(r.Start)
		}
		if err := f.toc.Add(r, &r.TOC); err != nil {
			return err
		}
	}
	return nil
}

// finish writes the TOC, unless it is external, and the footer that says where it is.
func (f *format) finish(out *frames.Output, external bool) (sum digest.Digest, toc []byte, err error) {
	json := f.toc.Finish(out.Sums, "")
	head, tail, err := aroundTOC(len(json))
	if err != nil {
		return "", nil, err
	}
	gz, err := packTOC(f.level, head, json, tail)
	if err != nil {
		return "", nil, fmt.Errorf("compress the table of contents: %w", err)
	}
	if external {
		return digest.FromBytes(json), gz, out.Append(newFooter(externalField))
	}
	_, at := out.Blob()
	if err := out.Append(gz, head, json, tail); err != nil {
		return "", nil, err
	}
	return digest.FromBytes(json), gz, out.Append(newFooter(fmt.Sprintf("%s%016x%s", subfield, at, magic)))
}
