package frames

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// An Entry is one of the TOC that is written. What the fields mean is said at estargz.TOCEntry in stargz-snapshotter.
type Entry struct {
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

// UnknownDigest keeps the place of a file's digest, which is known only when its last chunk is.
const UnknownDigest digest.Digest = "sha256:????????????????????????????????????????????????????????????????"

// An Index is the JSON of a TOC in the making.
type Index struct {
	json  bytes.Buffer
	comma string
	// unknown is where digests are missing.
	unknown []int
}

// NewIndex returns one without entries.
func NewIndex() *Index {
	x := &Index{}
	x.json.WriteString(`{"version":1,"entries":[`)
	return x
}

// Add adds an entry whose place in the blob is known: the record's, or whatever else has all of that.
func (x *Index) Add(r *Record, entry any) error {
	b, err := json.Marshal(entry)
	if err != nil {
		return fmt.Errorf("table of contents: %q: %w", r.TOC.Name, err)
	}
	x.json.WriteString(x.comma)
	x.comma = ",\n"
	if r.Part == FirstPart {
		// No string of the entry can hold this: quotes in it are escaped.
		const key = `"digest":"`
		x.unknown = append(x.unknown, x.json.Len()+bytes.Index(b, []byte(key+string(UnknownDigest)))+len(key))
	}
	x.json.Write(b)
	return nil
}

// Finish returns the JSON, with the digests that were missing, and what else there is to say behind the entries.
func (x *Index) Finish(sums []digest.Digest, more string) []byte {
	x.json.WriteString("]" + more + "}")
	b := x.json.Bytes()
	for i, at := range x.unknown {
		copy(b[at:], sums[i])
	}
	return b
}
