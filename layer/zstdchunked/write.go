package zstdchunked

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
)

// WriteOptions of [Write]. The zero value works.
type WriteOptions struct {
	// Level is zstd's, 1 to 22. Nil and 0 are 3. There are four that differ: 1, 3, 6 and 10.
	Level *int
	// ChunkSize is how many bytes of a file are a chunk, up to [frames.MaxChunkSize]. 0 is [frames.DefaultChunkSize].
	ChunkSize int64
	// Pool is what is shared with other writers. Nil is one for all CPUs.
	Pool *frames.Pool
	// NoDiffID leaves out DiffID, for a caller who has it of the tar anyway.
	NoDiffID bool
}

const (
	minLevel, maxLevel = 0, 22
	// batch is how much of a tar is handed from goroutine to goroutine at once, if files are small: by themselves each would cost more
	// for a buffer and two changes of goroutine than for being compressed.
	batch = 64 << 10
	// maxTOC is what Podman takes of a TOC, in bytes.
	maxTOC = 150 << 20
)

// Written is what [Write] has found out on the way.
type Written struct {
	// Digest and Size are the blob's.
	Digest digest.Digest
	Size   int64
	// DiffID and TarSize are those of what the blob decompresses to: the tar.
	DiffID  digest.Digest
	TarSize int64
	// Annotations are what the layer's descriptor must have to be more than a zstd-compressed tar.
	Annotations map[string]string
	// TOC is the compressed TOC, nil without annotations, and End where the frames of the blob end: as [Blob] has them.
	TOC []byte
	End int64
	// Lossy is the first entry, if there is one, that the TOC can't say as the tar does: names that aren't UTF-8, two of one name, times that
	// RFC 3339 doesn't know, headers for all of the tar, sparse files, entries of unknown types, and more of them or of chunks than readers take. Podman refuses a layer whose TOC isn't what the tar is. Such a layer is written without one, and has no
	// annotations.
	Lossy string
}

// Write makes a zstd:chunked layer of a tar, in Podman's dialect, and writes it to w.
//
// The blob decompresses to the tar, byte by byte. What it is depends on the tar and the options alone. It is compressed as package frames
// has it; what is in memory for each entry is some 300 bytes of TOC, and its headers, compressed.
//
// A tar that ends early is an error that wraps [io.ErrUnexpectedEOF].
func Write(ctx context.Context, w io.Writer, tar io.Reader, opt WriteOptions) (Written, error) {
	if opt.ChunkSize == 0 {
		opt.ChunkSize = frames.DefaultChunkSize
	}
	if opt.ChunkSize < 1 || opt.ChunkSize > frames.MaxChunkSize {
		return Written{}, fmt.Errorf("chunk size of %d bytes: want 1 to %d", opt.ChunkSize, frames.MaxChunkSize)
	}
	level := zstd.SpeedDefault
	if opt.Level != nil && *opt.Level != 0 {
		if *opt.Level < minLevel || *opt.Level > maxLevel {
			return Written{}, fmt.Errorf("compression level %d: there are levels %d to %d", *opt.Level, minLevel, maxLevel)
		}
		level = zstd.EncoderLevelFromZstd(*opt.Level)
	}
	if opt.Pool == nil {
		opt.Pool = frames.NewPool(0)
	}
	split := newTarSplit()
	f := &format{encode: encoderOf(level), pool: opt.Pool, toc: frames.NewIndex(), split: split}
	out, err := frames.Write(ctx, w, tar, f, frames.Options{ChunkSize: opt.ChunkSize, MinChunkSize: batch, Pool: opt.Pool, Blob: true, Tar: !opt.NoDiffID})
	if err != nil {
		return Written{}, err
	}
	var written Written
	written.Lossy = cmp.Or(out.Untold, out.Lossy, split.twice)
	if written.Lossy == "" {
		_, written.End = out.Blob()
		if written.Annotations, written.TOC, err = f.finish(out); err != nil {
			return Written{}, err
		}
	}
	written.Digest, written.Size = out.Blob()
	written.DiffID, written.TarSize = out.Tar()
	return written, nil
}

