package zstdchunked

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
)

// A footer is a skippable frame of 64-bit numbers, little endian, and a magic. In both dialects it begins with the offset of the TOC in the
// blob, its size, and the size of the JSON; then comes 1, for the kind of JSON. Podman's goes on with offset and sizes of the headers of the
// tar.
const (
	skippable   = "\x50\x2a\x4d\x18"
	frameHeader = 8

	podmanFooter = 64
	podmanMagic  = "GNUlInUx"
	stargzFooter = 40
	stargzMagic  = "GnUlInUx"

	manifestType = 1
)

// parseFooter looks for a footer at the end of the tail of a blob.
func parseFooter(tail []byte) (Position, Dialect, error) {
	for _, f := range []struct {
		dialect Dialect
		size    int
		magic   string
	}{{Podman, podmanFooter, podmanMagic}, {Stargz, stargzFooter, stargzMagic}} {
		if len(tail) < frameHeader+f.size {
			continue
		}
		p := tail[len(tail)-frameHeader-f.size:]
		if !bytes.HasPrefix(p, []byte(skippable)) || binary.LittleEndian.Uint32(p[len(skippable):]) != uint32(f.size) ||
			!bytes.HasSuffix(p, []byte(f.magic)) {
			continue
		}
		number := func(i int) uint64 { return binary.LittleEndian.Uint64(p[frameHeader+8*i:]) }
		if number(0) > math.MaxInt64 || number(1) > math.MaxInt64 || number(3) != manifestType {
			return Position{}, 0, fmt.Errorf("%w: table of contents of type %d at %d:%d", ErrFooter, number(3), number(0), number(1))
		}
		return Position{int64(number(0)), int64(number(1))}, f.dialect, nil
	}
	return Position{}, 0, ErrFooter
}
