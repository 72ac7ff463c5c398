// Package estargz opens and writes eStargz layers: gzip'ed tars whose files begin gzip streams of their own, and whose
// table of contents (TOC), a JSON file, stands behind the files or in another blob. The format is
// https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md; what is read here:
//
//	footer     TOC
//	51 bytes   in the blob, at the offset that the footer names (eStargz)
//	47 bytes   the same (stargz, the format's ancestor)
//	46 bytes   elsewhere: the caller gives it (external TOC)
//
// [Open] reads the end of a blob, in one piece that mostly holds all of the TOC, and makes a [layer.Layer] of it. What stands in a gzip
// stream is a frame; a file of several chunks has several frames, unless the layer was made with a minimal chunk size, which
// puts several chunks and files in one.
//
// Nothing is used of a TOC whose digest isn't the one that the caller expects. A layer that can't be had
// chunk by chunk with a digest for each is [ErrUnverifiable]; a hostile or damaged one is an error that wraps [io/fs.ErrInvalid], from here
// or from package layer. In all these cases the layer may still be pulled as a whole. Errors of the
// io.ReaderAt come through.
//
// A TOC has no name that isn't UTF-8, and mostly times in whole seconds.
//
// [Write] makes a layer of a tar, without loss and on all CPUs, with the first of these footers, or the last:
//
//	tar -> package frames -> deflate, digests of chunks -> TOC
//
// A frame of it has what follows in the tar up to the next one, and small files together until there are [WriteOptions.MinChunkSize]
// bytes: see package frames.
package estargz

import (
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/toc"
)

// Options of [Open] and [Parse].
type Options struct {
	// TOCDigest is what the TOC's JSON must have, as the image's manifest says in the annotation
	// containerd.io/snapshot/stargz/toc.digest. Empty is any: the caller must have another reason to trust the blob.
	TOCDigest digest.Digest
	// ExternalTOC is the TOC of a blob that has it elsewhere: a gzip'ed tar. Other blobs don't need it.
	ExternalTOC []byte
	// Tail is how many bytes at the end of the blob to read at first: what [TailOf] returns is just enough. 0 is a guess that mostly is.
	Tail int64
}

// A Blob is an opened eStargz layer.
type Blob struct {
	Layer *layer.Layer
	// TOCDigest is what the TOC's JSON has.
	TOCDigest digest.Digest
	// TOC is the TOC as a gzip'ed tar, and End where the frames of the blob end: with them, [Parse] makes the
	// same Blob again.
	TOC []byte
	End int64
	// Prefetch is how many bytes at the beginning of the blob its maker wants to be fetched ahead of use, by the landmark that
	// stands there: 0 when it says that none are, [NoLandmark] when it says nothing.
	Prefetch int64
}

// NoLandmark is the [Blob.Prefetch] of a blob without landmarks.
const NoLandmark = toc.NoLandmark

// Open opens a blob of the given size. It calls r.ReadAt once, and a second time for what lacks of a TOC
// that is larger than the guess. The Layer doesn't use r.
func Open(r io.ReaderAt, size int64, opt Options) (*Blob, error) {
	tail := make([]byte, tailSize(size, opt))
	tailStart := size - int64(len(tail))
	if err := toc.ReadFull(r, tail, tailStart); err != nil {
		return nil, fmt.Errorf("read the last %d bytes of the blob: %w", len(tail), err)
	}
	foot, err := parseFooter(tail, size)
	if err != nil {
		return nil, err
	}
	if foot.external {
		if opt.ExternalTOC == nil {
			return nil, ErrExternalTOC
		}
		return Parse(opt.ExternalTOC, foot.start, opt)
	}
	seen := tail[:len(tail)-foot.size]
	if foot.toc >= tailStart {
		return Parse(seen[foot.toc-tailStart:], foot.toc, opt)
	}
	tocSize := foot.start - foot.toc
	if tocSize > MaxCompressedTOC {
		return nil, fmt.Errorf("%w: %d bytes compressed: %w", ErrTOC, tocSize, layer.ErrLimit)
	}
	whole := make([]byte, tocSize)
	missing := whole[:tocSize-int64(len(seen))]
	if err := toc.ReadFull(r, missing, foot.toc); err != nil {
		return nil, fmt.Errorf("read %d bytes of the table of contents at %d: %w", len(missing), foot.toc, err)
	}
	copy(whole[len(missing):], seen)
	return Parse(whole, foot.toc, opt)
}

const (
	// smallTail and largeTail bound the guess. A TOC has some 50 bytes for a file. Those of a Debian system with compilers,
	// of Go, a JDK and Python take 2 to 650 KB in blobs of 3 to 170 MB: the number of files is in no
	// relation to the size. The layers of an image are opened together, so what is read in vain of each delays all of them: a
	// guess that suffices for six of those eight takes 100 ms less at 200 Mbit/s than one for all.
	smallTail = 128 << 10
	largeTail = 308 << 10
)

// TailOf returns how many bytes at the end of a blob of the given size are its TOC and the footer, as the last bytes of the blob say; 0 if
// these don't say, or it's more than a TOC may have.
func TailOf(last []byte, size int64) int64 {
	foot, err := parseFooter(last, size)
	switch {
	case err != nil:
		return 0
	case foot.external:
		return int64(foot.size)
	case foot.start-foot.toc > MaxCompressedTOC:
		return 0
	}
	return size - foot.toc
}

func tailSize(size int64, opt Options) int64 {
	tail := opt.Tail
	switch {
	case opt.ExternalTOC != nil && tail == 0:
		tail = footerSize
	case tail == 0:
		// npm and Python trees, small blobs of small files, have 6 %.
		tail = min(max(size/8, smallTail), largeTail)
	}
	return min(max(tail, footerSize), max(size, 0))
}

var (
	// ErrFooter is a blob that doesn't end as an eStargz layer does: it's of another format.
	ErrFooter = layer.Invalid("no eStargz footer")
	// ErrTOC is a TOC that can't be understood.
	ErrTOC = toc.Err
	// ErrExternalTOC is a blob whose TOC stands elsewhere. The caller may get it and open the blob again.
	ErrExternalTOC = errors.New("the table of contents is in another blob")
	// ErrUnverifiable is a layer with content for which the TOC has no SHA-256.
	ErrUnverifiable = toc.ErrUnverifiable
	// ErrLossy is a TOC with names from which bytes that aren't UTF-8 have gone: only the tar knows them.
	ErrLossy = toc.ErrLossy
)

// A DigestError is a TOC other than the expected one.
type DigestError = toc.DigestError
