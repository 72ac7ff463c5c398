package frames

import (
	"crypto/sha256"
	"encoding/hex"
	gohash "hash"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/sha256s"
)

// digests are those of a tar, of its chunks, and of the files that have several. Frames are added in their order.
type digests struct {
	tar     gohash.Hash // nil if nobody wants to know
	tarSize int64
	sums    []digest.Digest // of the files with several chunks

	chunk gohash.Hash
	file  gohash.Hash // of the chunks of a file up to here
}

func newDigests(tar bool) *digests {
	d := &digests{chunk: sha256.New(), file: sha256.New()}
	if tar {
		d.tar = sha256.New()
	}
	return d
}

// add adds a frame, and takes note in its records of the digests of their chunks.
func (d *digests) add(f *Frame) {
	done := 0
	for i := range f.Records {
		r := &f.Records[i]
		if r.Size == 0 {
			continue
		}
		d.between(f.Tar[done:r.Start])
		d.payload(r, r.Payload(f))
		done = r.Start + r.Size
	}
	d.between(f.Tar[done:])
}

// between adds what belongs to the tar only.
func (d *digests) between(p []byte) {
	if d.tar != nil {
		sha256s.Write(p, d.tar)
	}
	d.tarSize += int64(len(p))
}

// payload adds a chunk: to the digests of the tar, of the chunk, and of the file if that has several. All at once cost little more than one.
func (d *digests) payload(r *Record, p []byte) {
	d.tarSize += int64(len(p))
	d.chunk.Reset()
	to := []gohash.Hash{d.chunk}
	if d.tar != nil {
		to = append(to, d.tar)
	}
	if r.Part == NextPart || r.Part == LastPart { // the first chunk of a file is the file up to there
		to = append(to, d.file)
	}
	sha256s.Write(p, to...)
	r.TOC.ChunkDigest = sumOf(d.chunk)
	switch r.Part {
	case Whole:
		r.TOC.Digest = r.TOC.ChunkDigest
	case FirstPart:
		d.chunk, d.file = d.file, d.chunk
	case LastPart:
		d.sums = append(d.sums, sumOf(d.file))
	}
}

func sumOf(h gohash.Hash) digest.Digest {
	if h == nil {
		return ""
	}
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(h.Sum(nil)))
}
