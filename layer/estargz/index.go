package estargz

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
)

// aroundTOC is what stands in front of the JSON and behind it, in the tar that a blob has it in.
func aroundTOC(size int) (head, tail []byte, err error) {
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: tocName, Size: int64(size)}); err != nil {
		return nil, nil, fmt.Errorf("table of contents: %w", err)
	}
	return b.Bytes(), make([]byte, -size&511+2*512), nil
}

// newFooter is a footer with this extra field: see parseFooter.
func newFooter(extra string) []byte {
	b := append(make([]byte, 0, footerSize), gzipHeader...)
	b = append(b, 0, 0, 0, 0, 0, 255) // no time, no flags, no system
	b = binary.LittleEndian.AppendUint16(b, uint16(len(extra)))
	b = append(b, extra...)
	b = append(b, 1, 0, 0, 0xff, 0xff) // the last block, of 0 bytes as they are
	return append(b, 0, 0, 0, 0, 0, 0, 0, 0)
}
