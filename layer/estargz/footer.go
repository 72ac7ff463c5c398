package estargz

import (
	"encoding/binary"
	"fmt"
	"strconv"
)

// A footer is an empty gzip stream whose extra field says where the TOC is: behind a header of 10
// bytes and 2 for the field's length, and before 13 of empty content.
const (
	gzipHeader   = "\x1f\x8b\x08\x04" // deflate, extra field
	extraStart   = 12
	emptyContent = 13

	// footerSize is that of the longest footer, eStargz's. Its field has a subfield SG of 22 bytes.
	footerSize     = extraStart + 4 + 22 + emptyContent
	subfield       = "SG\x16\x00"
	legacyFooter   = extraStart + 22 + emptyContent
	magic          = "STARGZ" // behind the offset of the TOC in 16 hexadecimal digits
	externalFooter = extraStart + 4 + len(externalMagic) + emptyContent
	externalField  = "SG\x11\x00" + externalMagic
	externalMagic  = "STARGZEXTERNALTOC"
)

type footer struct {
	start    int64 // of the footer in the blob
	size     int
	external bool
	toc      int64 // where the TOC begins in the blob, unless it's external
}

// parseFooter looks for a footer at the end of the tail of a blob.
func parseFooter(tail []byte, blob int64) (footer, error) {
	for _, size := range []int{footerSize, legacyFooter, externalFooter} {
		if len(tail) < size {
			continue
		}
		extra, ok := extraField(tail[len(tail)-size:])
		if !ok {
			continue
		}
		f := footer{start: blob - int64(size), size: size}
		if size == externalFooter {
			if f.external = extra == externalField; f.external {
				return f, nil
			}
			continue
		}
		if size == footerSize {
			if extra[:len(subfield)] != subfield {
				continue
			}
			extra = extra[len(subfield):]
		}
		if extra[16:] != magic {
			continue
		}
		offset, err := strconv.ParseUint(extra[:16], 16, 63)
		if err != nil || int64(offset) >= f.start {
			return f, fmt.Errorf("%w: table of contents at %q of %d bytes", ErrFooter, extra[:16], blob)
		}
		f.toc = int64(offset)
		return f, nil
	}
	return footer{}, ErrFooter
}

// extraField returns the extra field of a gzip stream that has nothing else.
func extraField(p []byte) (extra string, ok bool) {
	end := len(p) - emptyContent
	if string(p[:len(gzipHeader)]) != gzipHeader || int(binary.LittleEndian.Uint16(p[extraStart-2:])) != end-extraStart {
		return "", false
	}
	return string(p[extraStart:end]), true
}
