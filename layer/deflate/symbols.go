package deflate

import "math/bits"

// The alphabets of DEFLATE (RFC 1951, 3.2.5 to 3.2.7).
const (
	endOfBlock  = 256
	firstLength = 257
	usedLitLen  = 286
	numLitLen   = 288 // with two that only the fixed code has
	usedOffset  = 30
	numOffset   = 32 // as above
	numPrecode  = 19
	minMatch    = 3
	maxMatch    = 258
	maxCodeword = 15
	maxPrecode  = 7
	maxStored   = 1<<16 - 1

	blockStored  = 0
	blockFixed   = 1
	blockDynamic = 2
)

// tables are those of the RFC, and what leads into them.
type tables struct {
	// Of a length less minMatch: its symbol, less firstLength. Of those symbols: the extra bits, and where they count from.
	lengthSlot  [maxMatch - minMatch + 1]uint8
	lengthExtra [32]uint8
	lengthBase  [32]uint8
	offsetExtra [numOffset]uint8
	// The codes of a block that has none of its own.
	litLen, offset code
}

var rfc = newTables()

var (
	precodeOrder = [numPrecode]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
	precodeExtra = [32]uint8{16: 2, 17: 3, 18: 7}
)

func newTables() *tables {
	t := &tables{}
	n := 0
	for s := range 28 {
		if s >= 8 {
			t.lengthExtra[s] = uint8(s/4 - 1)
		}
		t.lengthBase[s] = uint8(n)
		for range 1 << t.lengthExtra[s] {
			t.lengthSlot[n] = uint8(s)
			n++
		}
	}
	// The longest has a symbol of its own, and no extra bits.
	t.lengthBase[28], t.lengthSlot[maxMatch-minMatch] = maxMatch-minMatch, 28
	for s := range usedOffset {
		if s >= 4 {
			t.offsetExtra[s] = uint8(s/2 - 1)
		}
	}
	for s := range t.litLen.size {
		switch {
		case s < 144, s >= 280:
			t.litLen.size[s] = 8
		case s < 256:
			t.litLen.size[s] = 9
		default:
			t.litLen.size[s] = 7
		}
	}
	t.litLen.words(numLitLen)
	for s := range numOffset {
		t.offset.size[s] = 5
	}
	t.offset.words(numOffset)
	return t
}

// offsetSymbol returns the symbol of an offset less 1, and how many extra bits there are, which are the lowest of that. A table would be too large, or
// one in two parts, with a branch that is often guessed wrong.
func offsetSymbol(o uint16) (symbol, extra uint) {
	extra = uint(bits.Len16(o>>1|1)) - 1
	return 2*extra + uint(o)>>(extra&15), extra
}
