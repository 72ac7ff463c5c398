package zstdchunked

import (
	"encoding/binary"
	"hash/crc64"

	"github.com/vbatts/tar-split/tar/storage"
)

// crc is crc64.Update with the table of tar-split, CRC-64/ISO, several times as fast.
//
// Its polynomial is x⁶⁴ + x⁴ + x³ + x + 1, which has so few terms that to multiply by x⁶⁴, or, of that the fourth power, by x²⁵⁶, takes a
// few shifts and no table. So there are four sums that don't wait for each other, of each fourth word.
func crc(sum uint64, p []byte) uint64 {
	const step = 4 * 8
	if len(p) < 2*step {
		return crc64.Update(sum, storage.CRCTable, p)
	}
	a, b, c, d := words(p)
	a ^= ^sum
	for p = p[step:]; len(p) >= step; p = p[step:] {
		w, x, y, z := words(p)
		a, b, c, d = times256(a)^w, times256(b)^x, times256(c)^y, times256(d)^z
	}
	s := times64(times64(times64(times64(a)^b)^c) ^ d)
	return crc64.Update(^s, storage.CRCTable, p)
}

func words(p []byte) (a, b, c, d uint64) {
	_ = p[31]
	return binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:]), binary.LittleEndian.Uint64(p[16:]), binary.LittleEndian.Uint64(p[24:])
}

// times64 multiplies by x⁶⁴. The lowest bit is that of x⁶³, as the first bit of a file's first byte has the highest power.
func times64(s uint64) uint64 {
	return s ^ s>>1 ^ s>>3 ^ s>>4 ^ reduce(s<<63^s<<61^s<<60)
}

// times256 multiplies by x²⁵⁶, which is x¹⁶ + x¹² + x⁴ + 1.
func times256(s uint64) uint64 {
	return s ^ s>>4 ^ s>>12 ^ s>>16 ^ reduce(s<<60^s<<52^s<<48)
}

// reduce is times64 of what has no high powers: what came out above x⁶³ of a multiplication.
func reduce(o uint64) uint64 { return o ^ o>>1 ^ o>>3 ^ o>>4 }
