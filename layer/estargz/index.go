package estargz

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// A tocEntry is one of the TOC that is written. What the fields mean is said at estargz.TOCEntry in stargz-snapshotter.
type tocEntry struct {
	Name        string            `json:"name"`
	Type        string            `json:"type"`
	Size        int64             `json:"size,omitempty"`
	ModTime     string            `json:"modtime,omitempty"`
	LinkName    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	UID         int               `json:"uid,omitempty"`
	GID         int               `json:"gid,omitempty"`
	Uname       string            `json:"userName,omitempty"`
	Gname       string            `json:"groupName,omitempty"`
	Offset      int64             `json:"offset,omitempty"`
	InnerOffset int64             `json:"innerOffset,omitempty"`
	DevMajor    int64             `json:"devMajor,omitempty"`
	DevMinor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string][]byte `json:"xattrs,omitempty"`
	Digest      digest.Digest     `json:"digest,omitempty"`
	ChunkOffset int64             `json:"chunkOffset,omitempty"`
	ChunkSize   int64             `json:"chunkSize,omitempty"`
	ChunkDigest digest.Digest     `json:"chunkDigest,omitempty"`
}

// unknownDigest keeps the place of a file's digest, which is known only when its last chunk is.
const unknownDigest digest.Digest = "sha256:????????????????????????????????????????????????????????????????"

// An index is the JSON of a TOC in the making.
type index struct {
	json  bytes.Buffer
	comma string
	// unknown is where digests are missing.
	unknown []int
}

func newIndex() *index {
	x := &index{}
	x.json.WriteString(`{"version":1,"entries":[`)
	return x
}

// add adds an entry whose place in the blob is known.
func (x *index) add(r *record) error {
	b, err := json.Marshal(&r.toc)
	if err != nil {
		return fmt.Errorf("table of contents: %q: %w", r.toc.Name, err)
	}
	x.json.WriteString(x.comma)
	x.comma = ",\n"
	if r.part == firstPart {
		// No string of the entry can hold this: quotes in it are escaped.
		const key = `"digest":"`
		x.unknown = append(x.unknown, x.json.Len()+bytes.Index(b, []byte(key+string(unknownDigest)))+len(key))
	}
	x.json.Write(b)
	return nil
}

// finish returns the JSON, with the digests that were missing.
func (x *index) finish(sums []digest.Digest) []byte {
	x.json.WriteString("]}")
	b := x.json.Bytes()
	for i, at := range x.unknown {
		copy(b[at:], sums[i])
	}
	return b
}

// aroundTOC is what stands in front of the JSON and behind it, in the tar that a blob has it in.
func aroundTOC(size int) (head, tail []byte, err error) {
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: tocName, Size: int64(size)}); err != nil {
		return nil, nil, fmt.Errorf("table of contents: %w", err)
	}
	return b.Bytes(), make([]byte, -size&511+2*512), nil
}

// footerOf is the footer of a blob whose TOC is at an offset: see parseFooter.
func footerOf(toc int64) []byte {
	b := append(make([]byte, 0, footerSize), gzipHeader...)
	b = append(b, 0, 0, 0, 0, 0, 255) // no time, no flags, no system
	b = binary.LittleEndian.AppendUint16(b, uint16(len(subfield)+16+len(magic)))
	b = fmt.Appendf(append(b, subfield...), "%016x%s", toc, magic)
	b = append(b, 1, 0, 0, 0xff, 0xff) // the last block, of 0 bytes as they are
	return append(b, 0, 0, 0, 0, 0, 0, 0, 0)
}