// An entry is one of the TOC, as Podman's storage library has it in minimal.FileMetadata.
type entry struct {
	frames.Entry
	EndOffset  int64  `json:"endOffset,omitempty"`
	AccessTime string `json:"accesstime,omitempty"`
	ChangeTime string `json:"changetime,omitempty"`
}

// A format makes zstd:chunked of frames.
type format struct {
	encode encoder
	pool   *frames.Pool
	toc    *frames.Index
	split  *tarSplit
}

// Pack implements frames.Format. What package frames has put together is handled in one go, but each payload begins a zstd frame of its own.
func (f *format) Pack(fr *frames.Frame) ([]byte, error) {
	// What can't be compressed grows by 3 bytes in 128 KiB, and by the header of its frame.
	out := f.pool.Buffer(len(fr.Tar) + len(fr.Tar)>>12 + (len(fr.Records)+1)*maxFrameHeader)
	var last *frames.Record // whose frame begins at done
	done := 0
	compress := func(end int) (err error) {
		if end > done {
			out, err = f.encode(out, fr.Tar[done:end])
		}
		if last != nil {
			last.End = len(out)
		}
		done = end
		return err
	}
	for i := range fr.Records {
		r := &fr.Records[i]
		if r.Size == 0 {
			continue
		}
		if r.Part == frames.Whole {
			r.CRC = crc(0, r.Payload(fr))
		}
		if err := compress(r.Start); err != nil {
			return nil, err
		}
		r.Begin, last = len(out), r
	}
	err := compress(len(fr.Tar))
	return out, err
}

// Put implements frames.Format.
func (f *format) Put(fr *frames.Frame, at int64, _ int) error {
	if fr.Untold {
		f.toc = nil // there will be none
		return nil
	}
	for i := range fr.Records {
		r := &fr.Records[i]
		e := entry{Entry: r.TOC, AccessTime: r.AccessTime, ChangeTime: r.ChangeTime}
		e.Uname, e.Gname = "", ""
		e.ChunkSize = int64(r.Size)
		if r.Part == frames.Whole {
			e.ChunkSize, e.ChunkDigest = 0, ""
		}
		if r.Size > 0 {
			e.Offset, e.EndOffset = at+int64(r.Begin), at+int64(r.End)
		}
		if err := f.toc.Add(r, &e); err != nil {
			return err
		}
	}
	return f.split.add(fr)
}

// finish writes what is behind the frames, and returns the annotations that lead there, and the compressed TOC.
func (f *format) finish(out *frames.Output) (annotations map[string]string, toc []byte, err error) {
	split, err := f.split.finish()
	if err != nil {
		return nil, nil, err
	}
	json := f.toc.Finish(out.Sums, `,"tarSplitDigest":"`+digest.FromBytes(split).String()+`"`)
	if len(json) > maxTOC {
		return nil, nil, nil // Podman won't have it
	}
	packed, err := f.encode(nil, json)
	if err != nil {
		return nil, nil, err
	}
	_, end := out.Blob()
	at := end + frameHeader
	splitAt := at + int64(len(packed)) + frameHeader
	footer := make([]byte, 0, podmanFooter)
	for _, n := range []int64{at, int64(len(packed)), int64(len(json)), manifestType, splitAt, int64(len(split)), f.split.size} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	footer = append(footer, podmanMagic...)
	for _, p := range [][]byte{packed, split, footer} {
		head := binary.LittleEndian.AppendUint32([]byte(skippable), uint32(len(p)))
		if err := out.Append(head); err != nil {
			return nil, nil, err
		}
		if err := out.Append(p); err != nil {
			return nil, nil, err
		}
	}
	return map[string]string{
		ChecksumAnnotation: digest.FromBytes(packed).String(),
		PositionAnnotation: fmt.Sprintf("%d:%d:%d:%d", at, len(packed), len(json), manifestType),
		TarSplitAnnotation: fmt.Sprintf("%d:%d:%d", splitAt, len(split), f.split.size),
	}, packed, nil
}
