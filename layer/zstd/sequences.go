package zstd

// A sequence is some literals, and behind them a match: how many, its length and its offset, as symbols and extra bits.
type sequence struct {
	extra                    uint64 // of the literals, the length and the offset, from the lowest bit on: up to 56
	bits                     uint8  // how many
	literals, offset, length uint8
}

// minMatch is the shortest match that the format has.
const minMatch = 3

// A field is one of the three numbers of a sequence: a symbol says of what size it is, extra bits which of these.
type field struct {
	most  uint   // log of the largest table
	usual *table // what is used where a code of its own isn't worth it
}

var (
	literalsExtra = [64]uint8{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	lengthExtra   = [64]uint8{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
		1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

	// The distributions of RFC 8878, 3.1.1.3.2.2.
	literalsUsual = []int16{4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1}
	lengthUsual   = []int16{1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
		-1, -1, -1, -1, -1, -1, -1}
	offsetUsual = []int16{1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1}
)

var fields = [3]field{
	ofLiterals: newField(9, 6, literalsUsual),
	ofOffset:   newField(8, 5, offsetUsual),
	ofLength:   newField(9, 6, lengthUsual),
}

// The fields, in the order in which a block has their codes.
const (
	ofLiterals = iota
	ofOffset
	ofLength
)

func newField(most, log uint, norm []int16) field {
	t := new(table)
	t.build(norm, log)
	return field{most: most, usual: t}
}

var (
	literalsSymbol = [64]uint8{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 20, 20, 21, 21, 21, 21,
		22, 22, 22, 22, 22, 22, 22, 22, 23, 23, 23, 23, 23, 23, 23, 23, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24, 24}
	lengthSymbol = [128]uint8{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
		32, 32, 33, 33, 34, 34, 35, 35, 36, 36, 36, 36, 37, 37, 37, 37, 38, 38, 38, 38, 38, 38, 38, 38, 39, 39, 39, 39, 39, 39, 39, 39,
		40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41, 41,
		42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42}
)

func symbolOfLiterals(n uint32) uint8 {
	if n < uint32(len(literalsSymbol)) {
		return literalsSymbol[n]
	}
	return uint8(logOf(n) + 19)
}

func symbolOfLength(n uint32) uint8 {
	if n < uint32(len(lengthSymbol)) {
		return lengthSymbol[n]
	}
	return uint8(logOf(n) + 36)
}

func symbolOfOffset(v uint32) uint8 { return uint8(logOf(v)) }

// newSequence returns a sequence of so many literals, a match of a length, less minMatch, and its offset, as the format has it, and counts its symbols.
func (h *histogram) newSequence(literals, length, offset uint32) sequence {
	l, m, o := symbolOfLiterals(literals)&63, symbolOfLength(length)&63, symbolOfOffset(offset)&31
	h.fields[ofLiterals][l]++
	h.fields[ofOffset][o]++
	h.fields[ofLength][m]++
	nl, nm := literalsExtra[l], lengthExtra[m]
	extra := uint64(offset) &^ (1 << o)
	extra = extra<<(nm&63) | uint64(length)&(1<<(nm&63)-1)
	extra = extra<<(nl&63) | uint64(literals)&(1<<(nl&63)-1)
	return sequence{extra: extra, bits: nl + nm + o, literals: l, offset: o, length: m}
}
